"""Tensors as the kernels take them: with their strides, in tuples that the compiler looks into."""

from typing import Any

import torch
from torch import Tensor

from entropy_regularization.attention.masking import Structure

View = tuple[Any, ...]  # a tensor and its strides, in elements


def view(tensor: Tensor) -> View:
    """Return the tensor with its strides, as the kernels take it."""
    return (tensor, *tensor.stride())


def pairs_view(tensor: Tensor, sizes: tuple[int, int, int, int]) -> View:
    """Return the view of a bias or dense mask, broadcast to all scores, and the number of keys.

    The compiler looks at numbers in a tuple as at strides, so that it knows where this one is a
    multiple of 16, and loads several elements at once.
    """
    return (*view(tensor.expand(sizes)), sizes[3])


def strides_by_8(*tensors: Tensor) -> bool:
    """Tell whether the strides between rows are multiples of 8, but not all of them of 16.

    A head dimension of 72 makes them so. That of a dimension of size 1 does not matter.
    """
    if not any(stride % 16 for tensor in tensors for stride in tensor.stride()[:3]):
        return False  # nearly always, and soon known
    bits = 0
    for tensor in tensors:
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
            bits |= stride if size > 1 else 0
    return bits % 16 == 8


def rows_like(query: Tensor, width: int) -> Tensor:
    """Allocate ``[batch, heads, queries, width]`` in the layout of the query.

    Models hold queries as ``[batch, queries, heads, dim]``; an output in the same layout saves
    them a copy.
    """
    batch, heads, rows, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(batch, rows, heads, width).transpose(1, 2)
    return query.new_empty(batch, heads, rows, width)


def masks_of(structure: Structure, sizes: tuple[int, int, int, int]) -> dict[str, View | None]:
    """Return the views of the masks; broadcast dimensions have stride 0.

    Each is an argument of its own: Triton 3.6 loses the strides equal to 1 in a tuple of tuples.
    """
    allowed, padding, document = structure.allowed, structure.key_padding, structure.document
    batch = sizes[0]
    return {
        "allowed": None if allowed is None else pairs_view(allowed.view(torch.uint8), sizes),
        "padding": None if padding is None else view(padding.expand(batch, -1).view(torch.uint8)),
        "document": None if document is None else view(document.expand(batch, -1)),
    }
