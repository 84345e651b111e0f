"""The gradient of an additive bias: dS summed over the dimensions along which it is broadcast.

One program owns a tile of the *bias* and walks over everything that it was broadcast to, so that
no ``[batch, heads, queries, keys]`` tensor is stored and no atomic addition is needed.
"""

import triton
import triton.language as tl

from entropy_regularization.attention.triton.primitives import (
    CHANGING,
    dropout_factor,
    head_pointer,
    load_rows,
    score_gradient,
    with_known_strides,
)
from entropy_regularization.attention.triton.recomputation import (
    load_constant,
    load_constants,
    log2_probability_tile,
)


@triton.jit
def tile_is_seen(row_start, key_start, n_queries, n_keys, left, right, ROWS, KEYS):
    """Tell whether left and right leave anything of a tile."""
    first = row_start + n_keys - n_queries
    seen = key_start < n_keys
    if left is not None:
        seen = seen & (key_start + KEYS > first - left)
    if right is not None:
        seen = seen & (key_start < first + ROWS + right)
    return seen


@triton.jit(do_not_specialize=CHANGING)
def bias_gradient_kernel(
    query,
    key,
    value,
    d_output,
    d_bias,
    constants,
    allowed,
    padding,
    document,
    bias,
    dropout,
    factor,
    cap_log2,
    left,
    right,
    heads,
    group,
    n_queries,
    n_keys,
    owned,
    visited,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STRIDES_BY_8: tl.constexpr,
    WIDE: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_KEYS: tl.constexpr,
):
    """Compute one tile of dbias.

    ``owned`` = (heads, row tiles, key tiles) that the bias has of its own; ``visited`` = (batches,
    heads, row tiles, key tiles) over which it was broadcast. In each dimension one of the two is 1.
    """
    query = with_known_strides(query, STRIDES_BY_8)
    key = with_known_strides(key, STRIDES_BY_8)
    value = with_known_strides(value, STRIDES_BY_8)
    d_output = with_known_strides(d_output, STRIDES_BY_8)
    program = tl.program_id(0)
    own_key = program % owned[2]
    own_row = program // owned[2] % owned[1]
    own_head = program // owned[2] // owned[1] % owned[0]
    own_batch = program // owned[2] // owned[1] // owned[0]
    b_sum = tl.zeros([ROWS, KEYS], WIDE)
    for visit in range(visited[0] * visited[1] * visited[2] * visited[3]):
        key_start = (own_key + visit % visited[3]) * KEYS
        row_start = (own_row + visit // visited[3] % visited[2]) * ROWS
        head = own_head + visit // visited[3] // visited[2] % visited[1]
        batch = own_batch + visit // visited[3] // visited[2] // visited[1]
        if tile_is_seen(row_start, key_start, n_queries, n_keys, left, right, ROWS, KEYS):
            unit = batch * heads + head
            row = (row_start + tl.arange(0, ROWS))[:, None]
            o_key = (key_start + tl.arange(0, KEYS))[None, :]
            # [ROWS, PADDED], [ROWS, VALUE_PADDED], [KEYS, PADDED], [KEYS, VALUE_PADDED]
            b_query = load_rows(
                query, head_pointer(query, batch, head), row_start, n_queries,
                ROWS, PADDED, DIM, True,
            )  # fmt: skip
            b_d_output = load_rows(
                d_output, head_pointer(d_output, batch, head), row_start, n_queries,
                ROWS, VALUE_PADDED, VALUE_DIM, True,
            )  # fmt: skip
            b_key = load_rows(
                key, head_pointer(key, batch, head // group), key_start, n_keys,
                KEYS, PADDED, DIM, True,
            )  # fmt: skip
            b_value = load_rows(
                value, head_pointer(value, batch, head // group), key_start, n_keys,
                KEYS, VALUE_PADDED, VALUE_DIM, True,
            )  # fmt: skip
            o_unit = unit.to(tl.int64) * constants[3]
            delta, log2_normalizer = load_constants(
                constants, o_unit, row_start, n_queries, ROWS, 1, True
            )
            entropy_slope = constants[2]
            if constants[2] is not None:
                entropy_slope = load_constant(
                    constants[2], o_unit, row_start, n_queries, ROWS, 1, True
                )
            # [ROWS, KEYS], all of them
            b_log2_probability, _ = log2_probability_tile(
                tl.dot(b_query, tl.trans(b_key), input_precision="ieee", out_dtype=WIDE),
                log2_normalizer, row, o_key, (batch, head, unit),
                allowed, padding, document, bias, factor, cap_log2,
                left, right, (n_queries, n_keys), True,
            )  # fmt: skip
            b_d_weight = tl.dot(
                b_d_output, tl.trans(b_value), input_precision="ieee", out_dtype=WIDE
            )
            if dropout is not None:
                b_d_weight = b_d_weight * dropout_factor(dropout, unit, row, o_key)
            b_d_score, _ = score_gradient(b_log2_probability, b_d_weight, delta, entropy_slope)
            b_sum += b_d_score
    p_bias = head_pointer(d_bias, own_batch, own_head)
    o_row = own_row * ROWS + tl.arange(0, ROWS)
    o_key = own_key * KEYS + tl.arange(0, KEYS)
    p_row = p_bias + o_row.to(tl.int64) * d_bias[3]
    o_column = o_key.to(tl.int64) * d_bias[4]
    if SUM_ROWS and SUM_KEYS:
        tl.store(p_bias, tl.sum(tl.sum(b_sum, 1), 0))
    elif SUM_ROWS:
        tl.store(p_bias + o_column, tl.sum(b_sum, 0), mask=o_key < n_keys)
    elif SUM_KEYS:
        tl.store(p_row, tl.sum(b_sum, 1), mask=o_row < n_queries)
    else:
        inside = (o_row < n_queries)[:, None] & (o_key < n_keys)[None, :]
        tl.store(p_row[:, None] + o_column[None, :], b_sum, mask=inside)
