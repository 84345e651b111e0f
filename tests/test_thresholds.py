from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from entropy_regularization.monitoring.statistics import Band
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import HeadThresholds, as_tensor, without_weight_decay


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
    module = HeadThresholds(np.int64(2), np.int64(3), np.array([0.25, 0.5, 0.75]))
    assert module().tolist() == [[0.25, 0.5, 0.75]] * 2
    with pytest.raises(TypeError, match="learnable is 'no'; pass True or False"):
        HeadThresholds(2, 3, learnable="no")


def test_thresholds_of_a_model_that_is_built_on_meta() -> None:
    given = [0.25, 0.5, 0.75]
    with torch.device("meta"):
        module = HeadThresholds(2, 3, given)
        of_tensor = HeadThresholds(2, 3, torch.tensor(given, device="cpu"))
        with pytest.raises(ValueError, match=r"initial has 1\.5, which is not in"):
            HeadThresholds(2, 3, 1.5)
        with pytest.raises(
            ValueError, match="initial lies on the meta device and holds no numbers"
        ):
            HeadThresholds(2, 3, module)
    assert of_tensor().tolist() == [given] * 2
    assert module().is_meta
    given[0] = 7.0  # the list is not kept
    with torch.device("meta"):
        module.to_empty(device="cpu").reset_parameters()
    assert module().tolist() == [[0.25, 0.5, 0.75]] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((0, 3), ValueError, "layers is 0; pass a positive integer"),
        ((2, 3.0), TypeError, "heads is 3.0; pass a positive integer"),
        ((2, 3, [0.5, 0.5]), ValueError, r"initial has shape \(2,\); pass a number, \(3,\) or"),
        ((2, 3, 1.5), ValueError, r"initial has 1.5, which is not in \[0, 1\]"),
        ((2, 3, float("nan")), ValueError, r"initial has nan, which is not"),
        ((2, True), TypeError, "heads is True; pass a positive integer"),
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
    with pytest.raises(TypeError, match="model is a NoneType; pass a torch"):
        without_weight_decay(None, 0.1)
    for decay in ("x", -1):
        with pytest.raises(ValueError, match=f"weight_decay is {decay!r}; pass a number, 0 or"):
            without_weight_decay(model, decay)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("wrong", [NAN, INF, -0.1, 5.0, [0.5, NAN], [[0.5], [1.5]]])
@pytest.mark.parametrize(
    "give",
    [
        lambda x: as_tensor(x, "thresholds"),
        lambda x: EntropyRegularization(thresholds=x),
        lambda x: EntropyRegularization(thresholds=torch.tensor(x)),
        lambda x: EntropyRegularization(thresholds=torch.tensor(x).double()),
        lambda x: Band(x),
        lambda x: EntropyRegularization().compute_loss([torch.ones(1, 2, 2, 2)] * 2, x, 2, 2),
    ],
)
def test_numbers_that_are_no_fractions_are_refused(wrong: object, give: Callable) -> None:
    with pytest.raises(ValueError, match=r"has \S+, which is not in \[0, 1\]; pass fractions"):
        give(wrong)


def test_what_was_learned_may_leave_the_unit_interval() -> None:
    module = HeadThresholds(1, 2)
    with torch.no_grad():
        module.fraction_bias += 1
    for learned in (module, module(), module() + 0):
        assert EntropyRegularization(thresholds=learned).thresholds is learned
    assert as_tensor(module().detach(), "thresholds").max() > 1


def test_conversion_to_half_precision_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A step of 1e-3 is lost from 0.5 on in bfloat16."""
    nn.Sequential(HeadThresholds(2, 3)).double().float().to("cpu")
    HeadThresholds(2, 3, learnable=False).half()
    assert not caplog.messages
    model = nn.Sequential(HeadThresholds(2, 3)).to(torch.bfloat16)
    (message,) = caplog.messages
    assert "the thresholds were converted to torch.bfloat16, where the small steps" in message
    model.to("cpu")
    assert len(caplog.messages) == 1
