"""Products of weights and values: whether one averages the values of the keys of every row."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MATMULS = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.linalg.matmul,
    torch.bmm,
    Tensor.bmm,
}


def averages_values(
    func: Callable[..., Any], args: Any, tensors: Sequence[Tensor], weights: Tensor
) -> bool:
    """Tell whether a product is that of weights and values, summed over the keys of every row.

    Args:
        func: the product.
        args: its positional arguments.
        tensors: those that it multiplies.
        weights: one of them, ``[batch, heads, queries, keys]`` or ``[batch, queries, keys]``.
    """
    if len(tensors) != 2 or _holds_heads_outside(tensors[0 if tensors[1] is weights else 1]):
        return False
    if func in MATMULS:
        return tensors[0] is weights and tensors[1].dim() > 2
    if func is torch.einsum and isinstance(args[0], str):
        return _sums_keys(args[0], at=int(tensors[1] is weights))
    return False


def _holds_heads_outside(values: Tensor) -> bool:
    """Tell whether values of as many heads as batch entries came as ``[heads, batch, ...]``.

    Their sizes do not tell; where they lie in memory does, unless they were copied.
    """
    if values.dim() != 4 or values.shape[0] != values.shape[1]:
        return False
    return 0 < values.stride(0) < values.stride(1)


def _sums_keys(equation: str, at: int) -> bool:
    """Tell whether an equation of two operands sums over the last letter of one of them.

    The last but one, the queries, must be its own, and the others, batch and heads, be kept.

    Args:
        equation: of einsum, with an arrow.
        at: which operand the weights are.
    """
    inputs, arrow, output = equation.replace(" ", "").replace("...", "*").partition("->")
    letters = inputs.split(",")
    weights, values = letters[at], letters[1 - at]
    if not arrow or len(weights) < 2:
        return False
    kept, queries, keys = weights[:-2], weights[-2], weights[-1]
    return (
        keys in values
        and keys not in output
        and queries in output
        and queries not in values
        and all(each in output and each in values for each in kept)
    )
