import pytest
import torch
from torch import nn

from entropy_regularization.thresholds import HeadThresholds, without_weight_decay


def test_initial_values_and_learnable() -> None:
    assert HeadThresholds(2, 3)().tolist() == [[0.5] * 3] * 2
    assert HeadThresholds(2, 3, [0.25, 0.5, 0.75])().tolist() == [[0.25, 0.5, 0.75]] * 2
    values = torch.rand(2, 3)
    module = HeadThresholds(2, 3, values, learnable=False)
    assert torch.equal(module(), values)
    assert not module().requires_grad
    values.zero_()
    assert module().min() > 0  # a copy
    assert "layers=2, heads=3, learnable=False" in repr(module)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((0, 3), ValueError, "layers is 0; pass a positive integer"),
        ((2, 3.0), TypeError, "heads is 3.0; pass a positive integer"),
        ((2, 3, [0.5, 0.5]), ValueError, r"initial has shape \(2,\); pass a number, \(3,\) or"),
        ((2, 3, 1.5), ValueError, "initial leaves"),
        ((2, 3, float("nan")), ValueError, r"initial leaves \[0, 1\]; pass fractions"),
        ((2, 3, None), TypeError, "initial is a NoneType; pass a number"),
    ],
)
def test_refusals(arguments: tuple, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        HeadThresholds(*arguments)


def test_groups_without_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), HeadThresholds(2, 3))
    model[0].bias.requires_grad_(False)
    decayed, kept = without_weight_decay(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert kept["weight_decay"] == 0.0
    assert [id(p) for p in kept["params"]] == [id(model[1].fraction_bias)]
    with pytest.raises(ValueError, match="Linear holds no HeadThresholds; call regularize"):
        without_weight_decay(nn.Linear(2, 2), 0.1)
