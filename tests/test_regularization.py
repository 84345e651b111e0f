"""The published interface: golden numbers, options, refusals."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from entropy_regularization import regularization
from entropy_regularization.penalties import layers as penalised_layers
from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy
from entropy_regularization.regularization import EntropyRegularization, _warn_of_no_gradient
from entropy_regularization.thresholds import HeadThresholds

GOLDEN = json.loads((Path(__file__).parent / "golden" / "published_module.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
EXACT = {"rtol": 0.0, "atol": 1e-9}


def matrices_of(case: dict) -> list[torch.Tensor]:
    layers = [torch.tensor(layer, dtype=torch.float64) for layer in case["attentions"]]
    return [layer.requires_grad_() for layer in layers]


def object_of(case: dict) -> EntropyRegularization:
    names = ("loss_coeff", "tolerance_margin_factor", "context_size")
    return EntropyRegularization(**{name: case[name] for name in names})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["tensor", "list", "layers x heads"])
def test_golden_loss_and_gradients(name: str, form: str) -> None:
    case, expected = CASES[name], CASES[name]["expected"]
    matrices = matrices_of(case)
    thresholds = torch.tensor(case["reg_threshold_weights"], dtype=torch.float64)
    if form == "layers x heads":
        thresholds = thresholds.repeat(len(matrices), 1)
    given = thresholds.tolist() if form == "list" else thresholds.requires_grad_()
    loss = object_of(case).compute_loss(matrices, given, case["num_heads"], case["num_layers"])
    torch.testing.assert_close(loss.item(), expected["loss"], **EXACT)
    loss.backward()
    for matrix, gradient in zip(matrices, expected["grad_attentions"], strict=True):
        torch.testing.assert_close(
            matrix.grad, torch.tensor(gradient, dtype=torch.float64), **EXACT
        )
    if form != "list":
        gradient = thresholds.grad.view(-1, thresholds.shape[-1]).sum(0)
        wanted = torch.tensor(expected["grad_threshold"], dtype=torch.float64)
        torch.testing.assert_close(gradient, wanted, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_golden_entropies_and_metrics(name: str) -> None:
    case, expected = CASES[name], CASES[name]["expected"]
    matrices = matrices_of(case)
    for matrix, entropy in zip(matrices, expected["entropy"], strict=True):
        wanted = torch.tensor(entropy, dtype=torch.float64)
        found = EntropyRegularization.compute_entropy(matrix)
        torch.testing.assert_close(found, wanted, **EXACT)
    seen = {}
    metrics = EntropyRegularization.log_entropy_metrics(
        matrices, 7, lambda values, step: seen.update(values, step=step)
    )
    assert metrics.keys() == expected["metrics"].keys()
    for key, value in expected["metrics"].items():
        assert metrics[key] == pytest.approx(value, abs=1e-9)
    assert seen == {**metrics, "step": 7}


def test_loggers(caplog: pytest.LogCaptureFixture) -> None:
    class Run:
        def log(self, metrics: dict, step: int) -> None:
            self.got = (metrics, step)

    matrices, run = [torch.full((1, 1, 2, 2), 0.5)], Run()
    metrics = EntropyRegularization.log_entropy_metrics(matrices, 3, run)
    assert run.got == (metrics, 3)
    with caplog.at_level(logging.INFO):
        EntropyRegularization.log_entropy_metrics(matrices, 3, logging.getLogger("run"))
    assert "attn.0.head.0.entropy" in caplog.text
    with pytest.raises(TypeError, match="logger is a int; pass an object with log"):
        EntropyRegularization.log_entropy_metrics(matrices, 3, 5)


def test_half_precision_entropy_has_finite_gradient() -> None:
    matrix = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], dtype=torch.float16, requires_grad=True)
    entropy = EntropyRegularization.compute_entropy(matrix)
    entropy.sum().backward()
    assert entropy.dtype == torch.float32
    assert matrix.grad.isfinite().all()
    torch.testing.assert_close(entropy[0, 0, 1].item(), math.log(2), rtol=1e-6, atol=0)


GOOD = [torch.rand(2, 3, 4, 4).softmax(-1) for _ in range(2)]


@pytest.mark.parametrize(
    ("attentions", "thresholds", "heads", "layers", "error", "sentence"),
    [
        ([], [0.5] * 3, 3, 2, ValueError, "attentions is empty; load the model with attn_imp"),
        (
            None,
            [0.5] * 3,
            3,
            2,
            TypeError,
            "attentions is None; load the model with attn_impl.* or",
        ),
        ((None, None), [0.5] * 3, 3, 2, TypeError, "is a NoneType; .* output_attentions=True, or"),
        (3, [0.5] * 3, 3, 2, TypeError, "attentions is a int; pass one matrix per layer"),
        (GOOD, 10**400, 3, 2, ValueError, "has a number beyond all floats; pass a number"),
        ((), [0.5] * 3, 3, 0, ValueError, "attentions is empty"),
        ([None], [0.5] * 3, 3, 1, TypeError, r"attentions\[0\] is a NoneType; pass a tensor"),
        ([GOOD[0], GOOD[1][:1]], [0.5] * 3, 3, 2, ValueError, "has batch 1 but the first"),
        (GOOD, [0.5] * 2, 3, 2, ValueError, "has 2 thresholds a layer but 3 heads"),
        (GOOD, torch.ones(3, 3), 3, 2, ValueError, "but there are 2 layers"),
        (GOOD, torch.ones(1, 1, 3), 3, 2, ValueError, r"has shape \(1, 1, 3\)"),
        (GOOD, torch.ones(3).long(), 3, 2, TypeError, "has dtype torch.int64; pass a number"),
        (GOOD, "0.5", 3, 2, TypeError, "is a str; pass a number, a list"),
        (GOOD, ["a", "b", "c"], 3, 2, TypeError, "entries that are not numbers"),
        (GOOD, [[0.5] * 3, [0.5]], 3, 2, ValueError, "rows of different lengths"),
        (GOOD, [0.5] * 4, 4, 2, ValueError, r"num_heads is 4 but attentions\[0\] has 3 heads"),
        (GOOD, [0.5] * 3, 3, 3, ValueError, "num_layers is 3 but attentions has 2 matrices"),
        (GOOD, [0.5] * 3, 3, 1, ValueError, "num_layers is 1 but attentions has 2 matrices"),
        (GOOD, [0.5] * 3, 0, 2, ValueError, "num_heads is 0; pass a positive integer"),
        (GOOD, [0.5] * 3, 3.0, 2, TypeError, "num_heads is 3.0; pass a positive integer"),
        ([GOOD[0].long()], [0.5] * 3, 3, 1, TypeError, "has dtype torch.int64; pass a floating"),
        ([GOOD[0][0]], [0.5] * 3, 3, 1, ValueError, r"has shape \(3, 4, 4\); pass \[batch, heads"),
    ],
)
def test_wrong_input_is_one_sentence(
    attentions: object,
    thresholds: object,
    heads: int,
    layers: int,
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        EntropyRegularization().compute_loss(attentions, thresholds, heads, layers)


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"tolerance_margin_factor": -0.1}, ValueError, "tolerance_margin_factor is -0.1; pass a"),
        ({"loss_coeff": -1.0}, ValueError, "loss_coeff is -1.0; pass a finite number"),
        ({"loss_coeff": math.nan}, ValueError, "loss_coeff is nan"),
        ({"loss_coeff": "1"}, TypeError, "loss_coeff is '1'; pass a number"),
        ({"context_size": 1}, ValueError, "context_size is 1; pass at least 2"),
        ({"context_size": 8.0}, TypeError, "context_size is 8.0; pass an integer"),
        ({"penalty": "l2"}, ValueError, "penalty is 'l2'; choose one of published, calibrated"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'; choose one of sum, mean"),
        ({"maximum": "n"}, ValueError, "maximum is 'n'; choose one of context, reachable"),
        ({"thresholds": "a"}, TypeError, "thresholds is a str; pass a number"),
        ({"loss_coeff": 10**400}, ValueError, "loss_coeff is 10{38}.; pass a finite number"),
        ({"loss_coeff": np.bool_(True)}, TypeError, "loss_coeff is .*; pass a number"),
        ({"context_size": 10**400}, ValueError, "context_size is 10{38}.; pass at least 2"),
        ({"reduction": ""}, ValueError, "reduction is ''; choose one of sum, mean"),
        ({"maximum": ""}, ValueError, "maximum is ''; choose one of context, reachable"),
        ({"penalty": np.ones(2)}, ValueError, "penalty is .*; choose one of published"),
        ({"count_padding": "no"}, TypeError, "count_padding is 'no'; pass True or False"),
        ({"across_ranks": "yes"}, TypeError, "across_ranks is 'yes'; pass True or False"),
    ],
)
def test_wrong_settings_are_one_sentence(
    settings: dict, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        EntropyRegularization(**settings)


def test_numbers_of_numpy_are_numbers() -> None:
    given = EntropyRegularization(np.float32(0.5), np.float64(0.25), np.int64(8))
    given.thresholds = np.array([0.25, 0.5, 0.75])
    plain = EntropyRegularization(0.5, 0.25, 8, thresholds=[0.25, 0.5, 0.75])
    recording = causal_case()[1]
    assert given(recording) == plain(recording)
    found = given.compute_loss(GOOD, np.float32(0.25), np.int64(3), 2)
    assert found == plain.compute_loss(GOOD, 0.25, 3, 2) > 0


def causal_case(
    batch: int = 2, heads: int = 3, n: int = 6, layers: int = 2
) -> tuple[list[torch.Tensor], EntropyRecording, torch.Tensor]:
    """Stored causal matrices, and the recording that an exact recorder would make of them."""
    torch.manual_seed(0)
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    scores = [3 * torch.randn(batch, heads, n, n, dtype=torch.float64) for _ in range(layers)]
    matrices = [s.masked_fill(~allowed, -torch.inf).softmax(-1) for s in scores]
    counts = torch.arange(1, n + 1).view(1, 1, n)
    recorded = [
        LayerEntropy(
            name=f"h.{layer}.attn",
            kind="self",
            entropy=torch.special.entr(matrix).sum(-1),
            allowed_keys=counts,
            rows=torch.ones(batch, n, dtype=torch.bool),
            keys=n,
        )
        for layer, matrix in enumerate(matrices)
    ]
    return matrices, EntropyRecording(recorded), allowed


@pytest.mark.parametrize("penalty", ["published", "calibrated"])
@pytest.mark.parametrize("reduction", [None, "sum", "mean"])
@pytest.mark.parametrize("maximum", [None, "context", "reachable"])
def test_recording_equals_matrices(penalty: str, reduction: str, maximum: str) -> None:
    matrices, recording, allowed = causal_case()
    thresholds = torch.rand(2, 3, dtype=torch.float64)
    regularization = EntropyRegularization(
        1.0, 0.05, penalty=penalty, reduction=reduction, maximum=maximum
    )
    stored = regularization.compute_loss(matrices, thresholds, 3, 2, allowed=allowed)
    assert stored > 0
    torch.testing.assert_close(
        regularization(recording, thresholds=thresholds), stored, rtol=1e-7, atol=1e-9
    )


def test_calibrated_is_the_formula() -> None:
    _, recording, _ = causal_case()
    thresholds = torch.rand(2, 3, dtype=torch.float64)
    total = 0.0
    for layer, theta in zip(recording, thresholds, strict=True):
        for head in range(3):
            squares = []
            for b in range(2):
                for i in range(1, 6):  # the first row sees one key and is left out
                    u = layer.entropy[b, head, i].item() / math.log(i + 1)
                    squares.append(max(abs(u - theta[head].item()) - 0.1, 0) ** 2)
            total += sum(squares) / len(squares) / 3 / 2
    found = EntropyRegularization.calibrated(0.5, 0.1)(recording, thresholds)
    assert found.item() == pytest.approx(0.5 * total, rel=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_padding_rows(reduction: str) -> None:
    _, recording, _ = causal_case()
    kept = EntropyRecording(
        [
            LayerEntropy(
                x.name, x.kind, x.entropy[:, :, :4], x.allowed_keys[..., :4], x.rows[:, :4], 6
            )
            for x in recording
        ]
    )
    for layer in recording:
        layer.rows[:, 4:] = False
    options = {"reduction": reduction, "thresholds": 0.3}
    skipping = EntropyRegularization(1.0, 0.0, count_padding=False, **options)
    counting = EntropyRegularization(1.0, 0.0, **options)
    torch.testing.assert_close(skipping(recording), counting(kept))
    assert not torch.isclose(counting(recording), counting(kept))
    calibrated = EntropyRegularization(1.0, 0.0, penalty="calibrated", **options)
    torch.testing.assert_close(calibrated(recording), calibrated(kept))


@pytest.mark.parametrize("penalty", ["published", "calibrated"])
@pytest.mark.parametrize("counts", [True, False])
def test_nan_comes_through_where_it_counts_and_only_there(penalty: str, counts: bool) -> None:
    layer = causal_case()[1][0]
    layer.entropy[0, 1, 4] = math.nan
    layer.rows[0, 4] = counts
    entropy = layer.entropy.requires_grad_()
    loss = EntropyRegularization(1.0, 0.1, penalty=penalty, count_padding=False)(
        EntropyRecording([layer])
    )
    loss.backward()
    assert loss.isnan() == counts
    assert entropy.grad[:, :, :4].isfinite().all()
    assert counts or entropy.grad[0, 1, 4] == 0


def test_nan_in_a_stored_matrix_counts_as_0_as_published() -> None:
    matrix = torch.full((1, 1, 2, 3), math.nan)
    assert EntropyRegularization.compute_entropy(matrix).abs().max() == 0


def test_calibrated_strength_does_not_follow_batch_or_length() -> None:
    losses = []
    for batch, n in ((1, 9), (4, 9), (1, 500)):
        counts = torch.arange(1, n + 1).view(1, 1, n)
        entropy = (0.9 * counts.double().log()).expand(batch, 2, n)
        layer = LayerEntropy("a", "self", entropy, counts, torch.ones(batch, n).bool(), n)
        regularization = EntropyRegularization(1.0, 0.1, penalty="calibrated")
        losses.append(regularization(EntropyRecording([layer])).item())
    assert losses == pytest.approx([0.09] * 3)  # (0.9 - 0.5 - 0.1)^2


@pytest.mark.parametrize("most_rows", [penalised_layers.MOST_ROWS, 100, 1])
@pytest.mark.parametrize("penalty", ["published", "calibrated"])
def test_layers_are_penalised_together_as_one_by_one(
    penalty: str, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever share a mask, have other heads, or allow each head something else."""
    generator = torch.Generator().manual_seed(0)
    counts = [torch.arange(1, 7).expand(1, heads, 6) for heads in (1, 1, 3)]
    rows = [torch.rand(2, 6, generator=generator) > 0.3 for _ in counts]
    layers = []
    for place, mask in enumerate([0, 1, 0, 2, 1, 0, 2, 0]):
        entropy = torch.rand(2, 2 if place == 5 else 3, 6, generator=generator) * 1.5
        kind = (f"h.{place}", "self", entropy.double().requires_grad_())
        layers.append(LayerEntropy(*kind, counts[mask], rows[mask], 6))
    thresholds = torch.rand(8, 3, generator=generator, dtype=torch.float64).requires_grad_()
    inputs = [thresholds, *(layer.entropy for layer in layers)]
    settings = EntropyRegularization(
        1.0, 0.05, penalty=penalty, reduction="mean", across_ranks=True
    )
    counts_in_order = []
    monkeypatch.setattr(
        regularization,
        "mean_count_over_ranks",
        lambda pairs: counts_in_order.append(pairs[0].count) or pairs,
    )
    one_by_one = torch.stack(
        [
            settings(EntropyRecording([layer]), vector[: layer.heads])
            for layer, vector in zip(layers, thresholds, strict=True)
        ]
    ).mean()
    monkeypatch.setattr(penalised_layers, "MOST_ROWS", most_rows)
    together = settings(EntropyRecording(layers), thresholds)
    torch.testing.assert_close(together, one_by_one)
    torch.testing.assert_close(
        torch.autograd.grad(together, inputs), torch.autograd.grad(one_by_one, inputs)
    )
    assert torch.equal(counts_in_order[-1], torch.cat(counts_in_order[:-1]))  # what ranks add up


def test_layers_with_different_heads_and_default_thresholds() -> None:
    _, recording, _ = causal_case()
    recording.layers[1] = recording.layers[1].select_heads([0])
    module = HeadThresholds(2, 3, 0.4)
    regularization = EntropyRegularization(1.0, 0.0, thresholds=module)
    regularization(recording).backward()
    assert (module.fraction_bias.grad[0] != 0).all()
    assert module.fraction_bias.grad[1].tolist()[1:] == [0.0, 0.0]
    fixed = EntropyRegularization(1.0, 0.0)
    torch.testing.assert_close(fixed(recording), fixed(recording, thresholds=[0.5, 0.5, 0.5]))


@pytest.mark.parametrize("thresholds", [0.5, [0.1, 0.5, 0.9], [[0.1, 0.5, 0.9]] * 2])
def test_numbers_break_no_compiled_graph(thresholds: object) -> None:
    regularization = EntropyRegularization(1.0, 0.0)
    compiled = torch.compile(
        lambda *matrices: regularization.compute_loss(matrices, thresholds, 3, 2),
        fullgraph=True,
        backend="eager",
    )
    assert compiled(*GOOD) == regularization.compute_loss(GOOD, thresholds, 3, 2) > 0


def test_a_penalty_that_cannot_train_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_no_gradient.cache_clear()
    regularization, recording = EntropyRegularization(), causal_case()[1]
    with torch.no_grad():  # watching its value
        regularization(recording)
    for layer in recording:
        layer.entropy.requires_grad_()
    regularization(recording)
    assert caplog.text == ""
    for _ in range(2):
        regularization(recording.detach(), HeadThresholds(2, 3))
    assert caplog.text.count("the recording carries no gradient, so its penalty cannot train") == 1


def test_calls_refuse_what_is_no_recording() -> None:
    with pytest.raises(
        TypeError, match=r"recording is a list; pass the EntropyRecording of .* to compute_loss"
    ):
        EntropyRegularization()(GOOD)
    with pytest.raises(ValueError, match="the recording is empty; run a forward pass inside"):
        EntropyRegularization()(EntropyRecording())
    with pytest.raises(ValueError, match="maximum='reachable' needs to know which keys"):
        EntropyRegularization(penalty="calibrated").compute_loss(GOOD, 0.5, 3, 2)
    with pytest.raises(ValueError, match=r"allowed has shape \(5, 5\), which does not broadcast"):
        EntropyRegularization().compute_loss(GOOD, 0.5, 3, 2, allowed=torch.ones(5, 5).bool())
    with pytest.raises(TypeError, match="allowed has dtype torch"):
        EntropyRegularization().compute_loss(GOOD, 0.5, 3, 2, allowed=torch.ones(4, 4))
    with pytest.raises(TypeError, match="allowed is a ndarray; pass a torch"):
        EntropyRegularization().compute_loss(GOOD, 0.5, 3, 2, allowed=np.ones((4, 4), bool))
    with pytest.raises(TypeError, match="attention_matrices is None; load the model with"):
        EntropyRegularization.log_entropy_metrics(None, 0)
    for extra in ([0.5] * 4, HeadThresholds(2, 4)):
        with pytest.raises(ValueError, match="has 4 thresholds a layer but 3 heads are asked"):
            EntropyRegularization()(causal_case()[1], thresholds=extra)
    with pytest.raises(ValueError, match="has 2 thresholds a layer but 3 heads"):
        EntropyRegularization()(causal_case()[1], thresholds=[0.5, 0.5])
