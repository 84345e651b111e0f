"""torch.library operators around the passes on tiles, with their fake tensors and gradients.

They make ``torch.compile(fullgraph=True)`` and non-reentrant checkpointing see one opaque call, and
keep autocast away from the scores.
"""

from typing import Any

import torch
from torch import Tensor

from entropy_regularization.attention import blockwise
from entropy_regularization.attention.blockwise import Problem
from entropy_regularization.attention.compiled import add_at_once, fill_at_once, runs
from entropy_regularization.attention.masking import Structure
from entropy_regularization.attention.registration import as_operator, define_gradient
from entropy_regularization.attention.transforms import (
    refuse_batched_gradients,
    refuse_double_backward,
)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    key_padding: Tensor | None,
    document: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Problem:
    structure = Structure(left, right, allowed, key_padding, document)
    return Problem(query, key, value, structure, scale, bias, softcap, sinks, dropout, seed)


def _allocate_forward(
    query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = query.shape[:3]
    output = query.new_empty(*rows, value.shape[-1])
    return output, *(query.new_empty(rows, dtype=wide) for _ in range(4))


@as_operator(_allocate_forward)
def blockwise_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    key_padding: Tensor | None,
    document: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, entropy, log-normalizer, largest score and what backward needs.

    See blockwise.forward. ``compiled`` lets the compiled kernel do its work, where there is one.
    """
    problem = _problem(
        query, key, value, allowed, key_padding, document, bias, sinks, seed,
        left, right, scale, softcap, dropout,
    )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        return blockwise.forward(problem, fill_at_once if compiled and runs(problem) else None)


def _allocate_backward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    bias, sinks, wanted = rest[3], rest[4], rest[-1]
    inputs = (query, key, value, bias, sinks)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, want in zip(inputs, wanted, strict=True)
        if want and tensor is not None
    ]


@as_operator(_allocate_backward)
def blockwise_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    key_padding: Tensor | None,
    document: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    compiled: bool,
    output: Tensor,
    entropy: Tensor,
    log2_normalizer: Tensor,
    output_gradient: Tensor,
    entropy_gradient: Tensor,
    normalizer_gradient: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the wanted gradients of query, key, value, bias and sinks, in that order."""
    problem = _problem(
        query, key, value, allowed, key_padding, document, bias, sinks, seed,
        left, right, scale, softcap, dropout,
    )  # fmt: skip
    saved = (output, entropy, log2_normalizer)
    upstream = (output_gradient, entropy_gradient, normalizer_gradient)
    with torch.autocast(query.device.type, enabled=False):
        gradients = blockwise.backward(
            problem,
            saved,
            upstream,
            (wanted[0], wanted[1], wanted[2], wanted[3], wanted[4]),
            add_at_once if compiled and runs(problem) else None,
        )
    return [gradient for gradient in gradients if gradient is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors, *output[:2], output[4])
    ctx.options = options


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_batched_gradients(upstream)
    *tensors, output, entropy, log2_normalizer = ctx.saved_tensors
    places = (0, 1, 2, 6, 7)  # query, key, value, bias, sinks
    wanted = [ctx.needs_input_grad[place] for place in places]
    given = [
        torch.zeros_like(like) if gradient is None else gradient
        for gradient, like in zip(upstream[:3], (output, entropy, entropy), strict=True)
    ]
    found = iter(
        blockwise_backward(*tensors, *ctx.options, output, entropy, log2_normalizer, *given, wanted)
    )
    gradients: list[Tensor | None] = [None] * (len(tensors) + len(ctx.options))
    for place, want in zip(places, wanted, strict=True):
        if want:
            gradients[place] = next(found)
    return tuple(gradients)


define_gradient(blockwise_forward, _differentiate, _save)
define_gradient(blockwise_backward, refuse_double_backward)


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    structure: Structure,
    *,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, entropy, log-normalizer and largest score of every row in linear memory.

    The dropout mask is drawn from a seed that comes from torch's default generator of the CPU,
    whatever device is the default, so ``torch.manual_seed`` reproduces it and checkpointing draws
    it again.
    """
    seed = None
    if dropout > 0.0:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device="cpu")
    output, entropy, log_normalizer, max_score, _ = blockwise_forward(
        query, key, value,
        structure.allowed, structure.key_padding, structure.document,
        bias, sinks, seed,
        structure.left, structure.right, scale, softcap, dropout, compiled,
    )  # fmt: skip
    return output, entropy, log_normalizer, max_score.detach()
