"""What torch's function transforms may do with a fused operator: map it, not differentiate it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_transforms(*tensors: Tensor | None) -> None:
    """Refuse differentiation that cannot see a fused backward and would lose the gradient.

    Raises:
        NotImplementedError: inside torch.func.grad and its relatives, and for dual tensors; under
            torch.compile wherever forward-mode differentiation is on.
    """
    if torch.compiler.is_compiling():
        how = "in forward-mode differentiation" if forward_ad._current_level >= 0 else None
    else:
        given = [tensor for tensor in tensors if tensor is not None]
        how = next((found for found in map(_transform_of, given) if found is not None), None)
    if how is not None:
        raise NotImplementedError(
            f"attention_with_entropy was called {how}, which cannot see its fused backward; use "
            "implementation='reference' there, or torch.autograd.grad."
        )


def _transform_of(tensor: Tensor) -> str | None:
    """Say which differentiation follows a tensor, inside vmap too; None if none or backward."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return "inside torch.func.grad or a relative of it"
        tensor = functorch.get_unwrapped(tensor)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return "on a dual tensor of forward-mode differentiation"
    return None


def one_by_one(operator: Any) -> Callable[..., Any]:
    """Return the vmap rule of an operator: one call for every entry of what is mapped."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError("vmap was given a dimension of size 0; map over at least one entry.")
        mapped = list(zip(inputs, in_dims, strict=True))  # of a list of booleans: a list of None
        found = [
            operator(
                *(each.select(dim, entry) if isinstance(dim, int) else each for each, dim in mapped)
            )
            for entry in range(info.batch_size)
        ]
        stacked = [torch.stack(parts) for parts in zip(*found, strict=True)]
        return type(found[0])(stacked), type(found[0])([0] * len(stacked))

    return rule


def refuse_double_backward(ctx: Any, *gradients: Any) -> None:
    """Stand as the gradient of a backward operator, which has none."""
    raise NotImplementedError(
        "attention_with_entropy was differentiated twice, but its fused backward has no gradient "
        "of its own; use implementation='reference' for second derivatives."
    )


def refuse_batched_gradients(upstream: tuple[Tensor | None, ...]) -> None:
    """Refuse ``is_grads_batched=True``, whose batches a fused backward cannot take apart.

    Raises:
        NotImplementedError: if an upstream gradient is such a batch.
    """
    if torch.compiler.is_compiling():
        return
    batched = torch._C._functorch.is_legacy_batchedtensor
    if any(gradient is not None and batched(gradient) for gradient in upstream):
        raise NotImplementedError(
            "attention_with_entropy was differentiated with is_grads_batched=True (or "
            "jacobian(vectorize=True)), which its fused backward cannot do; pass one gradient at a "
            "time, or use implementation='reference'."
        )
