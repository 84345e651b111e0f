"""The forward kernel: output, entropy, log-normalizer and largest score in one pass.

One program holds a block of rows and walks over the tiles of keys that these may see, as in
FlashAttention-2 (Dao 2023, arXiv:2307.08691, Algorithm 1), with ``t`` beside ``m`` and ``l``.
"""

import triton
import triton.language as tl

from entropy_regularization.attention.triton.primitives import (
    CHANGING,
    EMPTY_ROW,
    LN_2,
    LOG2_E,
    MASKED_SCORE,
    add_bias,
    allowed_tile,
    dropout_factor,
    finish_row,
    head_pointer,
    join_sink,
    key_range,
    load_rows,
    online_update,
    store_rows,
    tanh,
    with_known_strides,
)


@triton.jit
def forward_tiles(
    state,
    b_query,
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
    """Take the key tiles of ``[start, stop)`` into (m, l, t, accumulator).

    ``gap`` and ``jump``: see tile_range.
    """
    largest, total, weighted, b_sum = state
    batch, head, unit = place
    n_queries, n_keys = sizes
    for place_in_range in range(start, stop, KEYS):
        key_start = place_in_range
        if EDGE:
            key_start += tl.where(place_in_range < gap, 0, jump)
        # [KEYS, PADDED]
        b_key = load_rows(key, p_key, key_start, n_keys, KEYS, PADDED, DIM, EDGE)
        # [ROWS, KEYS]
        b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee", out_dtype=largest.dtype)
        o_key = (key_start + tl.arange(0, KEYS))[None, :]
        if cap_log2 is None and bias is None and not EDGE and allowed is None:
            # only the largest score of a row is scaled by itself, all in a multiply-add
            new = tl.maximum(largest, tl.max(b_score, 1) * factor)
            b_shifted = b_score * factor - new[:, None]
        else:
            b_score = b_score * factor
            if cap_log2 is not None:
                b_score = tanh(b_score) * cap_log2
            if bias is not None:
                b_score = add_bias(b_score, bias, batch, head, row, o_key, n_queries)
            if EDGE or allowed is not None:
                m_allowed = allowed_tile(
                    allowed, padding, document, left, right, batch, head, row, o_key,
                    n_queries, n_keys, EDGE,
                )  # fmt: skip
                b_score = tl.where(m_allowed, b_score, MASKED_SCORE)
            new = tl.maximum(largest, tl.max(b_score, 1))
            b_shifted = b_score - new[:, None]
        total, weighted, decay, b_weight = online_update(largest, total, weighted, new, b_shifted)
        largest = new
        if dropout is not None:
            b_weight = b_weight * dropout_factor(dropout, unit, row, o_key)
        # [KEYS, VALUE_PADDED]
        b_value = load_rows(value, p_value, key_start, n_keys, KEYS, VALUE_PADDED, VALUE_DIM, EDGE)
        b_sum = b_sum * decay[:, None]
        b_sum = tl.dot(
            b_weight.to(b_value.dtype), b_value, b_sum,
            input_precision="ieee", out_dtype=b_sum.dtype,
        )  # fmt: skip
    return largest, total, weighted, b_sum


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(
    query,
    key,
    value,
    output,
    p_entropy,
    p_log_normalizer,
    p_max_score,
    p_log2_normalizer,
    allowed,
    padding,
    document,
    bias,
    p_sinks,
    dropout,
    p_ranges,
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
    WIDE: tl.constexpr,
    STRIDES_BY_8: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    """Compute one block of rows of one head; the grid is ``blocks * batch * heads``.

    ``factor`` is not negative; ``NEGATIVE`` says that the sign belongs to the query.
    """
    query = with_known_strides(query, STRIDES_BY_8)
    key = with_known_strides(key, STRIDES_BY_8)
    value = with_known_strides(value, STRIDES_BY_8)
    output = with_known_strides(output, STRIDES_BY_8)
    program = tl.program_id(0)
    # The last rows of a causal problem see most keys; they start first.
    block = n_blocks - 1 - program % n_blocks
    unit = program // n_blocks
    batch = unit // heads
    head = unit % heads
    row_start = block * ROWS
    row = (row_start + tl.arange(0, ROWS))[:, None]
    p_range = p_ranges
    if p_ranges is not None:
        p_range = p_ranges + (batch.to(tl.int64) * n_blocks + block) * 4

    # [ROWS, PADDED]
    b_query = load_rows(
        query, head_pointer(query, batch, head), row_start, n_queries, ROWS, PADDED, DIM, True
    )
    if NEGATIVE:
        b_query = (b_query.to(WIDE) * -1.0).to(b_query.dtype)
    p_key = head_pointer(key, batch, head // group)
    p_value = head_pointer(value, batch, head // group)
    start, full_start, full_stop, stop = key_range(
        row_start, n_queries, n_keys, left, right, p_range, ROWS, KEYS
    )
    jump = full_stop - full_start
    state = (
        tl.full([ROWS], MASKED_SCORE, WIDE),
        tl.zeros([ROWS], WIDE),
        tl.zeros([ROWS], WIDE),
        tl.zeros([ROWS, VALUE_PADDED], WIDE),
    )
    place = (batch, head, unit)
    sizes = (n_queries, n_keys)
    state = forward_tiles(
        state, b_query, full_start, full_stop, 0, 0, row, place, key, value, p_key, p_value,
        allowed, None, None, bias,
        dropout, factor, cap_log2, left, right, sizes,
        DIM, VALUE_DIM, PADDED, VALUE_PADDED, KEYS, False,
    )  # fmt: skip
    state = forward_tiles(
        state, b_query, start, stop - jump, full_start, jump, row, place, key, value,
        p_key, p_value, allowed, padding, document, bias,
        dropout, factor, cap_log2, left, right, sizes,
        DIM, VALUE_DIM, PADDED, VALUE_PADDED, KEYS, True,
    )  # fmt: skip
    largest, total, weighted, b_sum = state

    # The maximum of a GPU passes over NaN, the sum does not.
    largest += total * 0.0
    empty = largest < EMPTY_ROW
    total = tl.where(largest >= EMPTY_ROW, total, 1.0)
    entropy, log2_normalizer = finish_row(largest, total, weighted)
    share = tl.where(empty, 0.0, 1.0 / total)
    if p_sinks is not None:
        sink_log2 = tl.load(p_sinks + head).to(WIDE) * LOG2_E
        entropy, log2_normalizer, left_over = join_sink(entropy, log2_normalizer, sink_log2)
        of_empty = sink_log2
        share = tl.where(empty, 0.0, share * left_over)
    else:
        of_empty = float("-inf")
    o_row = unit.to(tl.int64) * n_queries + row_start + tl.arange(0, ROWS)
    m_row = row_start + tl.arange(0, ROWS) < n_queries
    # For backward: a large log-normalizer loses digits on its way to nats and back.
    b_kept = tl.where(empty, float("-inf"), log2_normalizer)
    tl.store(p_log2_normalizer + o_row, b_kept, mask=m_row)
    log2_normalizer = tl.where(empty, of_empty, log2_normalizer)
    tl.store(p_entropy + o_row, tl.where(empty, 0.0, entropy), mask=m_row)
    tl.store(p_log_normalizer + o_row, log2_normalizer * LN_2, mask=m_row)
    tl.store(p_max_score + o_row, tl.where(empty, float("-inf"), largest * LN_2), mask=m_row)
    store_rows(
        output, head_pointer(output, batch, head), row_start, n_queries, b_sum * share[:, None],
        ROWS, VALUE_PADDED, VALUE_DIM,
    )  # fmt: skip
