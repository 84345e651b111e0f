"""Merging shards of the keys gives the attention over all of them."""

import itertools

import pytest
import torch
from cases import worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("cuts", [[0, 12], [0, 1, 7, 12]])
def test_sinks_join_the_whole(cuts: list[int]) -> None:
    tensors = inputs()
    sinks = torch.tensor([-2.0, 0.0, 1.0, 30.0], dtype=torch.float64, requires_grad=True)
    parts = [shard(tensors, *pair) for pair in itertools.pairwise(cuts)]
    merged = merge_attention(parts, sinks=sinks)
    found = attention_with_entropy(
        *tensors, allowed=allowed(), sinks=sinks, implementation="reference"
    )
    expected = (found.output, found.entropy, found.log_normalizer)
    assert worst_error(list(merged), list(expected)) <= 1e-13
    derivatives = [gradients(triple, [*tensors, sinks]) for triple in (merged, expected)]
    assert worst_error(*derivatives) <= 1e-12


def test_a_sink_of_infinity_leaves_nothing() -> None:
    tensors = inputs()
    sinks = torch.tensor([-torch.inf, 0.0, torch.inf, 1.0], dtype=torch.float64, requires_grad=True)
    merged = merge_attention([shard(tensors, 0, 7), shard(tensors, 7, 12)], sinks=sinks)
    found = attention_with_entropy(*tensors, allowed=allowed(), sinks=sinks)
    assert (merged.entropy[:, 2] == 0).all()
    assert worst_error(list(merged[:2]), list(found[:2])) <= 1e-13
    derivatives = [
        list(
            torch.autograd.grad(
                [*triple[:2]], [*tensors, sinks], [*map(torch.ones_like, triple[:2])]
            )
        )
        for triple in (merged, found)
    ]
    assert worst_error(*derivatives) <= 1e-12


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 12), max_size=4).map(sorted),
    seed=st.integers(0, 2**31),
    gain=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_any_partition_of_the_keys_gives_the_whole(cuts: list[int], seed: int, gain: float) -> None:
    """Empty shards too: ``H = sum w_a H_a + H(w)``, MATHEMATICS of merging."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, 2, length, 4, generator=generator, dtype=torch.float64)
        for length in (3, 12, 12)
    )
    parts = [
        attention_with_entropy(gain * query, key[:, :, start:stop], value[:, :, start:stop])
        for start, stop in itertools.pairwise([0, *cuts, 12])
    ]
    merged = merge_attention(parts)
    expected = attention_with_entropy(gain * query, key, value)
    assert worst_error(list(merged), list(expected[:3])) <= 1e-13


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
    with pytest.raises(TypeError, match=r"entropy of shard 0 has dtype torch\.int64"):
        merge_attention([(one[0], one[1].long(), one[2])])
    with pytest.raises(TypeError, match="shards are a NoneType"):
        merge_attention(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="entropy of shard 0 is on meta"):
        merge_attention([(one[0], one[1].to("meta"), one[2])])
    with pytest.raises(ValueError, match=r"sinks have shape \(3,\)"):
        merge_attention([one], sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="sinks are on meta"):
        merge_attention([one], sinks=torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match="sinks is a list"):
        merge_attention([one], sinks=[0.0] * 4)  # type: ignore[arg-type]
