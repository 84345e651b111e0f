"""What every backward kernel shares: constants of a row, and probabilities computed again.

As in FlashAttention-2 (Dao 2023, arXiv:2307.08691, Algorithm 2) probabilities come again from the
saved log-normalizers.
"""

import triton
import triton.language as tl

from entropy_regularization.attention.triton.primitives import (
    CHANGING,
    LN_2,
    LOG2_E,
    MASKED_LOG_PROBABILITY,
    add_bias,
    allowed_tile,
    at_least,
    head_pointer,
    load_rows,
    tanh,
    with_known_strides,
)


@triton.jit(do_not_specialize=CHANGING)
def row_constants_kernel(
    output,
    d_output,
    p_entropy,
    p_saved_normalizer,
    p_d_entropy,
    p_d_normalizer,
    p_sinks,
    constants,
    heads,
    n_queries,
    n_blocks,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    STRIDES_BY_8: tl.constexpr,
):
    """Collect the terms of dS that belong to a row.

    ``delta_i = dO_i . O_i + g_i (H_i + share of the sink) - (gradient of lse_i)``, the
    log-normalizer in base 2 (finite) and ``g_i ln 2``. The saved log-normalizer is in base 2, -inf
    for a row without a key: no gradient flows through it; that of its sink is added by itself. It
    is inf beside a sink of infinity, which leaves nothing to the keys.
    ``constants`` are what is filled and the distance from head to head, a multiple of 16.
    """
    p_delta, p_log2_normalizer, p_entropy_slope, stride = constants
    block = tl.program_id(0) % n_blocks
    unit = tl.program_id(0) // n_blocks
    batch = unit // heads
    head = unit % heads
    row = block * ROWS + tl.arange(0, ROWS)
    m_row = row < n_queries
    o_row = unit.to(tl.int64) * n_queries + row
    o_constant = unit.to(tl.int64) * stride + row
    # [ROWS]
    normalizer = tl.load(p_saved_normalizer + o_row, mask=m_row, other=0.0)
    empty = normalizer == float("-inf")
    alone = tl.abs(normalizer) == float("inf")  # a sink, if there is one, has all of the row
    delta = tl.zeros([ROWS], WIDE)
    if d_output is not None:
        output = with_known_strides(output, STRIDES_BY_8)
        d_output = with_known_strides(d_output, STRIDES_BY_8)
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
        slope = tl.where(empty, 0.0, tl.load(p_d_entropy + o_row, mask=m_row, other=0.0))
        if p_sinks is not None:
            log2_share = tl.load(p_sinks + head).to(WIDE) * LOG2_E - normalizer
            bracket += tl.where(alone, 1.0, tl.exp2(log2_share))
        delta += slope * bracket
        tl.store(p_entropy_slope + o_constant, slope * LN_2, mask=m_row)
    if p_d_normalizer is not None:
        d_normalizer = tl.load(p_d_normalizer + o_row, mask=m_row, other=0.0)
        delta -= tl.where(empty, 0.0, d_normalizer)
    tl.store(p_delta + o_constant, delta, mask=m_row)
    # Beyond every score, and its product with any gradient of the entropy is finite.
    tl.store(p_log2_normalizer + o_constant, tl.where(alone, 1e22, normalizer), mask=m_row)


@triton.jit
def log2_probability_tile(
    b_product,
    log2_normalizer,
    row,
    key,
    place,
    allowed,
    padding,
    document,
    bias,
    factor,
    cap_log2,
    left,
    right,
    sizes,
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
        b_score = add_bias(b_score, bias, batch, head, row, key, n_queries)
    b_log2_probability = b_score - log2_normalizer
    if bias is not None:
        b_log2_probability = at_least(b_log2_probability, MASKED_LOG_PROBABILITY)
    if EDGE or allowed is not None:
        m_allowed = allowed_tile(
            allowed, padding, document, left, right, batch, head, row, key, n_queries, n_keys, EDGE
        )
        b_log2_probability = tl.where(m_allowed, b_log2_probability, MASKED_LOG_PROBABILITY)
    return b_log2_probability, b_slope


@triton.jit
def load_constants(
    constants,
    o_unit,
    start,
    n_queries,
    ROWS: tl.constexpr,
    AXIS: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Load (delta, log-normalizer in base 2) of ``ROWS`` rows.

    ``constants`` are launch.RowConstants; ``o_unit`` is where the rows of a head begin in them.
    The slope of the entropy is loaded by itself, if there is one: no function of a kernel can
    return None. They are read as vectors and then given a dimension at ``AXIS``: read in the shape
    of a tile, every thread would copy what it needs by itself.
    """
    p_delta, p_log2_normalizer, _, _ = constants
    delta = load_constant(p_delta, o_unit, start, n_queries, ROWS, AXIS, CHECK)
    log2_normalizer = load_constant(p_log2_normalizer, o_unit, start, n_queries, ROWS, AXIS, CHECK)
    return delta, log2_normalizer


@triton.jit
def load_constant(
    pointer,
    o_unit,
    start,
    n_queries,
    ROWS: tl.constexpr,
    AXIS: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Load one number a row; without ``CHECK`` all rows are known to exist."""
    # The tile's start is added to the pointer first: what is left are constants of the code.
    p_tile = pointer + (o_unit + start)
    o_row = tl.arange(0, ROWS)
    if CHECK:
        constant = tl.load(p_tile + o_row, mask=start + o_row < n_queries, other=0.0)
    else:
        constant = tl.load(p_tile + o_row)
    return tl.expand_dims(constant, AXIS)
