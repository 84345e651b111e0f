"""EntropyRegularization gives the published module's numbers, and refuses what it cannot use."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_regularization import (
    EntropyRecording,
    EntropyRegularization,
    HeadThresholds,
    LayerEntropy,
    attention_with_entropy,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "published_module.json").read_text())
CASES = [pytest.param(case, id=case["name"]) for case in GOLDEN["cases"]]
TIGHT = {"rtol": 0.0, "atol": 1e-9}


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def regularization_of(case: dict[str, Any]) -> EntropyRegularization:
    return EntropyRegularization(
        case["loss_coeff"], case["tolerance_margin_factor"], case["context_size"]
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["tensor", "table"])
def test_golden_loss_and_gradients(case: dict[str, Any], form: str) -> None:
    matrices = [tensor(matrix).requires_grad_() for matrix in case["attentions"]]
    vector = tensor(case["reg_threshold_weights"]).requires_grad_()
    thresholds = vector if form == "tensor" else vector.expand(len(matrices), -1)
    loss = regularization_of(case).compute_loss(
        matrices, thresholds, case["num_heads"], case["num_layers"]
    )
    expected = case["expected"]
    torch.testing.assert_close(loss, tensor(expected["loss"]), **TIGHT)
    found = torch.autograd.grad(loss, [vector, *matrices], materialize_grads=True)
    torch.testing.assert_close(found[0], tensor(expected["grad_threshold"]), **TIGHT)
    for gradient, golden in zip(found[1:], expected["grad_attentions"], strict=True):
        torch.testing.assert_close(gradient, tensor(golden), **TIGHT)


@pytest.mark.parametrize("case", CASES)
def test_golden_with_thresholds_as_a_list(case: dict[str, Any]) -> None:
    matrices = [tensor(matrix) for matrix in case["attentions"]]
    loss = regularization_of(case).compute_loss(
        matrices, case["reg_threshold_weights"], case["num_heads"], case["num_layers"]
    )
    torch.testing.assert_close(loss, tensor(case["expected"]["loss"]), **TIGHT)


@pytest.mark.parametrize("case", CASES)
def test_golden_entropy_and_metrics(case: dict[str, Any]) -> None:
    matrices = [tensor(matrix) for matrix in case["attentions"]]
    for matrix, golden in zip(matrices, case["expected"]["entropy"], strict=True):
        entropy = EntropyRegularization.compute_entropy(matrix)
        torch.testing.assert_close(entropy, tensor(golden), **TIGHT)
    metrics = EntropyRegularization.log_entropy_metrics(matrices, step=3)
    assert metrics.keys() == case["expected"]["metrics"].keys()
    for name, golden in case["expected"]["metrics"].items():
        assert math.isclose(metrics[name], golden, rel_tol=0.0, abs_tol=1e-9)


def test_metrics_reach_the_logger_with_their_step() -> None:
    class Logger:
        seen: tuple[dict[str, float], int] | None = None

        def log(self, metrics: dict[str, float], step: int) -> None:
            self.seen = (metrics, step)

    logger = Logger()
    matrix = torch.full((1, 2, 3, 4), 0.25)
    metrics = EntropyRegularization.log_entropy_metrics([matrix], 7, logger)
    assert logger.seen == (metrics, 7)
    assert math.isclose(metrics["attn.0.head.1.entropy"], math.log(4), rel_tol=1e-6)


MATRIX = torch.full((2, 3, 4, 4), 0.25)
WRONG = [
    ({"attentions": []}, ValueError, "attentions is empty"),
    ({"attentions": [MATRIX, MATRIX[:1]]}, ValueError, "attentions[1] has batch size 1"),
    ({"attentions": [MATRIX[0]]}, ValueError, "attentions[0] has shape (3, 4, 4)"),
    ({"attentions": [MATRIX.long()]}, TypeError, "attentions[0] has dtype torch.int64"),
    ({"attentions": ["matrix"]}, TypeError, "attentions[0] is a str"),
    ({"reg_threshold_weights": [0.5, 0.5]}, ValueError, "there are 2 thresholds"),
    ({"reg_threshold_weights": torch.ones(1, 3)}, ValueError, "there are 2 attention layers"),
    ({"reg_threshold_weights": torch.ones(2, 1, 3)}, ValueError, "pass [heads] or [layers, heads]"),
    ({"num_heads": 4}, ValueError, "num_heads is 4 but attentions[0] has 3 heads"),
    ({"num_heads": 0}, ValueError, "num_heads is 0"),
    ({"num_layers": 3}, ValueError, "num_layers is 3 but there are 2 matrices"),
]


@pytest.mark.parametrize(("change", "error", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_input_is_one_clear_sentence(
    change: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    arguments: dict[str, Any] = {
        "attentions": [MATRIX, MATRIX],
        "reg_threshold_weights": [0.5, 0.5, 0.5],
        "num_heads": 3,
        "num_layers": 2,
    }
    EntropyRegularization().compute_loss(**arguments)
    with pytest.raises(error) as caught:
        EntropyRegularization().compute_loss(**{**arguments, **change})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tolerance_margin_factor": -0.1}, "tolerance_margin_factor is -0.1"),
        ({"loss_coeff": float("nan")}, "loss_coeff is nan"),
        ({"context_size": 1}, "context_size is 1"),
        ({"penalty": "l1"}, "choose one of published, calibrated"),
        ({"reduction": "max"}, "choose one of sum, mean"),
        ({"maximum": "log2"}, "choose one of context, reachable"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EntropyRegularization(**arguments)


def recording_of(matrices: list[torch.Tensor], rows: torch.Tensor | None = None) -> EntropyRecording:
    layers = []
    for number, matrix in enumerate(matrices):
        real = torch.ones(matrix.shape[0], matrix.shape[2], dtype=torch.bool)
        layers.append(
            LayerEntropy(
                name=f"layer.{number}",
                kind="self",
                entropy=torch.special.entr(matrix).sum(-1),
                allowed_keys=(matrix > 0).sum(-1),
                rows=real if rows is None else rows,
                keys=matrix.shape[-1],
            )
        )
    return EntropyRecording(layers)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reduction": "mean"},
        {"maximum": "reachable"},
        {"penalty": "calibrated", "reduction": "mean", "maximum": "reachable"},
    ],
    ids=str,
)
def test_recording_gives_the_number_of_its_matrices(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 2, 3, 6, 6, generator=generator, dtype=torch.float64)
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    matrices = list(torch.softmax(scores.masked_fill(future, -torch.inf), -1))
    regularization = EntropyRegularization(0.3, 0.05, **settings)
    thresholds = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    by_matrices = regularization.compute_loss(matrices, thresholds, 3, 2)
    by_recording = regularization(recording_of(matrices), thresholds)
    assert by_matrices > 0
    torch.testing.assert_close(by_recording, by_matrices, rtol=1e-6, atol=0.0)


def test_calibrated_penalty_by_hand() -> None:
    """Two rows see 4 and 8 keys uniformly (u = 1), threshold 0.5, tolerance 0.2: excess 0.3."""
    uniform = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    uniform[0, 0, 0, :4], uniform[0, 0, 1] = 0.25, 0.125
    loss = EntropyRegularization.calibrated(2.0, 0.2)(recording_of([uniform]), 0.5)
    assert math.isclose(loss.item(), 2.0 * 0.3**2, rel_tol=1e-12)


def test_calibrated_strength_does_not_follow_batch_or_padding() -> None:
    matrix = torch.softmax(torch.randn(2, 3, 5, 5, dtype=torch.float64), -1)
    regularization = EntropyRegularization.calibrated(1.0, 0.01)
    once = regularization(recording_of([matrix]), 0.3)
    twice = regularization(recording_of([matrix.repeat(2, 1, 1, 1)]), 0.3)
    torch.testing.assert_close(once, twice)
    padded = torch.cat([matrix, torch.full_like(matrix, 0.2)])
    rows = torch.cat([torch.ones(2, 5), torch.zeros(2, 5)]).bool()
    torch.testing.assert_close(regularization(recording_of([padded], rows), 0.3), once)


def test_rows_that_see_one_key_are_left_out_of_the_reachable_maximum() -> None:
    query = torch.randn(1, 1, 1, 4, dtype=torch.float64, requires_grad=True)
    found = attention_with_entropy(query, query, query, causal=True)
    layer = LayerEntropy(
        "only", "self", found.entropy, found.allowed_keys, torch.ones(1, 1).bool(), 1
    )
    loss = EntropyRegularization.calibrated()(EntropyRecording([layer]), 0.5)
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, query)
    assert (gradient == 0).all()


def test_head_thresholds_learn_and_are_checked() -> None:
    thresholds = HeadThresholds(2, 3, initial=0.4)
    matrices = [torch.softmax(torch.randn(1, 3, 4, 4), -1) for _ in range(2)]
    loss = EntropyRegularization(1.0, 0.0)(recording_of(matrices), thresholds)
    loss.backward()
    assert thresholds.fraction_bias.grad is not None
    assert (thresholds.fraction_bias.grad != 0).all()
    for wrong in ({"layers": 0}, {"initial": 1.5}, {"initial": torch.zeros(3, 2)}):
        with pytest.raises(ValueError, match="pass"):
            HeadThresholds(**{"layers": 2, "heads": 3, **wrong})


def test_recording_without_layers_or_thresholds_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no attention layer"):
        EntropyRegularization()(EntropyRecording(), 0.5)
    with pytest.raises(ValueError, match="no thresholds were given"):
        EntropyRegularization()(recording_of([MATRIX]))
