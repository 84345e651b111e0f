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
    if len(tensors) != 2:
        return False
    at = int(tensors[1] is weights)
    if not _tells_heads_from_queries(weights, values=tensors[1 - at]):
        return False
    if func in MATMULS:
        return at == 0 and tensors[1].dim() > 2
    return func is torch.einsum and isinstance(args[0], str) and _sums_keys(args[0], at)


def _tells_heads_from_queries(weights: Tensor, values: Tensor) -> bool:
    """Tell whether heads come second in four dimensions: values show it, unless all share them."""
    as_many = weights.dim() == 4 and weights.shape[1] == weights.shape[2] > 1
    return not (as_many and (values.dim() < 4 or values.shape[1] == 1))


def _sums_keys(equation: str, at: int) -> bool:
    """Tell whether an equation of two operands sums over the last letter of one of them.

    The last but one, the queries, must be its own, and the others, batch and heads, be kept;
    heads may share their values.

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
        and all(each in output for each in kept)
        and kept[:1] in values
    )
