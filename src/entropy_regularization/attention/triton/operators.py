"""torch.library operators around the kernels, with their fake tensors and gradients.

They make ``torch.compile(fullgraph=True)``, CUDA graphs and checkpointing see one opaque call.
"""

from typing import Any

import torch
from torch import Tensor

from entropy_regularization.attention.masking import Memo, Structure
from entropy_regularization.attention.registration import as_operator, define_gradient
from entropy_regularization.attention.transforms import (
    refuse_batched_gradients,
    refuse_double_backward,
)
from entropy_regularization.attention.triton import launch
from entropy_regularization.attention.triton.launch import Problem, Upstream
from entropy_regularization.attention.triton.skipping import Bounds
from entropy_regularization.attention.triton.views import rows_like


def _allocate_forward(
    query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(query.dtype, torch.float32)
    output = rows_like(query, value.shape[-1])
    return output, *(query.new_empty(query.shape[:3], dtype=wide) for _ in range(4))


@as_operator(_allocate_forward)
def triton_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    key_padding: Tensor | None,
    document: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    forward_bounds: Tensor | None,
    query_bounds: Tensor | None,
    key_bounds: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, entropy, log-normalizer, largest score and what backward needs.

    See launch.forward.
    """
    structure = Structure(left, right, allowed, key_padding, document)
    bounds = Bounds(forward_bounds, query_bounds, key_bounds)
    return launch.forward(
        Problem(query, key, value, structure, scale, bias, softcap, sinks, dropout, seed, bounds)
    )


def _allocate_backward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    bias, sinks, wanted = rest[3], rest[4], rest[-1]
    found = [
        torch.empty_like(tensor)
        for tensor, want in zip((query, key, value, bias), wanted, strict=False)
        if want and tensor is not None
    ]
    if wanted[4] and sinks is not None:
        found.append(sinks.new_empty(sinks.shape))
    return found


@as_operator(_allocate_backward)
def triton_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    key_padding: Tensor | None,
    document: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    forward_bounds: Tensor | None,
    query_bounds: Tensor | None,
    key_bounds: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    output: Tensor,
    entropy: Tensor,
    log2_normalizer: Tensor,
    output_gradient: Tensor | None,
    entropy_gradient: Tensor | None,
    normalizer_gradient: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the wanted gradients of query, key, value, bias and sinks, in that order."""
    structure = Structure(left, right, allowed, key_padding, document)
    bounds = Bounds(forward_bounds, query_bounds, key_bounds)
    gradients = launch.backward(
        Problem(query, key, value, structure, scale, bias, softcap, sinks, dropout, seed, bounds),
        (output, entropy, log2_normalizer),
        Upstream(output_gradient, entropy_gradient, normalizer_gradient),
        (wanted[0], wanted[1], wanted[2], wanted[3], wanted[4]),
    )
    return [gradient for gradient in gradients if gradient is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:12], *output[:2], output[4])
    ctx.options = inputs[12:]


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_batched_gradients(upstream)
    places = (0, 1, 2, 6, 7)  # query, key, value, bias, sinks
    *tensors, output, entropy, log2_normalizer = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * (len(tensors) + len(ctx.options))
    wanted = [ctx.needs_input_grad[place] for place in places]
    if any(gradient is not None for gradient in upstream[:3]):
        found = iter(
            triton_backward(
                *tensors, *ctx.options, output, entropy, log2_normalizer, *upstream[:3], wanted
            )
        )
        for place, want in zip(places, wanted, strict=True):
            if want:
                gradients[place] = next(found)
    return tuple(gradients)


define_gradient(triton_forward, _differentiate, _save)
define_gradient(triton_backward, refuse_double_backward)


def triton_attention(
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
    memo: Memo | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, entropy, log-normalizer and largest score of every row, by fused kernels.

    Inputs are those of attention_with_entropy, known to fit together and to be supported
    (support.unsupported_reason). The dropout mask is drawn from a seed that comes from torch's
    default generator of the device, so ``torch.manual_seed`` reproduces it, checkpointing draws it
    again and CUDA graphs draw a new one at every replay. What padding and documents say of tiles is
    kept in the ``memo`` of the mask; without one every kernel computes it by itself.
    """
    seed = None
    if dropout > 0.0:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=query.device)
    bounds = Bounds()
    if memo is not None and not torch.compiler.is_compiling():
        problem = Problem(query, key, value, structure, scale, bias, softcap, sinks, dropout, seed)
        kernels = Bounds._fields if torch.is_grad_enabled() else ("forward",)
        bounds = Bounds(*(launch.bounds_of(kernel, problem, memo) for kernel in kernels))
    output, entropy, log_normalizer, max_score, _ = triton_forward(
        query, key, value,
        structure.allowed, structure.key_padding, structure.document,
        bias, sinks, seed, *bounds,
        structure.left, structure.right, scale, softcap, dropout,
    )  # fmt: skip
    return output, entropy, log_normalizer, max_score.detach()
