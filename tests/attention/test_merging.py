"""Merging shards of the keys gives the attention over all of them."""

import itertools

import pytest
import torch
from cases import worst_error
from torch import Tensor

from entropy_regularization import attention_with_entropy, merge_attention


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 4, length, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for length in (5, 12, 12)
    ]


def allowed() -> Tensor:
    mask = torch.rand(2, 1, 5, 12, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, :, 2] = False  # sees nothing anywhere
    mask[0, :, 1, :7] = False  # sees nothing in the first shards
    return mask


def shard(tensors: list[Tensor], start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = tensors
    found = attention_with_entropy(
        query, key[:, :, start:stop], value[:, :, start:stop], allowed=allowed()[..., start:stop]
    )
    return found.output, found.entropy, found.log_normalizer


def whole(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    found = attention_with_entropy(*tensors, allowed=allowed(), implementation="reference")
    return found.output, found.entropy, found.log_normalizer


def gradients(found: tuple[Tensor, Tensor, Tensor], tensors: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    total = found[0].new_zeros(())
    for tensor in found:
        weight = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        total = total + (weight * tensor.masked_fill(tensor == -torch.inf, 0.0)).sum()
    return list(torch.autograd.grad(total, tensors))


@pytest.mark.parametrize("cuts", [[0, 12], [0, 7, 12], [0, 1, 2, 12], [0, 3, 6, 9, 12]])
def test_merged_shards_equal_the_whole(cuts: list[int]) -> None:
    tensors = inputs()
    merged = merge_attention([shard(tensors, *pair) for pair in itertools.pairwise(cuts)])
    assert worst_error(list(merged), list(whole(tensors))) <= 1e-13
    assert worst_error(gradients(merged, tensors), gradients(whole(tensors), tensors)) <= 1e-12


def test_what_attention_returned_can_be_merged_as_it_is() -> None:
    query, key, value = inputs()
    parts = [
        attention_with_entropy(query, key[:, :, cut], value[:, :, cut])
        for cut in (slice(0, 5), slice(5, 12))
    ]
    expected = attention_with_entropy(query, key, value)
    merged = merge_attention(parts)
    assert worst_error([merged.entropy], [expected.entropy]) <= 1e-13
    assert worst_error([merged.output], [expected.output]) <= 1e-13


def test_merging_is_associative() -> None:
    tensors = inputs()
    a, b, c = (shard(tensors, *pair) for pair in ((0, 4), (4, 7), (7, 12)))
    left = merge_attention([merge_attention([a, b]), c])
    right = merge_attention([a, merge_attention([b, c])])
    assert worst_error(list(left), list(right)) <= 1e-13


def test_wrong_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="no shard was given"):
        merge_attention([])
    one = shard(inputs(), 0, 4)
    with pytest.raises(ValueError, match="shard 1 has shapes"):
        merge_attention([one, (one[0][:1], one[1], one[2])])
    with pytest.raises(TypeError, match="shard 1 is a Tensor; pass"):
        merge_attention([one, one[0]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="shard 0 is a tuple of 2; pass"):
        merge_attention([one[:2]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="entropy of shard 0 is a NoneType"):
        merge_attention([(one[0], None, one[2])])  # type: ignore[list-item]
