"""Forward: output, entropy, log-normalizer and largest score of every row."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_regularization.attention.blockwise import blocking
from entropy_regularization.attention.blockwise.chunk import ChunkView, Scratch
from entropy_regularization.attention.blockwise.problem import (
    EMPTY_ROW,
    LN_2,
    LOG2_E,
    MASKED_SCORE,
    Problem,
)
from entropy_regularization.attention.masking import Tile

Fill = Callable[[Problem, Tensor, tuple[Tensor, ...]], None]


def forward(
    problem: Problem, fill: Fill | None = None
) -> tuple[
    Float[Tensor, "batch heads queries value_dim"],
    Float[Tensor, "batch heads queries"],
    Float[Tensor, "batch heads queries"],
    Float[Tensor, "batch heads queries"],
    Float[Tensor, "batch heads queries"],
]:
    """Return output, entropy, log-normalizer and largest score of every row.

    The fifth result is for backward: the log-normalizer in base 2 as the scores are, because a
    large one loses digits on its way to nats and back; -inf where there is no key, whatever sink.

    Args:
        problem: the inputs.
        fill: does the work that grows with the keys, in place of fill_in_chunks.
    """
    row_shape = problem.query.shape[:3]
    output = problem.query.new_empty(*row_shape, problem.value.shape[-1])
    # (m, l, t) of MATHEMATICS in base 2: largest, sum of 2^(s - m), sum of 2^(s - m) (s - m)
    statistics = problem.query.new_empty(3, *row_shape, 1, dtype=problem.wide)
    (fill or fill_in_chunks)(problem, output, tuple(statistics))
    return output, *_finish(problem, output, *statistics[..., 0])


def fill_in_chunks(problem: Problem, output: Tensor, statistics: tuple[Tensor, ...]) -> None:
    """Fill the output, which sinks will scale, and (m, l, t) ``[batch, heads, queries, 1]``."""
    blocks = blocking.choose_blocks(problem)
    with Scratch(problem, blocks) as scratch:
        for chunk in blocking.chunks_of(problem, blocks):
            view = ChunkView(problem, chunk, blocks, scratch)
            _forward_chunk(view, (output, *statistics))


def _forward_chunk(view: ChunkView, results: tuple[Tensor, ...]) -> None:
    """Fill one chunk of the output and the statistics."""
    output, *statistics = (view.by_unit(result) for result in results)
    targets = (view.targets(result) for result in (output, *statistics))
    queries = view.sources("query", view.by_unit(view.problem.query))
    for tile, query, *rows in zip(view.tiles(), queries, *targets, strict=False):
        if tile.key_start == tile.key_stop:
            for target, nothing in zip(rows, (0.0, MASKED_SCORE, 1.0, 0.0), strict=True):
                target.fill_(nothing)
        else:
            _forward_block(view, tile, query, *rows)


def _forward_block(
    view: ChunkView,
    tile: Tile,
    query: Tensor,
    output: Tensor,
    largest: Tensor,
    total: Tensor,
    weighted: Tensor,
) -> None:
    """Fill the rows of one block, each ``[units, group, rows, value_dim or 1]``."""
    shape = output.shape[:3]
    # A buffer of its own: a batched product into a strided slice is a third slower.
    product = view.scratch.take("product", *query.shape[:2], output.shape[-1])
    for piece in view.pieces(tile):
        key, value = view.keys_and_values(piece)
        flat, _ = view.scores(piece, query, key)
        view.mask(flat, piece)
        score = flat.view(*shape, flat.shape[-1])
        first = piece.key_start == tile.key_start
        if first:
            torch.amax(score, -1, keepdim=True, out=largest)
        else:
            _raise_maximum(score.amax(-1, keepdim=True), largest, total, weighted, product)
        score.sub_(largest)
        probability = torch.exp2(score, out=view.scratch.take("probability", *score.shape))
        for sums, terms in ((total, probability), (weighted, score.mul_(probability))):
            if first:
                torch.sum(terms, -1, keepdim=True, out=sums)
            else:
                sums.add_(terms.sum(-1, keepdim=True))
        keep = view.keep(piece, flat)
        weights = probability.view(flat.shape)
        if keep is not None:
            weights.mul_(keep)
        product.baddbmm_(weights, value, beta=0.0 if first else 1.0)
    torch.div(product.view(output.shape), total, out=output)


def _raise_maximum(
    here: Tensor, largest: Tensor, total: Tensor, weighted: Tensor, product: Tensor
) -> None:
    """Bring the sums of earlier pieces to a new maximum: from ``m`` to ``m'``, in base 2.

    With ``a = 2^(m - m')``: ``t <- a (t + (m - m') l)``, ``l <- a l``, and so the product. A row
    that has met masked scores alone has m = MASKED_SCORE, so that a real one makes ``a`` 0.
    """
    raised = torch.maximum(largest, here)
    shift = largest - raised
    factor = shift.exp2()
    weighted.addcmul_(shift, total).mul_(factor)
    total.mul_(factor)
    product.mul_(factor.view(*product.shape[:2], 1))
    largest.copy_(raised)


def _finish(
    problem: Problem, output: Tensor, largest: Tensor, total: Tensor, weighted: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn (m, l, t) into entropy, log-normalizer, largest score and log-normalizer in base 2.

    Sinks take their share.
    """
    sizes = problem.query.shape[2], problem.key.shape[2]
    log_total = total.log()
    entropy = log_total - LN_2 * weighted / total
    log2_normalizer = largest + LOG2_E * log_total
    largest = largest * LN_2
    if problem.structure.may_leave_rows_empty(*sizes) or problem.bias is not None:
        empty = largest <= EMPTY_ROW
        largest.masked_fill_(empty, -torch.inf)
        log2_normalizer.masked_fill_(empty, -torch.inf)
        entropy.masked_fill_(empty, 0.0)
        log_total.masked_fill_(empty, 0.0)
        output.masked_fill_(empty[..., None], 0.0)
    log_normalizer = largest + log_total
    if problem.sinks is None:
        return entropy, log_normalizer, largest, log2_normalizer
    sinks = problem.sinks.to(problem.wide)[None, :, None]
    with_sink = torch.logaddexp(log_normalizer, sinks)
    no_key = log2_normalizer == -torch.inf
    # of the row's mass that the real keys keep; a sink of -inf there would be -inf + inf
    share = (log_normalizer - with_sink).exp().masked_fill_(no_key, 0.0)
    output.mul_(share[..., None])
    log2_with_sink = torch.logaddexp2(log2_normalizer, sinks * LOG2_E)
    log2_with_sink.masked_fill_(no_key, -torch.inf)
    # -sum p log p with p = share * softmax; an empty row has share 0 and log share -inf
    return share * entropy + torch.special.entr(share), with_sink, largest, log2_with_sink
