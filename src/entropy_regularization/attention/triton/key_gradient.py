"""The gradients of keys and values; no atomics, so that repeats are bit-identical.

A program walks over the queries of its block of keys; dS is that of query_gradient.
"""

import triton
import triton.language as tl

from entropy_regularization.attention.triton.primitives import (
    CHANGING,
    dropout_factor,
    head_pointer,
    load_rows,
    row_range,
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
def key_gradient_tiles(
    state,
    b_key,
    b_value,
    start,
    stop,
    gap,
    jump,
    key,
    place,
    query,
    d_output,
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
    sizes,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add the row tiles of ``[start, stop)`` of one query head to dK and dV.

    Tiles are transposed, ``[KEYS, ROWS]``, so that they feed both products from registers. ``gap``
    and ``jump``: see tile_range.
    """
    b_d_key, b_d_value = state
    batch, head, unit = place
    n_queries = sizes[0]
    p_query = head_pointer(query, batch, head)
    p_d_output = head_pointer(d_output, batch, head)
    o_unit = unit.to(tl.int64) * constants[3]
    for place_in_range in range(start, stop, ROWS):
        row_start = place_in_range
        if EDGE:
            row_start += tl.where(place_in_range < gap, 0, jump)
        # [ROWS, PADDED] and [ROWS, VALUE_PADDED]
        b_query = load_rows(query, p_query, row_start, n_queries, ROWS, PADDED, DIM, EDGE)
        b_d_output = load_rows(
            d_output, p_d_output, row_start, n_queries, ROWS, VALUE_PADDED, VALUE_DIM, EDGE
        )
        row = (row_start + tl.arange(0, ROWS))[None, :]
        # [1, ROWS], each
        delta, log2_normalizer = load_constants(
            constants, o_unit, row_start, n_queries, ROWS, 0, EDGE
        )
        entropy_slope = constants[2]
        if constants[2] is not None:
            entropy_slope = load_constant(constants[2], o_unit, row_start, n_queries, ROWS, 0, EDGE)
        # [KEYS, ROWS], all of them
        b_product = tl.dot(b_key, tl.trans(b_query), input_precision="ieee", out_dtype=delta.dtype)
        b_log2_probability, b_slope = log2_probability_tile(
            b_product, log2_normalizer, row, key, place,
            allowed, padding, document, bias, factor, cap_log2,
            left, right, sizes, EDGE,
        )  # fmt: skip
        b_d_weight = tl.dot(
            b_value, tl.trans(b_d_output), input_precision="ieee", out_dtype=delta.dtype
        )
        if dropout is not None:
            b_keep = dropout_factor(dropout, unit, row, key)
            b_d_weight = b_d_weight * b_keep
        b_d_score, b_probability = score_gradient(
            b_log2_probability, b_d_weight, delta, entropy_slope
        )
        b_d_score = b_d_score * b_slope
        if dropout is not None:
            b_probability = b_probability * b_keep
        b_d_value = tl.dot(
            b_probability.to(b_d_output.dtype), b_d_output, b_d_value,
            input_precision="ieee", out_dtype=b_d_value.dtype,
        )  # fmt: skip
        b_d_key = tl.dot(
            b_d_score.to(b_query.dtype), b_query, b_d_key,
            input_precision="ieee", out_dtype=b_d_key.dtype,
        )  # fmt: skip
    return b_d_key, b_d_value


@triton.jit(do_not_specialize=CHANGING)
def key_gradient_kernel(
    query,
    key,
    value,
    d_output,
    d_key,
    d_value,
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
    kv_heads,
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
    """Compute dK and dV of one block of keys, over all heads that share it.

    The grid is ``blocks * batch * kv_heads``; the first keys of a causal problem, which most rows
    see, start first.
    """
    query = with_known_strides(query, STRIDES_BY_8)
    key = with_known_strides(key, STRIDES_BY_8)
    value = with_known_strides(value, STRIDES_BY_8)
    d_output = with_known_strides(d_output, STRIDES_BY_8)
    d_key = with_known_strides(d_key, STRIDES_BY_8)
    d_value = with_known_strides(d_value, STRIDES_BY_8)
    program = tl.program_id(0)
    block = program % n_blocks
    unit = program // n_blocks
    batch = unit // kv_heads
    kv_head = unit % kv_heads
    key_start = block * KEYS
    o_key = (key_start + tl.arange(0, KEYS))[:, None]
    p_range = p_ranges
    if p_ranges is not None:
        p_range = p_ranges + (batch.to(tl.int64) * n_blocks + block) * 4

    # [KEYS, PADDED] and [KEYS, VALUE_PADDED]
    b_key = load_rows(
        key, head_pointer(key, batch, kv_head), key_start, n_keys, KEYS, PADDED, DIM, True
    )
    b_value = load_rows(
        value, head_pointer(value, batch, kv_head), key_start, n_keys,
        KEYS, VALUE_PADDED, VALUE_DIM, True,
    )  # fmt: skip
    start, full_start, full_stop, stop = row_range(
        key_start, n_queries, n_keys, left, right, p_range, ROWS, KEYS
    )
    jump = full_stop - full_start
    sizes = (n_queries, n_keys)
    b_d_key = tl.zeros([KEYS, PADDED], WIDE)
    b_d_value = tl.zeros([KEYS, VALUE_PADDED], WIDE)
    for member in range(group):
        state = (b_d_key, b_d_value)
        head = kv_head * group + member
        place = (batch, head, batch * (kv_heads * group) + head)
        state = key_gradient_tiles(
            state, b_key, b_value, full_start, full_stop, 0, 0, o_key, place, query, d_output,
            constants,
            allowed, None, None, bias, dropout, factor, cap_log2, left, right, sizes,
            DIM, VALUE_DIM, PADDED, VALUE_PADDED, ROWS, False,
        )  # fmt: skip
        state = key_gradient_tiles(
            state, b_key, b_value, start, stop - jump, full_start, jump, o_key, place, query,
            d_output, constants,
            allowed, padding, document, bias, dropout, factor, cap_log2, left, right, sizes,
            DIM, VALUE_DIM, PADDED, VALUE_PADDED, ROWS, True,
        )  # fmt: skip
        b_d_key, b_d_value = state
    store_rows(
        d_key, head_pointer(d_key, batch, kv_head), key_start, n_keys, b_d_key * scale,
        KEYS, PADDED, DIM,
    )  # fmt: skip
    store_rows(
        d_value, head_pointer(d_value, batch, kv_head), key_start, n_keys, b_d_value,
        KEYS, VALUE_PADDED, VALUE_DIM,
    )  # fmt: skip
