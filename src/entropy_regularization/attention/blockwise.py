"""Attention with entropy in linear memory: pure PyTorch, any device, own backward.

A block of rows meets all the keys it may see at once, so a row needs no second pass and no
rescaling; what the structure excludes (the future, the keys outside a window, padding at either
end, other documents) is never computed. Scores live in three scratch buffers that every block
reuses. See docs/attention.md for what was tried and what each choice gave.

Inside this file scores and log-probabilities are in base 2 (names end in ``_log2``): exp of a
number that underflows costs ten times as much as any other on a CPU, exp2 costs always the same.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_regularization.attention.masking import (
    Structure,
    Tile,
    edge_masks,
    tile_allowed,
    visible_keys,
)

LOG2_E = 1.0 / math.log(2.0)
LN_2 = math.log(2.0)

# A masked score stays finite, because 0 * -inf in the sum of p (s - m) is NaN.
MASKED_SCORE = -1e30
EMPTY_ROW = -5e29  # a row whose largest score lies below this sees no key
# 2^-2000 is 0 in float32 and float64; kept small so that its product with any gradient is finite.
MASKED_LOG_PROBABILITY = -2000.0

# Elements of one score buffer: three of them should stay near the second-level cache.
SCRATCH_ELEMENTS = 1_000_000


class Problem(NamedTuple):
    """The inputs of one attention call, validated."""

    query: Tensor
    key: Tensor
    value: Tensor
    structure: Structure
    scale: float
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of scores and sums: at least float32."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def group(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)


class Chunk(NamedTuple):
    """Some key heads of some batch entries; they are multiplied in one batched product."""

    batches: slice
    heads: slice  # of keys; the query heads are group times as many

    def of(self, tensor: Tensor, group: int) -> Tensor:
        """Cut a ``[#batch, #query heads, ...]`` tensor to ``[#b, #h, group or 1, ...]``."""
        if tensor.shape[0] != 1:
            tensor = tensor[self.batches]
        if tensor.shape[1] == 1:
            return tensor[:, :, None]
        shape = (tensor.shape[0], tensor.shape[1] // group, group, *tensor.shape[2:])
        grouped = tensor.view(shape)
        return grouped[:, self.heads]


class Blocks(NamedTuple):
    """How the work is cut: rows in a block, (batch, key head) pairs in a chunk, most keys."""

    rows: int
    batches: int
    heads: int
    keys: int


def choose_blocks(problem: Problem) -> Blocks:
    """Choose blocks that keep the score buffers near the cache and both cores busy."""
    batch, kv_heads, n_keys, _ = problem.key.shape
    n_queries, group = problem.query.shape[2], problem.group
    left, right = problem.structure.left, problem.structure.right
    rows = min(max(16, (64 if n_keys <= 2048 else 128) // group), max(n_queries, 1))
    if left is not None and right is not None:
        n_keys = min(n_keys, left + right + rows)
    whole = batch * kv_heads * group * n_queries * n_keys
    if whole <= SCRATCH_ELEMENTS // 4:
        return Blocks(max(n_queries, 1), max(batch, 1), max(kv_heads, 1), n_keys)
    units = max(2, SCRATCH_ELEMENTS // max(group * rows * n_keys, 1))
    if units >= kv_heads:
        return Blocks(rows, min(max(units // kv_heads, 1), batch), kv_heads, n_keys)
    return Blocks(rows, 1, units, n_keys)


def chunks_of(problem: Problem, blocks: Blocks) -> Iterator[Chunk]:
    """Walk over (batch, key head) pairs, a chunk at a time."""
    batch, kv_heads = problem.key.shape[:2]
    for b in range(0, batch, blocks.batches):
        for h in range(0, kv_heads, blocks.heads):
            yield Chunk(
                slice(b, min(b + blocks.batches, batch)), slice(h, min(h + blocks.heads, kv_heads))
            )


class Scratch:
    """Buffers that every block of rows reuses.

    A buffer of scores is made once for the largest block: causal blocks see more and more keys, and
    a new buffer for each costs more page faults than the softmax costs time.
    """

    def __init__(self, problem: Problem, blocks: Blocks) -> None:
        self._like, self._dtype = problem.query, problem.wide
        units = min(blocks.batches * blocks.heads, problem.key.shape[0] * problem.key.shape[1])
        self._scores = units * problem.group * blocks.rows * blocks.keys
        widest = max(problem.key.shape[-1], problem.value.shape[-1])
        self._room = {"output": 0, "product": units * blocks.keys * widest}
        self._buffers: dict[str, Tensor] = {}
        self._edges: dict[tuple[int, ...], list[tuple[slice, Tensor]]] = {}

    def edges(
        self, structure: Structure, tile: Tile, n_queries: int, n_keys: int, device: torch.device
    ) -> list[tuple[slice, Tensor]]:
        """Return edge_masks; tiles that lie alike on the diagonal share them."""
        if structure.left is None and structure.right is None:
            return []
        rows, keys = tile.row_stop - tile.row_start, tile.key_stop - tile.key_start
        if structure.left is not None or structure.right is None:
            place = (rows, keys, tile.row_start - tile.key_start)
            if place not in self._edges:
                self._edges[place] = list(edge_masks(structure, tile, n_queries, n_keys, device))
            return self._edges[place]
        # Causal: only the columns near the diagonal are cut, wherever the block begins.
        inside = tile.row_start + n_keys - n_queries + structure.right + 1 - tile.key_start
        cut = keys - min(max(inside, 0), keys)
        place = (rows, cut, tile.row_start - tile.key_stop)
        if place not in self._edges:
            self._edges[place] = list(edge_masks(structure, tile, n_queries, n_keys, device))
        return [(slice(keys - cut, keys), outside) for _, outside in self._edges[place]]

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a contiguous, uninitialised tensor that lives until the name is taken again."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            room = max(size, self._room.get(name, self._scores))
            buffer = self._like.new_empty(room, dtype=self._dtype)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


class ChunkView:
    """One chunk of a problem: its keys and values ready to multiply, and its blocks of rows."""

    def __init__(self, problem: Problem, chunk: Chunk, scratch: Scratch) -> None:
        self.problem, self.chunk, self.scratch = problem, chunk, scratch
        self.structure = problem.structure.of_batches(chunk.batches)
        inner = self.structure._replace(left=None, right=None)
        self.inner = None if inner == Structure() else inner  # what no edge of a tile says
        key = problem.key[chunk.batches, chunk.heads]
        self.shape = (key.shape[0], key.shape[1], problem.group)
        self.units = key.shape[0] * key.shape[1]
        self.query = self.by_unit(problem.query).to(problem.wide)
        self.bias = None if problem.bias is None else self.cut(problem.bias)
        self.key = self._units(key)
        self.value = self._units(problem.value[chunk.batches, chunk.heads])
        # Contiguous transposes: the products with them are a tenth faster. The scale is folded
        # into the keys, once a chunk, so that blocks of queries are views.
        factor = problem.scale * (LOG2_E if problem.softcap is None else 1.0 / problem.softcap)
        key_t = self.key.transpose(1, 2)
        self.key_t = torch.mul(key_t, factor, out=key_t.new_empty(key_t.shape))

    def _units(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.problem.wide).flatten(0, 1)

    def cut(self, tensor: Tensor) -> Tensor:
        """Cut ``[batch, query heads, ...]`` to this chunk's ``[b, h, group, ...]``."""
        return self.chunk.of(tensor, self.problem.group)

    def by_unit(self, tensor: Tensor) -> Tensor:
        """Cut ``[batch, query heads, queries, dim]`` to ``[units, group, queries, dim]``."""
        return self.cut(tensor).flatten(0, 1)

    def rows(self, cut: Tensor, tile: Tile) -> Tensor:
        """Take a block of rows of ``[units, group, queries, dim]`` as ``[units, rows, dim]``."""
        return cut[:, :, tile.row_start : tile.row_stop].flatten(1, 2)

    def put(self, cut: Tensor, tile: Tile, block: Tensor) -> None:
        """Write ``[units, rows, dim]`` into a block of rows of ``[units, group, queries, dim]``."""
        target = cut[:, :, tile.row_start : tile.row_stop]
        target.copy_(block.view(target.shape))

    def scores(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Return ``[units, rows, keys]`` scores in base 2, unmasked, and their tanh if capped."""
        problem = self.problem
        query = self.rows(self.query, tile)
        keys = self.key_t[:, :, tile.key_start : tile.key_stop]
        score = self.scratch.take("score", *query.shape[:2], keys.shape[2])
        torch.bmm(query, keys, out=score)
        capped = None
        if problem.softcap is not None:
            capped = self.scratch.take("capped", *score.shape)
            torch.tanh(score, out=capped)
            torch.mul(capped, problem.softcap * LOG2_E, out=score)
        if self.bias is not None:
            self.per_head(score, tile).add_(tile.crop(self.bias), alpha=LOG2_E)
            score.clamp_(min=MASKED_SCORE)  # -inf in a bias masks its key
        return score, capped

    def per_head(self, score: Tensor, tile: Tile) -> Tensor:
        """View ``[units, group rows, keys]`` as ``[b, h, group, rows, keys]``."""
        return score.view(*self.shape, tile.row_stop - tile.row_start, score.shape[-1])

    def fill_masked(self, score: Tensor, tile: Tile, fill: float) -> None:
        """Overwrite the scores of keys that are not allowed."""
        problem = self.problem
        sizes = problem.query.shape[2], problem.key.shape[2]
        edges = self.scratch.edges(self.structure, tile, *sizes, score.device)
        if edges:
            heads = score.view(-1, tile.row_stop - tile.row_start, score.shape[-1])
            for keys, outside in edges:
                heads[:, :, keys].masked_fill_(outside, fill)
        if self.inner is None:
            return
        allowed = tile_allowed(self.inner, tile, *sizes, score.device)
        if allowed is not None:
            everyone = self.chunk._replace(batches=slice(None))
            self.per_head(score, tile).masked_fill_(~everyone.of(allowed, problem.group), fill)

    def keep(self, tile: Tile, like: Tensor) -> Tensor | None:
        """Draw the dropout factors of a tile: 0 or 1/(1-rate), the same in forward and backward."""
        problem = self.problem
        if problem.seed is None:
            return None
        where = (self.chunk.batches.start, self.chunk.heads.start, tile.row_start)
        seed = hash((int(problem.seed.item()), *where)) & 0x7FFF_FFFF_FFFF_FFFF
        generator = torch.Generator(like.device).manual_seed(seed)
        keep = self.scratch.take("keep", *like.shape)
        keep.bernoulli_(1.0 - problem.dropout, generator=generator)
        return keep.div_(1.0 - problem.dropout)


def row_blocks(view: ChunkView, blocks: Blocks) -> Iterator[Tile]:
    """Walk over the rows, a block at a time, each with the keys that any of its rows may see."""
    n_queries, n_keys = view.problem.query.shape[2], view.problem.key.shape[2]
    for start in range(0, n_queries, blocks.rows):
        stop = min(start + blocks.rows, n_queries)
        yield Tile(start, stop, *visible_keys(view.structure, start, stop, n_queries, n_keys))


def forward(
    problem: Problem,
) -> tuple[
    Float[Tensor, "batch heads queries value_dim"],
    Float[Tensor, "batch heads queries"],
    Float[Tensor, "batch heads queries"],
    Float[Tensor, "batch heads queries"],
]:
    """Return output, entropy, log-normalizer and largest score of every row."""
    row_shape = problem.query.shape[:3]
    output = problem.query.new_empty(*row_shape, problem.value.shape[-1])
    statistics = problem.query.new_empty(*row_shape, 3, dtype=problem.wide)
    blocks = choose_blocks(problem)
    scratch = Scratch(problem, blocks)
    for chunk in chunks_of(problem, blocks):
        view = ChunkView(problem, chunk, scratch)
        targets = view.by_unit(output), view.by_unit(statistics)
        for tile in row_blocks(view, blocks):
            if tile.key_start == tile.key_stop:
                for target, nothing in zip(targets, (0.0, MASKED_SCORE), strict=True):
                    target[:, :, tile.row_start : tile.row_stop].fill_(nothing)
                continue
            for target, block in zip(targets, _forward_block(view, tile), strict=True):
                view.put(target, tile, block)
    return output, *_finish(problem, output, *statistics.unbind(-1))


def _forward_block(view: ChunkView, tile: Tile) -> tuple[Tensor, Tensor]:
    """Return a block's output, and (m, l, t) of MATHEMATICS in base 2, ``[units, rows, 3]``."""
    score, _ = view.scores(tile)
    view.fill_masked(score, tile, MASKED_SCORE)
    largest = score.amax(-1, keepdim=True)
    score.sub_(largest)
    probability = torch.exp2(score, out=view.scratch.take("probability", *score.shape))
    total = probability.sum(-1, keepdim=True)
    weighted = score.mul_(probability).sum(-1, keepdim=True)
    keep = view.keep(tile, probability)
    if keep is not None:
        probability.mul_(keep)
    output = view.scratch.take("output", *score.shape[:2], view.value.shape[-1])
    # Into a contiguous buffer: a batched product into a strided slice is a third slower.
    torch.bmm(probability, view.value[:, tile.key_start : tile.key_stop], out=output)
    return output.div_(total), torch.cat((largest, total, weighted), -1)


def _finish(
    problem: Problem, output: Tensor, largest: Tensor, total: Tensor, weighted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn (m, l, t) into entropy, log-normalizer and largest score; let sinks take their share."""
    log_total = total.log()
    entropy = log_total - LN_2 * weighted / total
    largest = largest * LN_2
    if problem.structure.may_leave_rows_empty(problem.key.shape[2]) or problem.bias is not None:
        empty = largest <= EMPTY_ROW
        largest.masked_fill_(empty, -torch.inf)
        entropy.masked_fill_(empty, 0.0)
        log_total.masked_fill_(empty, 0.0)
        output.masked_fill_(empty[..., None], 0.0)
    log_normalizer = largest + log_total
    if problem.sinks is None:
        return entropy, log_normalizer, largest
    sinks = problem.sinks.to(problem.wide)[None, :, None]
    with_sink = torch.logaddexp(log_normalizer, sinks)
    share = (log_normalizer - with_sink).exp()  # of the row's mass that the real keys keep
    output.mul_(share[..., None])
    # -sum p log p with p = share * softmax; an empty row has share 0 and log share -inf
    return share * entropy + torch.special.entr(share), with_sink, largest


class Gradients(NamedTuple):
    """Gradients of the inputs; None where none is wanted."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None


class RowConstants(NamedTuple):
    """What the gradient of a score needs of its row, each ``[batch, heads, queries]``."""

    log2_normalizer: Tensor
    minus_entropy_gradient: Tensor
    delta: Tensor
    sink_share: Tensor | None


class RowViews(NamedTuple):
    """One chunk's share of what belongs to rows, each ``[units, group, queries, dim or 1]``."""

    output_gradient: Tensor
    log2_normalizer: Tensor
    minus_entropy_gradient: Tensor
    delta: Tensor


def row_constants(
    problem: Problem,
    saved: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
) -> RowConstants:
    """Collect the terms of dS_ij that do not depend on the key.

    ``dS_ij = p_ij (dO_i . v_j - delta_i - g_i (s_ij - lse_i))`` with
    ``delta_i = dO_i . O_i + g_i (H_i + sink share) - (gradient of lse_i)``.
    """
    output, entropy, log_normalizer = saved
    output_gradient, entropy_gradient, normalizer_gradient = upstream
    delta = (output_gradient.to(problem.wide) * output.to(problem.wide)).sum(-1)
    sink_share = None
    bracket = entropy
    if problem.sinks is not None:
        sink_share = (problem.sinks.to(problem.wide)[None, :, None] - log_normalizer).exp()
        bracket = entropy + sink_share
    delta = delta + entropy_gradient * bracket - normalizer_gradient
    # An empty row: exp(s - lse) must be 0, whatever its scores.
    finite = log_normalizer.masked_fill(log_normalizer == -torch.inf, -MASKED_SCORE)
    return RowConstants(finite * LOG2_E, -entropy_gradient, delta, sink_share)


def backward(
    problem: Problem,
    saved: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
    wanted: tuple[bool, bool, bool, bool, bool],
) -> Gradients:
    """Return the gradients of query, key, value, bias and sinks.

    Args:
        problem: the inputs of the forward pass.
        saved: its output, entropy and log-normalizer.
        upstream: their gradients.
        wanted: which of (query, key, value, bias, sinks) need a gradient.
    """
    constants = row_constants(problem, saved, upstream)
    inputs = (problem.query, problem.key, problem.value)
    # Contiguous whatever the inputs are: blocks are written through views.
    d_query, d_key, d_value = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else None
        for tensor, want in zip(inputs, wanted[:3], strict=True)
    )
    d_bias = None
    if wanted[3] and problem.bias is not None:
        d_bias = torch.zeros(problem.bias.shape, dtype=problem.wide, device=problem.bias.device)
    if wanted[0] or wanted[1] or wanted[2] or wanted[3]:
        blocks = choose_blocks(problem)
        scratch = Scratch(problem, blocks)
        gradients = Gradients(d_query, d_key, d_value, d_bias, None)
        for chunk in chunks_of(problem, blocks):
            _backward_chunk(
                ChunkView(problem, chunk, scratch), blocks, constants, upstream[0], gradients
            )
    d_sinks = None
    if wanted[4] and constants.sink_share is not None and problem.sinks is not None:
        # dlse/dsink = share, dp_j/dsink = -share p_j: delta with mass in place of 1 - mass
        per_row = constants.sink_share * -(constants.delta + constants.minus_entropy_gradient)
        d_sinks = per_row.sum((0, 2)).to(problem.sinks.dtype)
    if d_bias is not None and problem.bias is not None:
        d_bias = d_bias.to(problem.bias.dtype)
    return Gradients(d_query, d_key, d_value, d_bias, d_sinks)


def _backward_chunk(
    view: ChunkView,
    blocks: Blocks,
    constants: RowConstants,
    output_gradient: Tensor,
    gradients: Gradients,
) -> None:
    """Add one chunk's share to the gradients."""
    problem, chunk = view.problem, view.chunk
    rows = RowViews(
        view.by_unit(output_gradient).to(problem.wide),
        *(view.by_unit(constant[..., None]) for constant in constants[:3]),
    )
    value_t = view.value.transpose(1, 2).contiguous()
    d_query = None if gradients.query is None else view.by_unit(gradients.query)
    d_bias = None if gradients.bias is None else view.cut(gradients.bias)
    key_sum = _accumulator(gradients.key, view)
    value_sum = _accumulator(gradients.value, view)
    for tile in row_blocks(view, blocks):
        if tile.key_start == tile.key_stop:
            if d_query is not None:
                d_query[:, :, tile.row_start : tile.row_stop].zero_()
            continue
        keys = slice(tile.key_start, tile.key_stop)
        d_output = view.rows(rows.output_gradient, tile)
        d_score, weights = _score_gradient(view, tile, rows, d_output, value_t, d_bias)
        if value_sum is not None:
            _add_product(value_sum[:, keys], weights, d_output, view.scratch)
        if key_sum is not None:
            _add_product(key_sum[:, keys], d_score, view.rows(view.query, tile), view.scratch)
        if d_query is not None:
            block = view.scratch.take("output", *d_score.shape[:2], view.key.shape[-1])
            torch.bmm(d_score, view.key[:, keys], out=block)
            view.put(d_query, tile, block.mul_(problem.scale))
    if key_sum is not None:
        key_sum.mul_(problem.scale)
    for target, total in ((gradients.key, key_sum), (gradients.value, value_sum)):
        if target is not None and total is not None and target.dtype != problem.wide:
            cut = target[chunk.batches, chunk.heads]
            cut.copy_(total.view(cut.shape))


def _accumulator(gradient: Tensor | None, view: ChunkView) -> Tensor | None:
    """Return zeros ``[units, keys, dim]``: the gradient itself, unless it is in low precision."""
    if gradient is None:
        return None
    # A view: a chunk is either whole batch entries or some heads of one.
    cut = gradient[view.chunk.batches, view.chunk.heads].flatten(0, 1)
    if gradient.dtype != view.problem.wide:
        return torch.zeros_like(cut, dtype=view.problem.wide)
    return cut.zero_()


def _add_product(target: Tensor, left: Tensor, right: Tensor, scratch: Scratch) -> None:
    """Add ``left^T right`` to a strided slice, by way of a contiguous buffer (a tenth faster)."""
    product = scratch.take("product", *target.shape)
    torch.bmm(left.transpose(1, 2), right, out=product)
    target.add_(product)


def _score_gradient(
    view: ChunkView,
    tile: Tile,
    rows: RowViews,
    d_output: Tensor,
    value_t: Tensor,
    d_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return d(score before the cap) and the weights that multiplied the values."""
    problem, scratch = view.problem, view.scratch
    probability_log2, capped = view.scores(tile)
    probability_log2.sub_(view.rows(rows.log2_normalizer, tile))
    view.fill_masked(probability_log2, tile, MASKED_LOG_PROBABILITY)
    if problem.bias is not None:
        probability_log2.clamp_(min=MASKED_LOG_PROBABILITY)
    shape = probability_log2.shape
    probability = torch.exp2(probability_log2, out=scratch.take("probability", *shape))
    d_score = scratch.take("d_score", *shape)
    torch.bmm(d_output, value_t[:, :, tile.key_start : tile.key_stop], out=d_score)
    keep = view.keep(tile, probability)
    if keep is not None:
        d_score.mul_(keep)
    # dS = p (dO.v - delta - g (s - lse)): one multiply-add a score for the entropy
    d_score.sub_(view.rows(rows.delta, tile))
    minus_entropy_gradient = view.rows(rows.minus_entropy_gradient, tile)
    d_score.addcmul_(probability_log2, minus_entropy_gradient, value=LN_2)
    d_score.mul_(probability)
    if d_bias is not None:
        target = tile.crop(d_bias)
        target.add_(view.per_head(d_score, tile).sum_to_size(target.shape))
    if capped is not None and problem.softcap is not None:
        slope = capped.square_().neg_().add_(1.0)  # of softcap * tanh(x / softcap)
        d_score.mul_(slope)
    weights = probability if keep is None else probability.mul_(keep)
    return d_score, weights
