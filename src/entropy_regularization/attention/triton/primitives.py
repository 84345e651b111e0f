"""Named stages of the kernels, each one step of the derivation in docs/kernel.md.

Every stage works on tiles of either orientation: ``row`` and ``key`` are index tensors whose shapes
broadcast to the tile, ``[rows, 1]`` and ``[1, keys]`` or ``[1, rows]`` and ``[keys, 1]``.

Naming: ``p_`` a pointer, ``b_`` a tile in registers, ``m_`` a boolean tile, ``o_`` an offset. A
*view* is ``(pointer, batch stride, head stride, row stride, column stride)``, in elements; that of
a bias and of a dense mask goes on with the number of keys. Scores and log-probabilities are in base
2, because the hardware's exponential is.
"""

import triton
import triton.language as tl

# A masked score stays finite, because 0 * -inf in the sum of p (s - m) is NaN.
MASKED_SCORE = tl.constexpr(-1e30)
# A row whose largest score lies below this sees no key.
EMPTY_ROW = tl.constexpr(-5e29)
# 2^-2000 is 0, yet its product with any gradient of the entropy is finite.
MASKED_LOG_PROBABILITY = tl.constexpr(-2000.0)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments that change with the length of a batch and help no code: a kernel is not compiled again
# because one of them is 1 or a multiple of 16.
CHANGING = ("heads", "kv_heads", "left", "right", "n_keys", "n_blocks")


@triton.jit
def head_pointer(view, batch, head):
    """Point to the first element of one head; 64-bit, because tensors may exceed 2^31 elements."""
    return view[0] + tl.cast(batch, tl.int64) * view[1] + tl.cast(head, tl.int64) * view[2]


@triton.jit
def with_known_strides(view, STRIDES_BY_8: tl.constexpr):
    """Tell the compiler that the strides of a view are multiples of 8, if they are.

    It sees by itself only that one is 1 or a multiple of 16. Without, rows of a width like 72 are
    loaded an element at a time, and not ahead.
    """
    if STRIDES_BY_8:
        view = (view[0], view[1] // 8 * 8, view[2] // 8 * 8, view[3] // 8 * 8, view[4])
    return view


@triton.jit
def tile_pointers(view, p_head, start, LENGTH: tl.constexpr, PADDED: tl.constexpr):
    """Point to ``[LENGTH, PADDED]`` elements of a head, from row ``start``."""
    o_row = tl.arange(0, LENGTH).to(tl.int64)[:, None] * view[3]
    o_column = tl.arange(0, PADDED).to(tl.int64)[None, :] * view[4]
    return p_head + tl.cast(start, tl.int64) * view[3] + o_row + o_column


@triton.jit
def tile_inside(
    start,
    n,
    LENGTH: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
):
    """Tell which elements of a tile exist: rows below ``n``, columns below ``DIM``."""
    m_row = (start + tl.arange(0, LENGTH) < n)[:, None]
    return m_row & (tl.arange(0, PADDED) < DIM)[None, :]


@triton.jit
def load_rows(
    view,
    p_head,
    start,
    n,
    LENGTH: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Load ``[LENGTH, PADDED]``, zeros outside; without ``CHECK`` all rows are known to exist."""
    pointers = tile_pointers(view, p_head, start, LENGTH, PADDED)
    if CHECK:
        tile = tl.load(pointers, mask=tile_inside(start, n, LENGTH, PADDED, DIM), other=0.0)
    elif DIM != PADDED:
        tile = tl.load(pointers, mask=(tl.arange(0, PADDED) < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    view,
    p_head,
    start,
    n,
    tile,
    LENGTH: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
):
    """Store ``[LENGTH, PADDED]``, only what exists, rounded to the tensor's dtype."""
    pointers = tile_pointers(view, p_head, start, LENGTH, PADDED)
    inside = tile_inside(start, n, LENGTH, PADDED, DIM)
    tl.store(pointers, tile.to(view[0].dtype.element_ty), mask=inside)


@triton.jit
def key_range(
    row_start,
    n_queries,
    n_keys,
    left,
    right,
    p_range,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the key tiles that a block of rows meets, as tile_range does.

    What no row sees is never touched. Full tiles lie wholly within the tensor, within left and
    right of every row and within one document without padding: only a dense mask may cut them.
    """
    first = row_start + n_keys - n_queries  # position of the block's first row among the keys
    last = tl.minimum(row_start + ROWS, n_queries) - 1 + n_keys - n_queries
    start = first * 0
    full_start = first * 0
    stop = first * 0 + n_keys
    full_stop = first * 0 + n_keys
    if left is not None:
        start = tl.maximum(first - left, 0)
        full_start = tl.maximum(last - left, 0)
    if right is not None:
        stop = tl.minimum(last + right + 1, n_keys)
        full_stop = tl.minimum(first + right + 1, n_keys)
    return tile_range(start, full_start, full_stop, stop, p_range, KEYS)


@triton.jit
def row_range(
    key_start,
    n_queries,
    n_keys,
    left,
    right,
    p_range,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Return the row tiles that see a block of keys, as tile_range does."""
    first = key_start - n_keys + n_queries  # the row that stands at the block's first key
    last = tl.minimum(key_start + KEYS, n_keys) - 1 - n_keys + n_queries
    start = first * 0
    full_start = first * 0
    stop = first * 0 + n_queries
    full_stop = first * 0 + n_queries
    if right is not None:
        start = tl.maximum(first - right, 0)
        full_start = tl.maximum(last - right, 0)
    if left is not None:
        stop = tl.minimum(last + left + 1, n_queries)
        full_stop = tl.minimum(first + left + 1, n_queries)
    return tile_range(start, full_start, full_stop, stop, p_range, ROWS)


@triton.jit
def tile_range(start, full_start, full_stop, stop, p_range, STEP: tl.constexpr):
    """Narrow ranges by what padding and documents leave, and round them to tiles.

    ``p_range`` points to the four numbers of skipping.visible_keys or _rows, or is None. Returns
    (start, full_start, full_stop, stop). A kernel walks over the full tiles, then over both ends
    in one loop: its positions from the ``gap`` at full_start on stand for one ``jump`` further.
    """
    if p_range is not None:
        start = tl.maximum(start, tl.load(p_range))
        full_start = tl.maximum(full_start, tl.load(p_range + 1))
        full_stop = tl.minimum(full_stop, tl.load(p_range + 2))
        stop = tl.minimum(stop, tl.load(p_range + 3))
    start = start // STEP * STEP
    stop = tl.maximum(stop, start)
    full_start = (tl.maximum(full_start, start) + STEP - 1) // STEP * STEP
    # All multiples, also where nothing is full: so the compiler knows how rows are aligned.
    full_start = tl.minimum(full_start, (stop + STEP - 1) // STEP * STEP)
    full_stop = tl.maximum(tl.minimum(full_stop, stop), 0) // STEP * STEP
    full_stop = tl.maximum(full_stop, full_start)
    return start, full_start, full_stop, stop


@triton.jit
def tanh(x):
    """Hyperbolic tangent, relative error below 4e-7.

    ``(1 - e)/(1 + e)`` cancels near zero, where the odd series takes over.
    """
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def add_bias(b_score, bias, batch, head, row, key, n_queries):
    """Add the bias to base-2 scores; an entry of -inf masks its key."""
    p_bias = head_pointer(bias, batch, head)
    pointers = p_bias + row.to(tl.int64) * bias[3] + key.to(tl.int64) * bias[4]
    # b_bias: [rows, keys] or [keys, rows]
    b_bias = tl.load(pointers, mask=(row < n_queries) & (key < bias[5]), other=0.0)
    return at_least(b_score + b_bias.to(b_score.dtype) * LOG2_E, MASKED_SCORE)


@triton.jit
def at_least(x, LOWEST: tl.constexpr):
    """Bound from below; NaN stays, which a GPU's plain maximum would take for the lowest."""
    return tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def allowed_tile(
    allowed,
    padding,
    document,
    left,
    right,
    batch,
    head,
    row,
    key,
    n_queries,
    n_keys,
    EDGE: tl.constexpr,
):
    """Tell which scores of a tile count (masking.tile_allowed).

    ``EDGE``: left, right or the last key may cut the tile. Rows past the end need no mask: their
    queries and gradients were loaded as zeros, so nothing comes of them.
    """
    position = row + n_keys - n_queries
    m_allowed = tl.full([1, 1], True, tl.int1)
    if EDGE:
        # one comparison a score and side: the last key that a row may see is a number of the row
        last = n_keys - 1
        if right is not None:
            last = tl.minimum(position + right, last)
        m_allowed = key <= last
        if left is not None:
            m_allowed = m_allowed & (key >= position - left)
    if padding is not None:
        p_padding = padding[0] + tl.cast(batch, tl.int64) * padding[1]
        # [1, keys] or [keys, 1]
        b_real = tl.load(p_padding + key.to(tl.int64) * padding[2], mask=key < n_keys, other=0)
        m_allowed = m_allowed & (b_real != 0)
    if document is not None:
        p_document = document[0] + tl.cast(batch, tl.int64) * document[1]
        o_row = position.to(tl.int64) * document[2]
        # [rows, 1] and [1, keys], or the reverse
        b_mine = tl.load(p_document + o_row, mask=row < n_queries, other=0)
        b_theirs = tl.load(p_document + key.to(tl.int64) * document[2], mask=key < n_keys, other=0)
        m_allowed = m_allowed & (b_mine == b_theirs)
    if allowed is not None:
        p_allowed = head_pointer(allowed, batch, head)
        o_pair = row.to(tl.int64) * allowed[3] + key.to(tl.int64) * allowed[4]
        # [rows, keys] or [keys, rows]
        b_dense = tl.load(p_allowed + o_pair, mask=(row < n_queries) & (key < allowed[5]), other=0)
        m_allowed = m_allowed & (b_dense != 0)
    return m_allowed


@triton.jit
def dropout_factor(dropout, unit, row, key):
    """Draw 0 or 1/(1 - rate) for every score of a tile; ``unit`` numbers (batch, head).

    The random numbers are a function of the seed and the place (Philox 4x32, Salmon et al. 2011),
    so that forward and backward draw the same ones whatever their tiles. Seven rounds are the
    fewest that pass BigCrush there.
    """
    seed, rate, inverse_keep = dropout
    o_row = row.to(tl.uint32)
    o_key = key.to(tl.uint32)
    bits, _, _, _ = tl.philox(tl.load(seed), o_key, o_row, tl.cast(unit, tl.uint32), 0, n_rounds=7)
    uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)  # [0, 1), 24 bits
    return tl.where(uniform >= rate, inverse_keep, 0.0)


@triton.jit
def online_update(largest, total, weighted, new, b_shifted):
    """Take a tile of scores into (l, t) = (sum 2^(s-m), sum 2^(s-m) (s-m)).

    The maximum was ``largest`` and is ``new``; ``b_shifted`` = s - new. Returns the new (l, t), the
    factor that brings older sums to the new maximum, and the tile of 2^(s - m).
    """
    shift = largest - new
    decay = tl.exp2(shift)
    b_weight = tl.exp2(b_shifted)
    # the entropy's whole cost in the forward pass: one multiply-add a score
    weighted = decay * (weighted + shift * total) + tl.sum(b_weight * b_shifted, 1)
    total = decay * total + tl.sum(b_weight, 1)
    return total, weighted, decay, b_weight


@triton.jit
def finish_row(largest, total, weighted):
    """Turn (m, l, t) into entropy (nats) and log-normalizer (base 2), before any sink."""
    log_total = tl.log2(total)
    entropy = (log_total - weighted / total) * LN_2
    return entropy, largest + log_total


@triton.jit
def join_sink(entropy, log2_normalizer, sink_log2):
    """Let a sink take its share of a row; return (entropy, log-normalizer in base 2, share left).

    ``log2_share`` comes from the difference of the two logits alone, because subtracting two
    log-normalizers would cancel.
    """
    difference = sink_log2 - log2_normalizer
    log2_share = -(tl.maximum(difference, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(difference))))
    share = tl.exp2(log2_share)
    # beside a sink of infinity: 0 * -inf would be NaN
    finite = at_least(log2_share, MASKED_LOG_PROBABILITY)
    return share * (entropy - finite * LN_2), log2_normalizer - log2_share, share


@triton.jit
def score_gradient(b_log2_probability, b_weight_gradient, delta, entropy_slope):
    """Return dS = p (dP - delta - g (s - lse)), with ``entropy_slope`` = g ln 2, and p.

    One multiply-add a score more than attention without entropy; none where ``entropy_slope`` is
    None because nothing flows back through the entropy.
    """
    b_probability = tl.exp2(b_log2_probability)
    b_inner = b_weight_gradient - delta
    if entropy_slope is not None:
        b_inner = b_inner - entropy_slope * b_log2_probability
    return b_probability * b_inner, b_probability
