"""The backward kernels for query, key and value; no atomics, so that repeats are bit-identical.

``dS_ij = p_ij (dO_i . v_j - delta_i - g_i (s_ij - lse_i))``, one pass for output, entropy and
log-normalizer. As in FlashAttention-2 (Dao 2023, arXiv:2307.08691, Algorithm 2) probabilities are
computed again from the saved log-normalizers; keys and queries are walked by a kernel each.
"""

import triton
import triton.language as tl

from entropy_regularization.attention.triton.primitives import (
    LN_2,
    LOG2_E,
    MASKED_LOG_PROBABILITY,
    add_bias,
    allowed_tile,
    dropout_factor,
    head_pointer,
    key_range,
    load_rows,
    row_range,
    score_gradient,
    store_rows,
    tanh,
)


@triton.jit
def row_constants_kernel(
    output,
    d_output,
    p_entropy,
    p_log_normalizer,
    p_d_entropy,
    p_d_normalizer,
    p_sinks,
    p_delta,
    p_log2_normalizer,
    p_entropy_slope,
    heads,
    n_queries,
    n_blocks,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Collect the terms of dS that belong to a row.

    ``delta_i = dO_i . O_i + g_i (H_i + share of the sink) - (gradient of lse_i)``, the
    log-normalizer in base 2 and ``g_i ln 2``.
    """
    block = tl.program_id(0) % n_blocks
    unit = tl.program_id(0) // n_blocks
    batch = unit // heads
    head = unit % heads
    row = block * ROWS + tl.arange(0, ROWS)
    m_row = row < n_queries
    o_row = unit.to(tl.int64) * n_queries + row
    # [ROWS]
    normalizer = tl.load(p_log_normalizer + o_row, mask=m_row, other=0.0)
    delta = tl.zeros([ROWS], WIDE)
    if d_output is not None:
        # [ROWS, VALUE_PADDED], both
        b_output = load_rows(
            output, head_pointer(output, batch, head), block * ROWS, n_queries,
            ROWS, VALUE_PADDED, VALUE_DIM, True,
        )  # fmt: skip
        b_d_output = load_rows(
            d_output, head_pointer(d_output, batch, head), block * ROWS, n_queries,
            ROWS, VALUE_PADDED, VALUE_DIM, True,
        )  # fmt: skip
        delta += tl.sum(b_output.to(WIDE) * b_d_output.to(WIDE), 1)
    if p_d_entropy is not None:
        bracket = tl.load(p_entropy + o_row, mask=m_row, other=0.0)
        slope = tl.load(p_d_entropy + o_row, mask=m_row, other=0.0)
        if p_sinks is not None:
            bracket += tl.exp2((tl.load(p_sinks + head).to(WIDE) - normalizer) * LOG2_E)
        delta += slope * bracket
        tl.store(p_entropy_slope + o_row, slope * LN_2, mask=m_row)
    if p_d_normalizer is not None:
        delta -= tl.load(p_d_normalizer + o_row, mask=m_row, other=0.0)
    tl.store(p_delta + o_row, delta, mask=m_row)
    # An empty row: all its scores are masked later, so any finite number will do.
    normalizer = tl.where(normalizer == float("-inf"), 0.0, normalizer)
    tl.store(p_log2_normalizer + o_row, normalizer * LOG2_E, mask=m_row)


@triton.jit
def log2_probability_tile(
    b_product,
    log2_normalizer,
    row,
    key,
    place,
    masks,
    bias,
    factor,
    cap_log2,
    left,
    right,
    sizes,
    MASKED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Compute the base-2 log-probabilities of a tile again, and the slope of the softcap (or 1)."""
    batch, head, _ = place
    n_queries, n_keys = sizes
    b_score = b_product * factor
    b_slope = 1.0
    if cap_log2 is not None:
        b_capped = tanh(b_score)
        b_slope = 1.0 - b_capped * b_capped
        b_score = b_capped * cap_log2
    if bias is not None:
        b_score = add_bias(b_score, bias, batch, head, row, key, n_queries, n_keys)
    b_log2_probability = b_score - log2_normalizer
    if bias is not None:
        b_log2_probability = tl.maximum(b_log2_probability, MASKED_LOG_PROBABILITY)
    if EDGE or MASKED:
        m_allowed = allowed_tile(masks, left, right, batch, head, row, key, n_queries, n_keys, EDGE)
        b_log2_probability = tl.where(m_allowed, b_log2_probability, MASKED_LOG_PROBABILITY)
    return b_log2_probability, b_slope


@triton.jit
def load_constants(constants, o_unit, row, n_queries):
    """Load (delta, log-normalizer in base 2, entropy slope) of rows, in the shape of ``row``."""
    p_delta, p_log2_normalizer, p_entropy_slope = constants
    m_row = row < n_queries
    delta = tl.load(p_delta + o_unit + row, mask=m_row, other=0.0)
    log2_normalizer = tl.load(p_log2_normalizer + o_unit + row, mask=m_row, other=0.0)
    entropy_slope = None
    if p_entropy_slope is not None:
        entropy_slope = tl.load(p_entropy_slope + o_unit + row, mask=m_row, other=0.0)
    return delta, log2_normalizer, entropy_slope


@triton.jit
def query_gradient_tiles(
    b_d_query,
    b_query,
    b_d_output,
    row_values,
    start,
    stop,
    row,
    place,
    key,
    value,
    p_key,
    p_value,
    masks,
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
    MASKED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add the key tiles of ``[start, stop)`` to dQ."""
    delta, log2_normalizer, entropy_slope = row_values
    n_keys = sizes[1]
    for key_start in range(start, stop, KEYS):
        # [KEYS, PADDED] and [KEYS, VALUE_PADDED]
        b_key = load_rows(key, p_key, key_start, n_keys, KEYS, PADDED, DIM, EDGE)
        b_value = load_rows(value, p_value, key_start, n_keys, KEYS, VALUE_PADDED, VALUE_DIM, EDGE)
        o_key = (key_start + tl.arange(0, KEYS))[None, :]
        # [ROWS, KEYS], all of them
        b_product = tl.dot(b_query, tl.trans(b_key), input_precision="ieee", out_dtype=delta.dtype)
        b_log2_probability, b_slope = log2_probability_tile(
            b_product, log2_normalizer, row, o_key, place, masks, bias, factor, cap_log2,
            left, right, sizes, MASKED, EDGE,
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


@triton.jit
def query_gradient_kernel(
    query,
    key,
    value,
    d_output,
    d_query,
    constants,
    masks,
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
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute dQ of one block of rows; the grid is ``blocks * batch * heads``."""
    program = tl.program_id(0)
    block = n_blocks - 1 - program % n_blocks
    unit = program // n_blocks
    batch = unit // heads
    head = unit % heads
    row_start = block * ROWS
    row = (row_start + tl.arange(0, ROWS))[:, None]
    p_range = p_ranges
    if p_ranges is not None:
        p_range = p_ranges + (batch.to(tl.int64) * n_blocks + block) * 2

    # [ROWS, PADDED] and [ROWS, VALUE_PADDED]
    b_query = load_rows(
        query, head_pointer(query, batch, head), row_start, n_queries, ROWS, PADDED, DIM, True
    )
    b_d_output = load_rows(
        d_output, head_pointer(d_output, batch, head), row_start, n_queries,
        ROWS, VALUE_PADDED, VALUE_DIM, True,
    )  # fmt: skip
    row_values = load_constants(constants, unit.to(tl.int64) * n_queries, row, n_queries)
    p_key = head_pointer(key, batch, head // group)
    p_value = head_pointer(value, batch, head // group)
    start, full_start, full_stop, stop = key_range(
        row_start, n_queries, n_keys, left, right, p_range, ROWS, KEYS
    )
    place = (batch, head, unit)
    sizes = (n_queries, n_keys)
    b_d_query = tl.zeros([ROWS, PADDED], WIDE)
    if left is not None:
        b_d_query = query_gradient_tiles(
            b_d_query, b_query, b_d_output, row_values, start, full_start, row, place,
            key, value, p_key, p_value, masks, bias, dropout, factor, cap_log2, left, right, sizes,
            DIM, VALUE_DIM, PADDED, VALUE_PADDED, KEYS, MASKED, True,
        )  # fmt: skip
    b_d_query = query_gradient_tiles(
        b_d_query, b_query, b_d_output, row_values, full_start, full_stop, row, place,
        key, value, p_key, p_value, masks, bias, dropout, factor, cap_log2, left, right, sizes,
        DIM, VALUE_DIM, PADDED, VALUE_PADDED, KEYS, MASKED, False,
    )  # fmt: skip
    b_d_query = query_gradient_tiles(
        b_d_query, b_query, b_d_output, row_values, full_stop, stop, row, place,
        key, value, p_key, p_value, masks, bias, dropout, factor, cap_log2, left, right, sizes,
        DIM, VALUE_DIM, PADDED, VALUE_PADDED, KEYS, MASKED, True,
    )  # fmt: skip
    store_rows(
        d_query, head_pointer(d_query, batch, head), row_start, n_queries, b_d_query * scale,
        ROWS, PADDED, DIM,
    )  # fmt: skip


@triton.jit
def key_gradient_tiles(
    state,
    b_key,
    b_value,
    start,
    stop,
    key,
    place,
    query,
    d_output,
    constants,
    masks,
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
    MASKED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add the row tiles of ``[start, stop)`` of one query head to dK and dV.

    Tiles are transposed, ``[KEYS, ROWS]``, so that they feed both products from registers.
    """
    b_d_key, b_d_value = state
    batch, head, unit = place
    n_queries = sizes[0]
    p_query = head_pointer(query, batch, head)
    p_d_output = head_pointer(d_output, batch, head)
    o_unit = unit.to(tl.int64) * n_queries
    for row_start in range(start, stop, ROWS):
        # [ROWS, PADDED] and [ROWS, VALUE_PADDED]
        b_query = load_rows(query, p_query, row_start, n_queries, ROWS, PADDED, DIM, EDGE)
        b_d_output = load_rows(
            d_output, p_d_output, row_start, n_queries, ROWS, VALUE_PADDED, VALUE_DIM, EDGE
        )
        row = (row_start + tl.arange(0, ROWS))[None, :]
        # [1, ROWS], each
        delta, log2_normalizer, entropy_slope = load_constants(constants, o_unit, row, n_queries)
        # [KEYS, ROWS], all of them
        b_product = tl.dot(b_key, tl.trans(b_query), input_precision="ieee", out_dtype=delta.dtype)
        b_log2_probability, b_slope = log2_probability_tile(
            b_product, log2_normalizer, row, key, place, masks, bias, factor, cap_log2,
            left, right, sizes, MASKED, EDGE,
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


@triton.jit
def key_gradient_kernel(
    query,
    key,
    value,
    d_output,
    d_key,
    d_value,
    constants,
    masks,
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
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Compute dK and dV of one block of keys, over all heads that share it.

    The grid is ``blocks * batch * kv_heads``; the first keys of a causal problem, which most rows
    see, start first.
    """
    program = tl.program_id(0)
    block = program % n_blocks
    unit = program // n_blocks
    batch = unit // kv_heads
    kv_head = unit % kv_heads
    key_start = block * KEYS
    o_key = (key_start + tl.arange(0, KEYS))[:, None]
    p_range = p_ranges
    if p_ranges is not None:
        p_range = p_ranges + (batch.to(tl.int64) * n_blocks + block) * 2

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
    sizes = (n_queries, n_keys)
    b_d_key = tl.zeros([KEYS, PADDED], WIDE)
    b_d_value = tl.zeros([KEYS, VALUE_PADDED], WIDE)
    for member in range(group):
        state = (b_d_key, b_d_value)
        head = kv_head * group + member
        place = (batch, head, batch * (kv_heads * group) + head)
        if right is not None:
            state = key_gradient_tiles(
                state, b_key, b_value, start, full_start, o_key, place, query, d_output,
                constants, masks, bias, dropout, factor, cap_log2, left, right, sizes,
                DIM, VALUE_DIM, PADDED, VALUE_PADDED, ROWS, MASKED, True,
            )  # fmt: skip
        state = key_gradient_tiles(
            state, b_key, b_value, full_start, full_stop, o_key, place, query, d_output,
            constants, masks, bias, dropout, factor, cap_log2, left, right, sizes,
            DIM, VALUE_DIM, PADDED, VALUE_PADDED, ROWS, MASKED, False,
        )  # fmt: skip
        state = key_gradient_tiles(
            state, b_key, b_value, full_stop, stop, o_key, place, query, d_output,
            constants, masks, bias, dropout, factor, cap_log2, left, right, sizes,
            DIM, VALUE_DIM, PADDED, VALUE_PADDED, ROWS, MASKED, True,
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
