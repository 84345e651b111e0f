"""The gradient of the queries; no atomics, so that repeats are bit-identical.

``dS_ij = p_ij (dO_i . v_j - delta_i - g_i (s_ij - lse_i))``, one pass for output, entropy and
log-normalizer; a program walks over the keys of its block of queries.
"""

import triton
import triton.language as tl

from entropy_regularization.attention.triton.primitives import (
    CHANGING,
    dropout_factor,
    head_pointer,
    key_range,
    load_rows,
    score_gradient,
    store_rows,
    with_known_strides,
)
from entropy_regularization.attention.triton.recomputation import (
    load_constant,
    load_constants,
    log2_probability_tile,
)


@triton.jit
def query_gradient_tiles(
    b_d_query,
    b_query,
    b_d_output,
    delta,
    log2_normalizer,
    entropy_slope,
    start,
    stop,
    gap,
    jump,
    row,
    place,
    key,
    value,
    p_key,
    p_value,
    allowed,
    padding,
    document,
    bias,
    dropout,
    factor,
    cap_log2,
    left,
    right,
    sizes,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add the key tiles of ``[start, stop)`` to dQ; ``gap`` and ``jump``: see tile_range."""
    n_keys = sizes[1]
    for place_in_range in range(start, stop, KEYS):
        key_start = place_in_range
        if EDGE:
            key_start += tl.where(place_in_range < gap, 0, jump)
        # [KEYS, PADDED] and [KEYS, VALUE_PADDED]
        b_key = load_rows(key, p_key, key_start, n_keys, KEYS, PADDED, DIM, EDGE)
        b_value = load_rows(value, p_value, key_start, n_keys, KEYS, VALUE_PADDED, VALUE_DIM, EDGE)
        o_key = (key_start + tl.arange(0, KEYS))[None, :]
        # [ROWS, KEYS], all of them
        b_product = tl.dot(b_query, tl.trans(b_key), input_precision="ieee", out_dtype=delta.dtype)
        b_log2_probability, b_slope = log2_probability_tile(
            b_product, log2_normalizer, row, o_key, place,
            allowed, padding, document, bias, factor, cap_log2,
            left, right, sizes, EDGE,
        )  # fmt: skip
        b_d_weight = tl.dot(
            b_d_output, tl.trans(b_value), input_precision="ieee", out_dtype=delta.dtype
        )
        if dropout is not None:
            b_d_weight = b_d_weight * dropout_factor(dropout, place[2], row, o_key)
        b_d_score, _ = score_gradient(b_log2_probability, b_d_weight, delta, entropy_slope)
        b_d_score = b_d_score * b_slope
        b_d_query = tl.dot(
            b_d_score.to(b_key.dtype), b_key, b_d_query,
            input_precision="ieee", out_dtype=b_d_query.dtype,
        )  # fmt: skip
    return b_d_query


@triton.jit(do_not_specialize=CHANGING)
def query_gradient_kernel(
    query,
    key,
    value,
    d_output,
    d_query,
    constants,
    allowed,
    padding,
    document,
    bias,
    dropout,
    p_ranges,
    scale,
    factor,
    cap_log2,
    left,
    right,
    heads,
    group,
    n_queries,
    n_keys,
    n_blocks,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STRIDES_BY_8: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute dQ of one block of rows; the grid is ``blocks * batch * heads``."""
    query = with_known_strides(query, STRIDES_BY_8)
    key = with_known_strides(key, STRIDES_BY_8)
    value = with_known_strides(value, STRIDES_BY_8)
    d_output = with_known_strides(d_output, STRIDES_BY_8)
    d_query = with_known_strides(d_query, STRIDES_BY_8)
    program = tl.program_id(0)
    block = n_blocks - 1 - program % n_blocks
    unit = program // n_blocks
    batch = unit // heads
    head = unit % heads
    row_start = block * ROWS
    row = (row_start + tl.arange(0, ROWS))[:, None]
    p_range = p_ranges
    if p_ranges is not None:
        p_range = p_ranges + (batch.to(tl.int64) * n_blocks + block) * 4

    # [ROWS, PADDED] and [ROWS, VALUE_PADDED]
    b_query = load_rows(
        query, head_pointer(query, batch, head), row_start, n_queries, ROWS, PADDED, DIM, True
    )
    b_d_output = load_rows(
        d_output, head_pointer(d_output, batch, head), row_start, n_queries,
        ROWS, VALUE_PADDED, VALUE_DIM, True,
    )  # fmt: skip
    o_unit = unit.to(tl.int64) * constants[3]
    delta, log2_normalizer = load_constants(constants, o_unit, row_start, n_queries, ROWS, 1, True)
    entropy_slope = constants[2]
    if constants[2] is not None:
        entropy_slope = load_constant(constants[2], o_unit, row_start, n_queries, ROWS, 1, True)
    p_key = head_pointer(key, batch, head // group)
    p_value = head_pointer(value, batch, head // group)
    start, full_start, full_stop, stop = key_range(
        row_start, n_queries, n_keys, left, right, p_range, ROWS, KEYS
    )
    jump = full_stop - full_start
    place = (batch, head, unit)
    sizes = (n_queries, n_keys)
    b_d_query = tl.zeros([ROWS, PADDED], WIDE)
    b_d_query = query_gradient_tiles(
        b_d_query, b_query, b_d_output, delta, log2_normalizer, entropy_slope,
        full_start, full_stop, 0, 0, row, place, key, value, p_key, p_value,
        allowed, None, None, bias, dropout, factor, cap_log2, left, right, sizes,
        DIM, VALUE_DIM, PADDED, VALUE_PADDED, KEYS, False,
    )  # fmt: skip
    b_d_query = query_gradient_tiles(
        b_d_query, b_query, b_d_output, delta, log2_normalizer, entropy_slope,
        start, stop - jump, full_start, jump, row, place, key, value, p_key, p_value,
        allowed, padding, document, bias, dropout, factor, cap_log2, left, right, sizes,
        DIM, VALUE_DIM, PADDED, VALUE_PADDED, KEYS, True,
    )  # fmt: skip
    store_rows(
        d_query, head_pointer(d_query, batch, head), row_start, n_queries, b_d_query * scale,
        ROWS, PADDED, DIM,
    )  # fmt: skip
