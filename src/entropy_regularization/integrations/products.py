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


def weighs_shared_values(weights: Tensor, values: Tensor, inner: int | None) -> bool:
    """Tell whether weights scale the values of their keys, which several rows share.

    That makes a sum over the keys of a broadcast product what a product of matrices is. Experts
    make an output for every row, and what gates scale has no keys.

    Args:
        weights: with a dimension of one, or expanded, for the features of the values.
        values: with a dimension of one, or expanded, for the rows.
        inner: how many dimensions of weights, but for those of one, come after that of the keys;
            None if any may be that.
    """
    n_dims = max(weights.dim(), values.dim())
    pairs = list(zip(_own_sizes(weights, n_dims), _own_sizes(values, n_dims), strict=True))
    has = [weight == value for weight, value in pairs if weight > 1]  # the dimension, the values
    keys = has if inner is None else has[len(has) - 1 - inner :][:1]
    return any(keys) and not all(has) and any(value > 1 == weight for weight, value in pairs)


def _own_sizes(tensor: Tensor, n_dims: int) -> list[int]:
    """Return the sizes of as many dimensions, one where a tensor is expanded or has none."""
    sizes = [size if step else 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return [1] * (n_dims - tensor.dim()) + sizes


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
