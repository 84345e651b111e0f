import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_regularization.penalties import calibrated_penalty, published_penalty

PENALTIES = [published_penalty, calibrated_penalty]
fraction = st.floats(0.0, 1.0)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("maximum", [math.log(9), "per row"])
def test_gradcheck(penalty, maximum) -> None:
    torch.manual_seed(0)
    entropy = (3 * torch.rand(2, 3, 5, dtype=torch.float64)).requires_grad_()
    thresholds = torch.rand(3, dtype=torch.float64, requires_grad=True)
    if maximum == "per row":
        maximum = torch.tensor([0.0, 0.7, 1.0, 1.5, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, t: penalty(h, t, maximum, tolerance=0.07), (entropy, thresholds)
    )


@settings(deadline=None, max_examples=50)
@given(u=fraction, theta=fraction, tolerance=fraction, maximum=st.floats(0.1, 12.0))
def test_both_are_zero_inside_the_band_and_squares_outside(u, theta, tolerance, maximum) -> None:
    entropy = torch.full((1, 1, 1), u * maximum, dtype=torch.float64)
    thresholds = torch.tensor([theta], dtype=torch.float64)
    distance = abs(u - theta)
    published = published_penalty(entropy, thresholds, maximum, tolerance=tolerance).item()
    calibrated = calibrated_penalty(entropy, thresholds, maximum, tolerance=tolerance).item()
    if distance < tolerance - 1e-9:
        assert published == calibrated == 0.0
    elif distance > tolerance + 1e-9:
        assert published == pytest.approx((distance * maximum) ** 2)
        assert calibrated == pytest.approx((distance - tolerance) ** 2, abs=1e-12)


def test_calibrated_is_continuous_at_the_margin_and_published_is_not() -> None:
    thresholds, edge = torch.tensor([0.5], dtype=torch.float64), 0.7
    entropy = torch.tensor([[[edge - 1e-6, edge + 1e-6]]], dtype=torch.float64)
    below, above = calibrated_penalty(entropy, thresholds, 1.0, tolerance=0.2)[0, 0]
    assert below == 0
    assert 0 < above < 1e-11
    below, above = published_penalty(entropy, thresholds, 1.0, tolerance=0.2)[0, 0]
    assert below == 0
    assert above > 0.039


def test_calibrated_row_without_reach_is_finite() -> None:
    entropy = torch.zeros(1, 1, 1, requires_grad=True)
    penalty = calibrated_penalty(entropy, torch.tensor([0.5]), torch.zeros(1), tolerance=0.1)
    penalty.sum().backward()
    assert penalty.item() == pytest.approx(0.16)
    assert entropy.grad.item() == 0.0
