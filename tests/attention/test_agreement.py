"""Every implementation equals the specification: outputs, statistics, and every gradient."""

import itertools
import sys
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    Case,
    check_a_sink_of_infinity_leaves_nothing,
    check_large_scores,
    check_rows_without_keys_pass_nothing_on,
    gradients,
    worst_error,
)

from entropy_regularization import attention_with_entropy
from entropy_regularization.attention.api import attend
from entropy_regularization.attention.blockwise import Problem, blocking, chunk
from entropy_regularization.attention.compiled.build import unavailable_reason
from entropy_regularization.attention.masking import Structure, split_mask


def small_blocks(problem: Problem) -> blocking.Blocks:
    return blocking.Blocks(rows=3, batches=1, heads=1, keys=1)


@pytest.fixture(params=["chosen blocks", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small blocks":
        monkeypatch.setattr(blocking, "choose_blocks", small_blocks)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.usefixtures("blocks")
def test_blockwise_equals_reference(case: Case, dtype: torch.dtype, budget: float) -> None:
    inputs, options = case.build(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = case.run(exact, options, "reference")
    got = case.run(inputs, options, "blockwise")
    assert worst_error(list(got), list(expected)) <= budget
    assert worst_error(gradients(got, inputs), gradients(expected, exact)) <= budget


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widened", ["alone", "at once", "by piece"])
def test_low_precision_error_is_that_of_rounding_the_results(
    case: Case, dtype: torch.dtype, widened: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, entropies and sums are float32; only what is stored in ``dtype`` is rounded."""
    if widened != "alone":
        monkeypatch.setattr(blocking, "choose_blocks", small_blocks)
    if widened == "by piece":
        monkeypatch.setattr(chunk, "WIDENED_AT_ONCE", 0)
    inputs, options = case.build(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = case.run(exact, options, "reference")
    got = case.run(inputs, options, "blockwise")
    rounding = torch.finfo(dtype).eps
    assert got.entropy.dtype == torch.float32
    assert worst_error([got.entropy], [expected.entropy]) <= 1e-5
    assert worst_error([got.log_normalizer], [expected.log_normalizer]) <= 1e-5
    for ours, theirs in [
        (got.output, expected.output),
        *zip(gradients(got, inputs), gradients(expected, exact), strict=True),
    ]:
        assert ours.dtype == dtype
        assert worst_error([ours], [theirs]) <= 2 * rounding * (1 + theirs.abs().max().item())


def test_comparison_refuses_wrong_answers() -> None:
    right = torch.tensor([0.0, 1.0, -torch.inf])
    assert worst_error([right], [right]) == 0.0
    assert worst_error([right[:2]], [right]) == torch.inf
    assert worst_error([torch.tensor([0.0, 1.0, 3.0])], [right]) == torch.inf
    assert worst_error([torch.tensor([0.0, torch.nan, -torch.inf])], [right]) == torch.inf
    assert worst_error([torch.tensor([0.0, 1.5, -torch.inf])], [right]) == 0.5


GRADCHECKED = ("causal-left-padding", "dense-per-head", "softcap-bias-padding", "everything")


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in GRADCHECKED], ids=lambda case: case.name
)
def test_gradcheck_with_masked_keys(case: Case, implementation: str) -> None:
    inputs, options = case.build(torch.float64)

    def differentiable(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        got = case.run(list(tensors), options, implementation)
        normalizer = got.log_normalizer
        return got.output, got.entropy, normalizer.masked_fill(normalizer == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(differentiable, inputs)


@pytest.mark.parametrize(
    "wanted", [each for n in range(1, 6) for each in itertools.combinations(range(5), n)]
)
def test_any_subset_of_inputs_may_need_a_gradient(wanted: tuple[int, ...]) -> None:
    case = next(case for case in CASES if case.name == "everything")
    inputs, options = case.build(torch.float64)
    for place, tensor in enumerate(inputs):
        tensor.requires_grad_(place in wanted)
    chosen = [inputs[place] for place in wanted]
    differences = []
    for implementation in ("reference", "blockwise"):
        got = case.run(inputs, options, implementation)
        total = got.output.square().sum() + got.entropy.square().sum()
        differences.append(list(torch.autograd.grad(total, chosen, allow_unused=True)))
    expected = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for gradient, tensor in zip(differences[0], chosen, strict=True)
    ]
    assert worst_error(differences[1], expected) <= 1e-12


@pytest.mark.parametrize("through", ["output", "entropy", "log_normalizer"])
@pytest.mark.parametrize("name", ["causal", "sinks-window-padding", "everything"])
def test_upstream_gradients_may_be_missing(through: str, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs, options = case.build(torch.float64)
    found = []
    for implementation in ("reference", "blockwise"):
        got = getattr(case.run(inputs, options, implementation), through)
        total = got.masked_fill(got == -torch.inf, 0.0).square().sum()
        found.append(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))
    assert worst_error(list(found[1]), list(found[0])) <= 1e-12


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_rows_without_keys_are_zero_and_carry_no_gradient(implementation: str) -> None:
    case = next(case for case in CASES if case.name == "causal-left-padding")
    inputs, options = case.build(torch.float64)
    got = case.run(inputs, options, implementation)
    empty = got.allowed_keys.expand_as(got.entropy) == 0
    assert empty.any()
    assert (got.entropy[empty] == 0).all()
    assert (got.output[empty] == 0).all()
    assert (got.log_normalizer[empty] == -torch.inf).all()
    query_gradient = gradients(got, inputs)[0]
    assert (query_gradient[empty] == 0).all()
    assert (query_gradient[~empty] != 0).any()


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_sink_of_minus_infinity_is_none(implementation: str) -> None:
    case = next(case for case in CASES if case.name == "causal-left-padding")
    inputs, options = case.build(torch.float64)
    plain = case.run(inputs, options, implementation)
    options["sinks"] = torch.full((4,), -torch.inf, dtype=torch.float64)
    found = case.run(inputs, options, implementation)
    assert worst_error(list(found), list(plain)) <= 1e-14


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_sink_of_infinity_leaves_nothing(implementation: str) -> None:
    check_a_sink_of_infinity_leaves_nothing(implementation, torch.float64, "cpu")


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys_pass_nothing_on(implementation: str, sinks: bool) -> None:
    check_rows_without_keys_pass_nothing_on(implementation, sinks, "cpu")


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_scores(implementation: str, dtype: torch.dtype) -> None:
    check_large_scores(implementation, dtype, "cpu")


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_minus_infinity_in_a_bias_masks_its_key(implementation: str) -> None:
    inputs, _ = CASES[0].build(torch.float64)
    allowed = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    allowed[..., 4, :] = False
    bias = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    masked = attention_with_entropy(*inputs, allowed=allowed, implementation=implementation)
    biased = attention_with_entropy(*inputs, bias=bias, implementation=implementation)
    assert worst_error(list(biased[:4]), list(masked[:4])) <= 1e-12
    assert worst_error(gradients(biased, inputs), gradients(masked, inputs)) <= 1e-12


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "compiled"])
@pytest.mark.parametrize("where", ["query", "key", "bias", "mask"])
def test_nan_shows_in_every_row_that_sees_it(where: str, implementation: str) -> None:
    if implementation == "compiled" and (where in ("bias", "mask") or unavailable_reason()):
        pytest.skip("what the compiled kernel does not have, or none at all")
    query, key, value = (torch.randn(1, 2, 9, 4) for _ in range(3))
    mask = torch.zeros(1, 1, 9, 9).index_fill(3, torch.tensor([2]), -torch.inf)
    options: dict[str, Any] = {"causal": True, "implementation": implementation}
    if where in ("query", "key"):
        {"query": query[:, :, 5], "key": key[:, :, 0]}[where].fill_(torch.nan)
    else:
        mask[:, :, 5, 3] = torch.nan
        allowed, bias = (None, mask) if where == "bias" else split_mask(mask)
        options |= {"allowed": allowed, "bias": bias}
    found = attention_with_entropy(query, key, value, **options)
    nan = torch.arange(9) >= 0 if where == "key" else torch.arange(9) == 5
    for tensor in found[:4]:
        shows = tensor.isnan() if tensor.ndim == 3 else tensor.isnan().all(-1)
        assert torch.equal(shows, nan.expand(1, 2, 9))


@pytest.mark.parametrize("sizes", [(0, 4, 7, 9), (2, 0, 7, 9), (2, 4, 0, 9), (2, 4, 7, 0)])
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("full", [False, True])
def test_empty_batch_heads_queries_or_keys(
    sizes: tuple[int, ...], implementation: str, full: bool
) -> None:
    batch, heads, n_queries, n_keys = sizes
    options: dict[str, Any] = {}
    if full:
        options = {
            "causal": True,
            "window": (2, 0),
            "key_padding": torch.ones(batch, n_keys, dtype=torch.bool),
            "bias": torch.zeros(1, heads, n_queries, 1),
            "sinks": torch.zeros(heads),
            "softcap": 2.0,
            "dropout": 0.1,
        }
        if n_keys >= n_queries:
            options["document"] = torch.zeros(batch, n_keys, dtype=torch.int64)
    inputs = [
        torch.randn(batch, heads, n, 8, requires_grad=True) for n in (n_queries, n_keys, n_keys)
    ]
    got = attention_with_entropy(*inputs, implementation=implementation, **options)
    assert got.output.shape == (batch, heads, n_queries, 8)
    assert (got.entropy == 0).all()
    (got.output.sum() + got.entropy.sum()).backward()
    assert all(tensor.grad is not None and (tensor.grad == 0).all() for tensor in inputs)


@pytest.mark.parametrize("structure", [Structure(left=-100), Structure(left=-3, right=-2)])
def test_limits_of_a_host_may_be_negative(structure: Structure) -> None:
    inputs = [torch.randn(1, 2, 300, 4, dtype=torch.float64) for _ in range(3)]
    found = [
        attend(*inputs, structure, scale=0.5, implementation=implementation)
        for implementation in ("blockwise", "reference")
    ]
    assert worst_error(list(found[0]), list(found[1])) <= 1e-12


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("window", [(None, sys.maxsize), (sys.maxsize, None), (2**70, 2**70)])
def test_a_window_of_any_size(window: tuple[int | None, int | None], implementation: str) -> None:
    query, key, value = (torch.randn(1, 1, n, 4, dtype=torch.float64) for n in (5, 3, 3))
    plain = attention_with_entropy(query, key, value, implementation=implementation)
    found = attention_with_entropy(query, key, value, window=window, implementation=implementation)
    assert worst_error(list(found), [*plain[:4], torch.full((1, 1, 5), 3)]) <= 1e-14


def test_non_contiguous_and_expanded_inputs() -> None:
    base = torch.randn(2, 9, 4, 8, dtype=torch.float64)
    query = base.transpose(1, 2).requires_grad_()
    key = torch.randn(1, 1, 9, 8, dtype=torch.float64).expand(2, 4, 9, 8).requires_grad_()
    inputs = [query, key, base.flip(1).transpose(1, 2).requires_grad_()]
    found = [
        attention_with_entropy(*inputs, causal=True, implementation=implementation)
        for implementation in ("blockwise", "reference")
    ]
    assert worst_error(list(found[0]), list(found[1])) <= 1e-12
    assert worst_error(gradients(found[0], inputs), gradients(found[1], inputs)) <= 1e-12


@pytest.mark.parametrize("window", [None, (1200, 0)])
def test_many_keys_are_met_in_pieces(window: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        (2 * torch.randn(1, heads, 1301, 4, generator=generator, dtype=torch.float64))
        for heads in (2, 1, 1)
    ]
    query, key, value = (tensor.requires_grad_() for tensor in inputs)
    problem = Problem(query, key, value, Structure(right=0), 0.5)
    assert blocking.choose_blocks(problem).keys < 1301 / 2
    options = {"causal": True, "window": window}
    expected, got = (
        attention_with_entropy(query, key, value, implementation=implementation, **options)
        for implementation in ("reference", "blockwise")
    )
    assert worst_error(list(got), list(expected)) <= 1e-12
    assert worst_error(gradients(got, inputs), gradients(expected, inputs)) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_meet_many_keys(dtype: torch.dtype) -> None:
    """A decoding step: one block, whose keys are widened a piece at a time in low precision."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, n, 8, generator=generator).to(dtype) for n in (2, 2600, 2600)]
    problem = Problem(*inputs, Structure(right=0), 0.5)
    assert blocking.choose_blocks(problem).keys == (2600 if dtype == torch.float32 else 1024)
    low, exact = ([x.to(kind).requires_grad_() for x in inputs] for kind in (dtype, torch.float64))
    got = attention_with_entropy(*low, causal=True, implementation="blockwise")
    expected = attention_with_entropy(*exact, causal=True, implementation="reference")
    budget = max(1e-6, torch.finfo(dtype).eps)
    assert worst_error([got.entropy], [expected.entropy]) <= 1e-5
    assert worst_error([got.output], [expected.output]) <= budget
    found, true = gradients(got, low), gradients(expected, exact)
    assert worst_error(found, true) <= budget


def test_keys_that_no_row_sees_are_not_read() -> None:
    """A cache whose evicted places hold anything; the window's keys begin at no multiple of 16."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, generator=generator) for n in (70, 200, 200))
    options = {"causal": True, "window": (40, 0), "implementation": "blockwise"}
    expected = attention_with_entropy(query, key, value, **options)
    for tensor in (key, value):
        tensor[:, :, :90] = torch.nan  # row 0 stands at key 130
    got = attention_with_entropy(query, key, value, **options)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("length", [197, 1024, 1301, 4096, 4353, 50_000])
def test_blocks_leave_no_small_rest(length: int) -> None:
    for part in (64, 96, 192, 256, 512):
        step = blocking.even(length, part)
        assert length % step == 0 or length % step >= step // 8


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_masked_scores_may_be_large_and_so_may_the_gradient(implementation: str) -> None:
    """A future key at a score of 1e10, and a gradient of the entropy as of a scaled loss."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 40, 8, generator=generator) for _ in range(3))
    far = key.clone()
    far[:, :, -1] *= 1e10
    query[:, :, -1] = 0.0  # the only row that sees it
    results = []
    for keys in (key, far):
        inputs = [query.clone().requires_grad_(), keys.requires_grad_(), value]
        found = attention_with_entropy(*inputs, causal=True, implementation=implementation)
        results.append(torch.autograd.grad(1e10 * found.entropy[..., :-1].sum(), inputs[:2]))
    assert all(torch.isfinite(tensor).all() for tensor in results[1])
    assert torch.equal(results[1][0], results[0][0])


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("size", [1e25, 1e30])
def test_a_large_key_in_the_future_shows_in_nothing(size: float, implementation: str) -> None:
    query, key, value = (torch.rand(1, 1, 40, 4).requires_grad_() for _ in range(3))
    far = key.detach().index_fill(2, torch.tensor([39]), size).requires_grad_()
    results = []
    for keys in (key, far):
        found = attention_with_entropy(
            query, keys, value, causal=True, implementation=implementation
        )
        before = [tensor[:, :, :39] for tensor in (*found[:4], *gradients(found, [query]))]
        results.append(before)
    assert worst_error(*results) <= 1e-6


def test_peaked_rows_and_large_offsets_keep_their_precision() -> None:
    """float32 at a common logit offset of 1e4, and rows so peaked that most weights underflow."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 33, 16, generator=generator) for _ in range(3))
    offset = torch.full((1, 1, 1, 33), 1e4)
    plain = attention_with_entropy(query, key, value)
    moved = attention_with_entropy(query, key, value, bias=offset)
    # At 1e4 a float32 score itself is rounded to 1e-3 / 2: compare with those rounded scores.
    scores = (query @ key.transpose(-1, -2) / 4 + offset).double() - 1e4
    weights = torch.softmax(scores, -1)
    assert worst_error([moved.entropy], [torch.special.entr(weights).sum(-1)]) < 1e-3
    assert worst_error([plain.entropy], [moved.entropy]) < 2e-3
    peaked = attention_with_entropy(query, key, value, scale=60.0)
    exact = attention_with_entropy(
        query.double(), key.double(), value.double(), scale=60.0, implementation="reference"
    )
    assert worst_error([peaked.entropy], [exact.entropy]) < 1e-4


class TestDropout:
    """Dropout acts on the output alone."""

    def run(self, rate: float, seed: int = 0, **options: object):
        generator = torch.Generator().manual_seed(1)
        inputs = [
            torch.randn(1, 2, 40, 4, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(3)
        ]
        torch.manual_seed(seed)
        return inputs, attention_with_entropy(*inputs, dropout=rate, causal=True, **options)

    def test_entropy_is_that_before_dropout(self) -> None:
        assert torch.equal(self.run(0.5)[1].entropy, self.run(0.0)[1].entropy)

    def test_seed_reproduces_the_output(self) -> None:
        assert torch.equal(self.run(0.5, seed=3)[1].output, self.run(0.5, seed=3)[1].output)
        assert not torch.equal(self.run(0.5, seed=3)[1].output, self.run(0.5, seed=4)[1].output)

    def test_the_default_device_changes_nothing(self) -> None:
        inputs, found = self.run(0.5, seed=3)
        torch.manual_seed(3)
        with torch.device("meta"):
            elsewhere = attention_with_entropy(*inputs, dropout=0.5, causal=True)
        assert torch.equal(elsewhere.output, found.output)

    def test_output_is_right_on_average(self) -> None:
        plain = self.run(0.0)[1].output
        draws = torch.stack([self.run(0.3, seed=seed)[1].output for seed in range(600)])
        error = (draws.mean(0) - plain).abs() / (draws.std(0) / 600**0.5 + 1e-9)
        assert error.max() < 5.5

    @pytest.mark.parametrize("name", ["everything", "grouped-query", "documents-causal"])
    @pytest.mark.usefixtures("blocks")
    def test_gradient_is_exact_beside_other_options(self, name: str) -> None:
        case = next(case for case in CASES if case.name == name)
        inputs, options = case.build(torch.float64)
        options["dropout"] = 0.4

        def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(5)
            got = case.run(list(tensors), options, "blockwise")
            return got.output, got.entropy

        assert torch.autograd.gradcheck(function, inputs)

    @pytest.mark.usefixtures("blocks")
    def test_gradient_is_exact_for_the_drawn_mask(self) -> None:
        def function(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(5)
            got = attention_with_entropy(*inputs, dropout=0.4, causal=True)
            return got.output, got.entropy

        inputs = [x[:, :, :7].detach().requires_grad_() for x in self.run(0.0)[0]]
        assert torch.autograd.gradcheck(function, inputs)
