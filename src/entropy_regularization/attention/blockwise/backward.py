"""Backward: recompute the scores from the log-normalizer; one multiply-add more for the entropy."""

from typing import NamedTuple

import torch
from torch import Tensor

from entropy_regularization.attention.blockwise import blocking
from entropy_regularization.attention.blockwise.blocking import Blocks
from entropy_regularization.attention.blockwise.chunk import ChunkView, Scratch
from entropy_regularization.attention.blockwise.problem import (
    LN_2,
    LOG2_E,
    MASKED_LOG_PROBABILITY,
    MASKED_SCORE,
    Gradients,
    Problem,
)
from entropy_regularization.attention.masking import Tile


class RowConstants(NamedTuple):
    """What the gradient of a score needs of its row, each ``[batch, heads, queries, 1]``."""

    log2_normalizer: Tensor
    log2_slope: Tensor  # of dS/p in log2 p: minus the entropy's gradient, in base 2
    delta: Tensor


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
    inputs = (problem.query, problem.key, problem.value)
    # Contiguous whatever the inputs are: blocks are written through views.
    d_query, d_key, d_value = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else None
        for tensor, want in zip(inputs, wanted[:3], strict=True)
    )
    d_bias = None
    if wanted[3] and problem.bias is not None:
        d_bias = torch.zeros(problem.bias.shape, dtype=problem.wide, device=problem.bias.device)
    gradients = Gradients(d_query, d_key, d_value, d_bias, None)
    blocks = blocking.choose_blocks(problem)
    with Scratch(problem, blocks) as scratch:
        constants, d_sinks = _row_constants(problem, saved, upstream, blocks, scratch)
        if any(wanted[:4]):
            for chunk in blocking.chunks_of(problem, blocks):
                view = ChunkView(problem, chunk, blocks, scratch)
                _backward_chunk(view, constants, upstream[0], gradients)
    if d_bias is not None and problem.bias is not None:
        d_bias = d_bias.to(problem.bias.dtype)
    return Gradients(d_query, d_key, d_value, d_bias, d_sinks if wanted[4] else None)


def _row_constants(
    problem: Problem,
    saved: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
    blocks: Blocks,
    scratch: Scratch,
) -> tuple[RowConstants, Tensor | None]:
    """Collect the terms of dS_ij that do not depend on the key; return the sinks' gradient too.

    ``dS_ij = p_ij (dO_i . v_j - delta_i - g_i (s_ij - lse_i))`` with
    ``delta_i = dO_i . O_i + g_i (H_i + sink share) - (gradient of lse_i)``.
    """
    output, entropy, log_normalizer = saved
    output_gradient, entropy_gradient, normalizer_gradient = upstream
    delta = torch.empty_like(entropy)
    for chunk in blocking.chunks_of(problem, blocks):
        left, right = (chunk.units(x, problem.group) for x in (output_gradient, output))
        product = scratch.take("product", *left.shape).copy_(left).mul_(right)
        chunk.units(delta[..., None], problem.group)[..., 0].copy_(product.sum(-1))
    delta.addcmul_(entropy_gradient, entropy).sub_(normalizer_gradient)
    d_sinks = None
    if problem.sinks is not None:
        share = (problem.sinks.to(problem.wide)[None, :, None] - log_normalizer).exp()
        delta.addcmul_(entropy_gradient, share)
        # dlse/dsink = share, dp_j/dsink = -share p_j: delta with mass in place of 1 - mass
        d_sinks = (share * (entropy_gradient - delta)).sum((0, 2)).to(problem.sinks.dtype)
    # An empty row: exp(s - lse) must be 0, whatever its scores.
    finite = log_normalizer.masked_fill(log_normalizer == -torch.inf, -MASKED_SCORE)
    rows = (finite * LOG2_E, entropy_gradient * -LN_2, delta)
    return RowConstants(*(row[..., None] for row in rows)), d_sinks


def _backward_chunk(
    view: ChunkView, constants: RowConstants, output_gradient: Tensor, gradients: Gradients
) -> None:
    """Add one chunk's share to the gradients."""
    problem = view.problem
    given = {"query": problem.query, "d_output": output_gradient, **constants._asdict()}
    sources = (view.sources(name, view.by_unit(tensor)) for name, tensor in given.items())
    d_bias = None if gradients.bias is None else view.chunk.of(gradients.bias, problem.group)
    cuts = _cuts(view, gradients)
    totals = {name: view.room_for(f"d_{name}", cut) for name, cut in cuts.items()}
    key_sum, value_sum = (
        totals[name].zero_() if name in totals else None for name in ("key", "value")
    )
    d_queries = view.targets(totals["query"]) if "query" in totals else None
    for index, (tile, query, d_output, *rows) in enumerate(
        zip(view.tiles(), *sources, strict=False)
    ):
        d_query = None if d_queries is None else d_queries[index]
        targets = (d_query, key_sum, value_sum, d_bias)
        _backward_block(view, tile, query, d_output, RowConstants(*rows), targets)
    for name, cut in cuts.items():
        if totals[name] is not cut:
            cut.copy_(totals[name])


def _backward_block(
    view: ChunkView,
    tile: Tile,
    query: Tensor,
    d_output: Tensor,
    rows: RowConstants,
    targets: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Fill one block of the query's gradient; add its share to those of key, value and bias."""
    d_query, key_sum, value_sum, d_bias = targets
    scale, scratch = view.problem.scale, view.scratch
    block = None if d_query is None else scratch.take("d_query_block", *query.shape).zero_()
    for piece in view.pieces(tile):
        keys = slice(piece.key_start, piece.key_stop)
        d_score, weights = _score_gradient(view, piece, query, d_output, rows, d_bias)
        if value_sum is not None:
            _add_product(value_sum[:, keys], weights, d_output, 1.0, scratch)
        if key_sum is not None:
            _add_product(key_sum[:, keys], d_score, query, scale, scratch)
        if block is not None:
            block.baddbmm_(d_score, view.key[:, keys])
    if block is not None and d_query is not None:
        torch.mul(block.view(d_query.shape), scale, out=d_query)


def _cuts(view: ChunkView, gradients: Gradients) -> dict[str, Tensor]:
    """Return the chunk's part of the gradients that are wanted; views of them.

    That of the queries is ``[units, group, queries, dim]``, the others ``[units, keys, dim]``: a
    chunk is either whole batch entries or some heads of one.
    """
    chunk = view.chunk
    cuts = {} if gradients.query is None else {"query": view.by_unit(gradients.query)}
    for name, gradient in (("key", gradients.key), ("value", gradients.value)):
        if gradient is not None:
            cuts[name] = gradient[chunk.batches, chunk.heads].flatten(0, 1)
    return cuts


def _add_product(
    target: Tensor, left: Tensor, right: Tensor, factor: float, scratch: Scratch
) -> None:
    """Add ``factor left^T right`` to a slice, by way of a contiguous buffer if it is strided."""
    left = left.transpose(1, 2)
    if target.is_contiguous():
        target.baddbmm_(left, right, alpha=factor)
        return
    product = scratch.take("product", *target.shape)
    target.add_(torch.bmm(left, right, out=product), alpha=factor)


def _score_gradient(
    view: ChunkView,
    tile: Tile,
    query: Tensor,
    d_output: Tensor,
    rows: RowConstants,
    d_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return d(score before the cap) and the weights that multiplied the values."""
    problem, scratch = view.problem, view.scratch
    value_t = view.value[:, tile.key_start : tile.key_stop].transpose(1, 2)
    log2_probability, capped = view.scores(tile, query)
    log2_probability.sub_(rows.log2_normalizer)
    view.mask(log2_probability, tile, MASKED_LOG_PROBABILITY)
    if problem.bias is not None:
        log2_probability.clamp_(min=MASKED_LOG_PROBABILITY)
    shape = log2_probability.shape
    probability = torch.exp2(log2_probability, out=scratch.take("probability", *shape))
    # dS = p (dO.v - delta - g (s - lse)), from right to left in the buffer of the scores
    d_score = log2_probability.mul_(rows.log2_slope).sub_(rows.delta)
    keep = view.keep(tile, probability)
    if keep is None:
        d_score.baddbmm_(d_output, value_t)
    else:
        product = scratch.take("d_weights", *shape)
        d_score.addcmul_(torch.bmm(d_output, value_t, out=product), keep)
    d_score.mul_(probability)
    if d_bias is not None:
        target = tile.crop(d_bias)
        target.add_(view.per_head(d_score, tile).sum_to_size(target.shape))
    if capped is not None:
        slope = capped.square_().neg_().add_(1.0)  # of softcap * tanh(x / softcap)
        d_score.mul_(slope)
    return d_score, probability if keep is None else probability.mul_(keep)
