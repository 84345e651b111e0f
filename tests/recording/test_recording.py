"""EntropyRecording: choosing layers and heads, means over the rows that count, joining batches."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from entropy_regularization import EntropyRecording, LayerEntropy, record_entropy


def layer(
    name: str = "layers.0.attn", batch: int = 2, heads: int = 3, n: int = 4, seed: int = 0
) -> LayerEntropy:
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(batch, heads, n, generator=generator, requires_grad=True)
    rows = torch.ones(batch, n, dtype=torch.bool)
    rows[0, -1] = False
    kind = "cross" if "cross" in name else "self"
    return LayerEntropy(name, kind, entropy, torch.arange(n)[None, None], rows, n)


@pytest.fixture
def recording() -> EntropyRecording:
    names = ("layers.0.attn", "layers.0.cross", "layers.1.attn", "layers.1.cross", "layers.1.attn")
    return EntropyRecording([layer(name) for name in names], ["head"])


def test_selection(recording: EntropyRecording) -> None:
    def names(**options: object) -> list[str]:
        return [each.name for each in recording.select(**options)]

    assert names(pattern="layers.0.*") == ["layers.0.attn", "layers.0.cross"]
    assert names(kind="cross") == ["layers.0.cross", "layers.1.cross"]
    assert names(indices=[-1, 0]) == ["layers.1.attn", "layers.0.attn"]
    assert names(pattern="*.attn", indices=range(3)) == ["layers.0.attn", "layers.1.attn"]
    assert names(indices=torch.tensor([1])) == ["layers.0.cross"]
    chosen = recording.select("*.0.attn", heads=[2, 0])
    assert torch.equal(chosen[0].entropy, recording[0].entropy[:, [2, 0]])
    assert chosen.missing == ["head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "decoder.*"}, "layers.0.attn, layers.0.cross"),
        ({"indices": []}, "indices is empty, which keeps no layer; pass places of calls"),
        ({"indices": [0], "kind": "cross"}, r"no recorded layer at indices \[0\] matches"),
        ({"indices": [7]}, "there are 5"),
        ({"heads": []}, "heads is empty, which keeps no head; pass places of heads"),
        ({"heads": [3]}, "head 3 was asked of layers.0.attn, which has 3"),
    ],
)
def test_what_is_not_there_is_said(
    recording: EntropyRecording, options: dict, message: str
) -> None:
    with pytest.raises(LookupError, match=message):
        recording.select(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": 3}, "pattern is 3; pass a pattern of names, or indices"),
        ({"indices": 3}, "indices is 3; pass a list of integers"),
        ({"indices": ["a"]}, "indices is .*; pass a list of integers"),
        ({"heads": [0.5]}, "heads is .*; pass a list of integers"),
        ({"heads": [True]}, "heads is .*; pass a list of integers"),
        ({"heads": torch.tensor([True, False, True])}, "heads is .*; pass a list of integers"),
    ],
)
def test_what_is_no_place_is_said(recording: EntropyRecording, options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        recording.select(**options)


def test_means_leave_out_padding_and_rows_without_keys(recording: EntropyRecording) -> None:
    one = recording[0]
    counted = torch.tensor([[False, True, True, False], [False, True, True, True]])
    for head, mean in enumerate(recording.mean_per_head()[0]):
        torch.testing.assert_close(mean, one.entropy[:, head][counted].mean())
    assert one.maximum.flatten().tolist() == pytest.approx([0.0, 0.0, math.log(2), math.log(3)])
    assert "layers.1.cross (cross) (2, 3, 4) mean 0." in repr(recording)


def test_detached_and_on_the_cpu(recording: EntropyRecording) -> None:
    assert recording[0].entropy.requires_grad
    away = recording.detach().cpu()
    assert not away[0].entropy.requires_grad
    assert torch.equal(away[0].entropy, recording[0].entropy)
    assert away.missing == ["head"]


def means(recording: EntropyRecording) -> Tensor:
    return torch.stack(recording.mean_per_head())


def test_batches_of_different_lengths_are_joined() -> None:
    parts = [
        EntropyRecording([layer(batch=batch, n=n, seed=n)], [f"missing {n}"])
        for batch, n in ((2, 4), (1, 6), (3, 2))
    ]
    whole = EntropyRecording.concatenate(parts)
    assert whole[0].entropy.shape == (6, 3, 6)
    assert whole[0].allowed_keys.shape == (6, 1, 6)
    assert whole[0].keys == 6
    assert whole.missing == ["missing 2", "missing 4", "missing 6"]
    count = torch.tensor([part[0].counted()[:, 0].sum() for part in parts])
    expected = sum(n * means(part) for n, part in zip(count, parts, strict=True)) / count.sum()
    torch.testing.assert_close(means(whole), expected)
    whole[0].entropy.sum().backward()
    assert all(part[0].entropy.grad is not None for part in parts)


def test_joining_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="no recording was given"):
        EntropyRecording.concatenate([])
    one, other = EntropyRecording([layer()]), EntropyRecording([layer("layers.1.attn")])
    for wrong in ([one, 3], [3], one, None):
        with pytest.raises(TypeError, match="; pass "):
            EntropyRecording.concatenate(wrong)
    message = "call 0 is layers.0.attn (self, 3 heads) in one and layers.1.attn (self, 3 heads) in"
    with pytest.raises(ValueError, match=re.escape(message)):
        EntropyRecording.concatenate([one, other])
    crossing = EntropyRecording([replace(layer(), kind="cross")])
    with pytest.raises(ValueError, match=r"layers.0.attn \(cross, 3 heads\) in another"):
        EntropyRecording.concatenate([one, crossing])
    longer = EntropyRecording([layer(), layer("layers.1.attn")])
    with pytest.raises(ValueError, match=r"call 1 is none in one and layers.1.attn"):
        EntropyRecording.concatenate([one, longer])


def test_what_is_not_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model is a str; pass a torch"), record_entropy("gpt2"):
        pass


@pytest.mark.parametrize("flag", ["gradient", "allow_partial"])
def test_flags_that_are_none_are_refused(flag: str) -> None:
    """The text "no" is true: a recording that must be whole would be a partial one."""
    model = nn.Linear(2, 2)
    with (
        pytest.raises(TypeError, match=f"{flag} is 'no'; pass True or False"),
        record_entropy(model, **{flag: "no"}),
    ):
        pass
