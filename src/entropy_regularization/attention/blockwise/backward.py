"""Backward: recompute the scores from the log-normalizer; one multiply-add more for the entropy."""

from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_regularization.attention.blockwise import blocking
from entropy_regularization.attention.blockwise.chunk import ChunkView, Scratch
from entropy_regularization.attention.blockwise.problem import (
    LN_2,
    LOG2_E,
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


Add = Callable[[Problem, RowConstants, tuple[Tensor, Tensor], Gradients], None]


def backward(
    problem: Problem,
    saved: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
    wanted: tuple[bool, bool, bool, bool, bool],
    add: Add | None = None,
) -> Gradients:
    """Return the gradients of query, key, value, bias and sinks.

    Args:
        problem: the inputs of the forward pass.
        saved: its output, entropy, and log-normalizer in base 2 (see forward).
        upstream: the gradients of output, entropy and log-normalizer.
        wanted: which of (query, key, value, bias, sinks) need a gradient.
        add: does the work that grows with the keys, in place of add_in_chunks.
    """
    empty = saved[2] == -torch.inf
    of_normalizer = upstream[2]
    upstream = _without_empty_rows(problem, empty, upstream)
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
    constants = _row_constants(problem, saved, upstream)
    (add or add_in_chunks)(problem, constants, (saved[0], upstream[0]), gradients)
    if d_bias is not None and problem.bias is not None:
        d_bias = d_bias.to(problem.bias.dtype)
    d_sinks = None
    if wanted[4] and problem.sinks is not None:
        # The log-normalizer of a row without a key is its sink.
        alone = of_normalizer.masked_fill(~empty, 0.0).sum((0, 2)).to(problem.sinks.dtype)
        d_sinks = alone + _sinks_gradient(problem.sinks, saved[2], upstream[1], constants.delta)
    return Gradients(d_query, d_key, d_value, d_bias, d_sinks)


def add_in_chunks(
    problem: Problem,
    constants: RowConstants,
    outputs: tuple[Tensor, Tensor],
    gradients: Gradients,
) -> None:
    """Fill the gradients of query, key and value; add that of the bias; complete delta.

    Args:
        problem: the inputs of the forward pass.
        constants: of its rows.
        outputs: its output, and the gradient of that.
        gradients: those that are wanted.
    """
    blocks = blocking.choose_blocks(problem)
    with Scratch(problem, blocks) as scratch:
        for chunk in blocking.chunks_of(problem, blocks):
            view = ChunkView(problem, chunk, blocks, scratch)
            _backward_chunk(view, constants, outputs, gradients)


def _row_constants(
    problem: Problem,
    saved: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
) -> RowConstants:
    """Collect the terms of dS_ij that do not depend on the key, but for ``dO_i . O_i``.

    ``dS_ij = p_ij (dO_i . v_j - delta_i - g_i (s_ij - lse_i))`` with
    ``delta_i = dO_i . O_i + g_i (H_i + sink share) - (gradient of lse_i)``.
    """
    _, entropy, log2_normalizer = saved
    _, entropy_gradient, normalizer_gradient = upstream
    # Contiguous, because the blocks of rows complete it through views.
    delta = torch.empty_like(entropy, memory_format=torch.contiguous_format)
    torch.mul(entropy_gradient, entropy, out=delta).sub_(normalizer_gradient)
    if problem.sinks is not None:
        delta.addcmul_(entropy_gradient, _sink_share(problem.sinks, log2_normalizer))
    # An empty row, or a sink of infinity: exp(s - lse) must be 0, whatever the scores.
    finite = log2_normalizer.masked_fill(log2_normalizer.isinf(), -MASKED_SCORE)
    rows = (finite, entropy_gradient * -LN_2, delta)
    return RowConstants(*(row[..., None] for row in rows))


def _without_empty_rows(
    problem: Problem, empty: Tensor, upstream: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the gradients of rows without a key: 0 times a NaN, as of H / log n, would be NaN."""
    sizes = problem.query.shape[2], problem.key.shape[2]
    possible = problem.structure.may_leave_rows_empty(*sizes) or problem.bias is not None
    if not possible or (empty.device.type == "cpu" and not empty.any()):
        return upstream
    output, entropy, normalizer = upstream
    output = output.masked_fill(empty[..., None], 0.0)
    return output, entropy.masked_fill(empty, 0.0), normalizer.masked_fill(empty, 0.0)


def _sink_share(sinks: Tensor, log2_normalizer: Tensor) -> Tensor:
    """Return the share of every row's mass that its sink takes: ``[batch, heads, queries]``."""
    log2_share = sinks.to(log2_normalizer.dtype)[None, :, None] * LOG2_E - log2_normalizer
    return log2_share.exp2().masked_fill(log2_normalizer.isinf(), 1.0)


def _sinks_gradient(
    sinks: Tensor, log2_normalizer: Tensor, entropy_gradient: Tensor, delta: Tensor
) -> Tensor:
    """Return the gradient of the sinks: ``[heads]``.

    dlse/dsink = share and dp_j/dsink = -share p_j: delta with the share in place of 1 - share.
    """
    share = _sink_share(sinks, log2_normalizer)
    return (share * (entropy_gradient - delta[..., 0])).sum((0, 2)).to(sinks.dtype)


def _backward_chunk(
    view: ChunkView,
    constants: RowConstants,
    outputs: tuple[Tensor, Tensor],
    gradients: Gradients,
) -> None:
    """Add one chunk's share to the gradients; complete its delta.

    Args:
        view: the chunk.
        constants: of all rows.
        outputs: the output of the forward pass, and its gradient.
        gradients: those that are wanted, to be filled.
    """
    given = {"query": view.problem.query, "output": outputs[0], "d_output": outputs[1]}
    sources = (view.sources(name, view.by_unit(tensor)) for name, tensor in given.items())
    rows = zip(*(view.targets(view.by_unit(each)) for each in constants), strict=True)
    d_queries = (
        repeat(None) if gradients.query is None else view.targets(view.by_unit(gradients.query))
    )
    cuts = {"d_key": view.by_key(gradients.key), "d_value": view.by_key(gradients.value)}
    key_sum, value_sum = (view.zeros_for(name, cut) for name, cut in cuts.items())
    d_bias = None if gradients.bias is None else view.chunk.of(gradients.bias, view.problem.group)
    for tile, query, output, d_output, row, d_query in zip(
        view.tiles(), *sources, rows, d_queries, strict=False
    ):
        of_rows = RowConstants(*row)
        product = view.scratch.take("product", *output.shape)
        torch.mul(d_output, output, out=product)
        of_rows.delta.add_(product.sum(-1).view(of_rows.delta.shape))
        targets = (d_query, key_sum, value_sum, d_bias)
        if tile.key_start < tile.key_stop and any(target is not None for target in targets):
            _backward_block(view, tile, query, d_output, of_rows, targets)
        elif d_query is not None:
            d_query.zero_()
    for cut, total in zip(cuts.values(), (key_sum, value_sum), strict=True):
        if cut is not None and total is not None and cut is not total:
            cut.copy_(total)


def _backward_block(
    view: ChunkView,
    tile: Tile,
    query: Tensor,
    d_output: Tensor,
    rows: RowConstants,
    targets: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Fill one block of the query's gradient; add its share to those of key, value and bias.

    Args:
        view: the chunk.
        tile: the block of rows and its keys, at least one.
        query: ``[units, group rows, dim]``.
        d_output: ``[units, group rows, value_dim]``.
        rows: constants, ``[units, group, rows, 1]``.
        targets: gradients of the block's queries ``[units, group, rows, dim]``, of all keys and
            values of the chunk ``[units, keys, dim]``, and of the bias.
    """
    d_query, key_sum, value_sum, d_bias = targets
    constants = RowConstants(*(row.flatten(1, 2) for row in rows))
    scale, scratch = view.problem.scale, view.scratch
    block = None if d_query is None else scratch.take("d_query_block", *query.shape)
    for piece in view.pieces(tile):
        keys = piece.key_start, piece.key_stop - piece.key_start
        key, value = view.keys_and_values(piece)
        given = (query, key, value, d_output)
        d_score, weights = _score_gradient(view, piece, given, constants, d_bias)
        if value_sum is not None:
            _add_product(view, value_sum.narrow(1, *keys), weights, d_output, 1.0)
        if key_sum is not None:
            _add_product(view, key_sum.narrow(1, *keys), d_score, query, scale)
        if block is not None:
            beta = 0.0 if piece.key_start == tile.key_start else 1.0
            block.baddbmm_(d_score, key, beta=beta, alpha=scale)
    if block is not None and d_query is not None:
        d_query.copy_(block.view(d_query.shape))


def _add_product(
    view: ChunkView, target: Tensor, left: Tensor, right: Tensor, factor: float
) -> None:
    """Add ``factor left^T right`` to a slice, by way of a contiguous buffer if it is strided.

    The target of a block that is alone is zero: it is overwritten, in low precision too.
    """
    left = left.transpose(1, 2)
    if target.is_contiguous() and target.dtype == left.dtype:
        target.baddbmm_(left, right, beta=0.0 if view.alone else 1.0, alpha=factor)
        return
    product = view.scratch.take("product", *target.shape)
    if view.alone:
        target.copy_(product.baddbmm_(left, right, beta=0.0, alpha=factor))
    else:
        target.add_(torch.bmm(left, right, out=product), alpha=factor)


def _score_gradient(
    view: ChunkView,
    tile: Tile,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    rows: RowConstants,
    d_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return d(score before the cap) and the weights that multiplied the values.

    Args:
        view: the chunk.
        tile: the rows and keys.
        given: their query, key, value, and gradient of the output, ``[units, ..., dim]``.
        rows: constants, ``[units, group rows, 1]``.
        d_bias: the gradient of the chunk's bias, to be added to.
    """
    scratch = view.scratch
    query, key, value, d_output = given
    log2_probability, capped = view.scores(tile, query, key)
    log2_probability.sub_(rows.log2_normalizer)
    view.mask(log2_probability, tile)
    shape = log2_probability.shape
    probability = torch.exp2(log2_probability, out=scratch.take("probability", *shape))
    # dS = p (dO.v - delta - g (s - lse)), from right to left in the buffer of the scores
    d_score = log2_probability.mul_(rows.log2_slope).sub_(rows.delta)
    keep = view.keep(tile, probability)
    if keep is None:
        d_score.baddbmm_(d_output, value.transpose(1, 2))
    else:
        product = scratch.take("d_weights", *shape)
        d_score.addcmul_(torch.bmm(d_output, value.transpose(1, 2), out=product), keep)
    d_score.mul_(probability)
    if d_bias is not None:
        target = tile.crop(d_bias)
        target.add_(view.per_head(d_score, tile).sum_to_size(target.shape))
    if capped is not None:
        slope = capped.square_().neg_().add_(1.0)  # of softcap * tanh(x / softcap)
        d_score.mul_(slope)
    return d_score, probability if keep is None else probability.mul_(keep)
