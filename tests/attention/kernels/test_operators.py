"""Operators around the kernels: compilation, dropout, refusals; and the real compiler."""

import functools
import itertools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, gradients, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from triton.runtime import interpreter

from entropy_regularization import attention_with_entropy
from entropy_regularization.attention import api
from entropy_regularization.attention.masking import Structure, Tile, tile_allowed
from entropy_regularization.attention.triton import launch, skipping, support
from entropy_regularization.attention.triton.operators import triton_backward, triton_forward
from entropy_regularization.attention.triton.support import is_interpreted
from entropy_regularization.attention.triton.tiles import Tiles, choose_tiles

if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu

EVERYTHING = CASES[-1]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def small_tiles(set_tiles: Any) -> None:
    set_tiles(16, 16)


def test_opcheck(device: str) -> None:
    inputs, options = EVERYTHING.build(torch.float32, device)
    query, key, value, bias, sinks = inputs
    masks = options["allowed"], options["key_padding"], options["document"]
    arguments = (query, key, value, *masks, bias, sinks, *[None] * 4, 6, 0, 0.3, 3.0, 0.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not is_interpreted():
        tests += ("test_aot_dispatch_dynamic",)
    opcheck(triton_forward, arguments, test_utils=tests)
    with torch.no_grad():
        output, entropy, *_, normalizer = triton_forward(*arguments)
    upstream = (output, None, normalizer)
    saved = (output, entropy, normalizer)
    wanted = [True, False, True, True, True]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    opcheck(
        triton_backward,
        (*detached, *saved, *upstream, wanted),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("case", [CASES[3], EVERYTHING], ids=lambda case: case.name)
def test_compile_fullgraph(case: Case, device: str) -> None:
    inputs, options = case.build(torch.float32, device)
    compiled = torch.compile(
        lambda *tensors: tuple(case.run(list(tensors), options, "triton")),
        fullgraph=True,
        backend="aot_eager" if is_interpreted() else "inductor",
    )
    expected = case.run(inputs, options, "reference")
    got = type(expected)(*compiled(*inputs))
    assert worst_error(list(got), list(expected)) <= 1e-5
    assert worst_error(gradients(got, inputs), gradients(expected, inputs)) <= 1e-5


def test_second_derivatives_are_refused(device: str) -> None:
    inputs, _ = CASES[0].build(torch.float32, device)
    got = attention_with_entropy(*inputs, implementation="triton")
    (gradient,) = torch.autograd.grad(got.entropy.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="use implementation='reference'"):
        torch.autograd.grad(gradient.sum(), inputs[0])


class TestMemo:
    """What the layers that are given one mask share, as the attention of transformers does it."""

    def attend(self, device: str, memo: dict[Any, Any] | None, dim: int = 4) -> list[Tensor]:
        """Return results and gradients of one layer with padding and documents."""
        generator = torch.Generator().manual_seed(dim)
        inputs = [
            torch.randn(2, 2, 40, dim, generator=generator).to(device).requires_grad_()
            for _ in range(3)
        ]
        padding = torch.arange(40, device=device) < torch.tensor([[40], [21]], device=device)
        document = (torch.arange(40, device=device) // 17)[None]
        structure = Structure(right=0, key_padding=padding, document=document)
        got = api.attend(*inputs, structure, scale=0.5, implementation="triton", memo=memo)
        return [*got, *gradients(got, inputs)]

    def test_results_are_those_without(self, device: str) -> None:
        memo: dict[Any, Any] = {}
        for dim in (4, 80):  # on a GPU, other tiles
            expected = self.attend(device, None, dim)
            for _ in range(2):
                assert all(map(torch.equal, self.attend(device, memo, dim), expected))

    def test_the_mask_is_read_by_the_first_layer(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[str] = []

        def noted(function: Any) -> Any:
            @functools.wraps(function)
            def wrapper(*problem: Any) -> Any:
                read.append(function.__name__)
                return function(*problem)

            return wrapper

        monkeypatch.setattr(launch, "visible_keys", noted(launch.visible_keys))
        monkeypatch.setattr(launch, "visible_rows", noted(launch.visible_rows))
        monkeypatch.setattr(api, "count_allowed_keys", noted(api.count_allowed_keys))
        memo: dict[Any, Any] = {}
        self.attend(device, memo)
        assert set(read) == {"visible_keys", "visible_rows", "count_allowed_keys"}
        read.clear()
        self.attend(device, memo)
        assert read == []
        self.attend(device, {})
        assert read != []


class TestDropout:
    """Dropout acts on the output alone, by a mask that is a function of the seed and the place."""

    def run(
        self, device: str, rate: float, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[list[Tensor], Any]:
        generator = torch.Generator().manual_seed(1)
        inputs = [
            torch.randn(1, 2, 21, 4, generator=generator).to(device, dtype).requires_grad_()
            for _ in range(3)
        ]
        torch.manual_seed(seed)
        return inputs, attention_with_entropy(
            *inputs, dropout=rate, causal=True, implementation="triton"
        )

    def test_entropy_is_that_before_dropout(self, device: str) -> None:
        assert torch.equal(self.run(device, 0.5)[1].entropy, self.run(device, 0.0)[1].entropy)

    def test_seed_reproduces_the_output(self, device: str) -> None:
        first, again, other = (self.run(device, 0.5, seed=seed)[1].output for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_mask_does_not_depend_on_the_tiles(self, device: str, set_tiles: Any) -> None:
        inputs, got = self.run(device, 0.5)
        found = gradients(got, inputs)
        set_tiles(32, 16)
        other, expected = self.run(device, 0.5)
        assert worst_error([got.output], [expected.output]) <= 1e-5
        assert worst_error(found, gradients(expected, other)) <= 1e-5

    def test_output_is_right_on_average(self, device: str) -> None:
        """Many identical heads draw many different masks."""
        generator = torch.Generator().manual_seed(1)
        query, key, value = (torch.randn(1, 1, 5, 4, generator=generator) for _ in range(3))
        inputs = [x.to(device).expand(20, 10, 5, 4) for x in (query, key, value)]
        plain = attention_with_entropy(*(x[:1, :1] for x in inputs)).output
        torch.manual_seed(0)
        draws = attention_with_entropy(*inputs, dropout=0.3, implementation="triton").output
        draws = draws.flatten(0, 1)
        error = (draws.mean(0) - plain[0, 0]).abs() / (draws.std(0) / len(draws) ** 0.5)
        assert error.max() < 5.0
        assert draws.std(0).min() > 1e-3

    @pytest.mark.skipif(not is_interpreted(), reason="float64 runs interpreted only")
    def test_gradient_is_exact_for_the_drawn_mask(self, device: str) -> None:
        def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            torch.manual_seed(5)
            got = attention_with_entropy(*inputs, dropout=0.4, causal=True, implementation="triton")
            return got.output, got.entropy

        inputs = [
            x[:, :, :7].detach().requires_grad_()
            for x in self.run(device, 0.0, dtype=torch.float64)[0]
        ]
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)

    @pytest.mark.skipif(not is_interpreted(), reason="float64 runs interpreted only")
    def test_gradient_is_exact_beside_other_options(self, device: str) -> None:
        """Grouped heads, a bias with a gradient, sinks, softcap and padding."""
        case = Case(
            "dropout-everything", (1, 2, 1, 4, 5, 3, 2), {"causal": True, "softcap": 3.0},
            padding=True, bias=(1, 1, 4, 5), sinks=True,
        )  # fmt: skip
        inputs, options = case.build(torch.float64, device)

        def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            torch.manual_seed(5)
            got = case.run(list(tensors), options | {"dropout": 0.4}, "triton")
            return got.output, got.entropy

        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.skipif(not is_interpreted(), reason="float64 runs interpreted only")
def test_gradcheck(device: str) -> None:
    case = next(case for case in CASES if case.name == "sinks-window-padding")
    inputs, options = case.build(torch.float64, device)

    def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
        got = case.run(list(tensors), options, "triton")
        normalizer = got.log_normalizer
        return got.output, got.entropy, normalizer.masked_fill(normalizer == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(differentiable, inputs, fast_mode=True)


class TestSupport:
    """What cannot run is refused with the reason."""

    def reason(self, device: str = "cpu", dim: int = 8, value_dim: int = 8, **options: Any) -> Any:
        dtype = options.pop("dtype", torch.float32)
        query, key, value = (
            torch.zeros(1, 1, 4, width, device=device, dtype=dtype)
            for width in (dim, dim, value_dim)
        )
        return support.unsupported_reason(query, key, value, Structure(), scale=1.0, **options)

    def test_without_cuda_and_without_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(support, "is_interpreted", lambda: False)
        assert "the inputs are on cpu; the kernels need a CUDA device" in self.reason()

    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(support, "is_installed", lambda: False)
        assert "the package triton is not installed" in self.reason()

    def test_wide_heads(self, device: str) -> None:
        assert self.reason(device) is None
        assert self.reason(device, dim=256, value_dim=3) is None
        assert self.reason(device, dim=257) == (
            "query has head dimension 257; the kernels hold at most 256."
        )
        assert "value has head dimension 300" in self.reason(device, value_dim=300)

    def on_cuda(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> list[Tensor]:
        """Return float64 tensors that say they are on a device of this compute capability."""

        class OnCuda(torch.Tensor):
            device = torch.device("cuda")

        monkeypatch.setattr(support, "is_interpreted", lambda: False)
        monkeypatch.setattr(support, "compute_capability", lambda index: capability)
        return [torch.zeros(1, 1, 4, 8, dtype=torch.float64).as_subclass(OnCuda)] * 3

    def test_float64_needs_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tensors = self.on_cuda(monkeypatch, (9, 0))
        reason = support.unsupported_reason(*tensors, Structure(), scale=1.0)
        assert reason == "query is float64; the kernels take float16, bfloat16 and float32."

    @pytest.mark.skipif(not is_interpreted(), reason="of the interpreter")
    def test_bfloat16_needs_an_interpreter_that_multiplies_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        builder = interpreter.InterpreterBuilder
        assert self.reason(dtype=torch.bfloat16) is None
        monkeypatch.setattr(builder, "create_dot", builder.create_dot.__wrapped__)
        assert self.reason(dtype=torch.float16) is None
        tensors = [torch.ones(1, 1, 4, 8, dtype=torch.bfloat16)] * 3
        for call in (attention_with_entropy, torch.compile(attention_with_entropy)):
            with pytest.raises(ValueError, match="'triton' cannot run: query is bfloat16, whose"):
                call(*tensors, implementation="triton")

    def test_old_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tensors = self.on_cuda(monkeypatch, (7, 5))
        reason = support.unsupported_reason(*tensors, Structure(), scale=1.0)
        assert reason == "the device has compute capability 7.5; the kernels need 8.0."

    @pytest.mark.parametrize(
        ("version", "capability", "refused"),
        [
            ("3.6.0", (10, 0), True), ("3.7.0+git1", (10, 3), True), ("3.7.1", (10, 0), False),
            ("3.10.0", (10, 0), False), ("3.6.0", (9, 0), False), ("3.6.0", (12, 0), False),
        ],
    )  # fmt: skip
    def test_triton_without_fences(
        self,
        monkeypatch: pytest.MonkeyPatch,
        version: str,
        capability: tuple[int, int],
        refused: bool,
    ) -> None:
        tensors = self.on_cuda(monkeypatch, capability)
        monkeypatch.setattr("triton.__version__", version)
        reason = support.unsupported_reason(*tensors, Structure(), scale=1.0)
        number = ".".join(map(str, capability))
        assert reason == (
            f"Triton {version.partition('+')[0]} leaves out fences that tensor cores of compute "
            f"capability {number} need; install Triton 3.7.1 or newer."
            if refused
            else "query is float64; the kernels take float16, bfloat16 and float32."
        )

    def test_rocm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tensors = self.on_cuda(monkeypatch, (9, 4))
        monkeypatch.setattr(torch.version, "hip", "7.0")
        reason = support.unsupported_reason(*tensors, Structure(), scale=1.0)
        assert reason == "torch is built for ROCm; the kernels are for NVIDIA devices."

    def test_auto_takes_blockwise_and_says_so_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        tensors = self.on_cuda(monkeypatch, (9, 0))
        api._say_once.cache_clear()
        with caplog.at_level(logging.INFO, logger="entropy_regularization.attention"):
            for _ in range(2):
                name = api.choose_implementation("auto", *tensors, Structure(), 1.0, {})
                assert name == "blockwise"
        (record,) = caplog.records
        assert record.getMessage() == (
            "attention on cuda runs blockwise, not triton: query is float64; the kernels take "
            "float16, bfloat16 and float32."
        )
        with pytest.raises(ValueError, match="'triton' cannot run: query is float64"):
            api.choose_implementation("triton", *tensors, Structure(), 1.0, {})


def both_ranges(*problem: Any) -> tuple[Tensor | None, Tensor | None]:
    return skipping.visible_keys(*problem), skipping.visible_rows(*problem)


class TestVisibleRanges:
    """(start, whole start, whole stop, stop), by tile."""

    def test_padding_and_documents(self) -> None:
        document = torch.tensor([[0] * 32 + [1] * 32, [0] * 64])
        padding = torch.ones(2, 64, dtype=torch.bool)
        padding[1, :20] = False
        structure = Structure(None, 0, None, padding, document)
        keys, rows = both_ranges(structure, 2, 64, 64, Tiles(16, 16, 4, 1))
        assert keys is not None
        assert rows is not None
        first, second = [0, 0, 32, 32], [32, 32, 64, 64]
        assert keys.tolist() == [[first, first, second, second], [[16, 32, 64, 64]] * 4]
        assert rows.tolist() == [
            [first, first, second, second],
            [[0, 0, 0, 0], [0, 0, 0, 64], [0, 0, 64, 64], [0, 0, 64, 64]],
        ]

    def test_a_length_that_is_no_multiple_of_the_tile(self) -> None:
        structure = Structure(document=torch.arange(60)[None] // 16)
        keys, rows = both_ranges(structure, 1, 60, 60, Tiles(16, 16, 4, 1))
        assert keys is not None
        assert rows is not None
        expected = [[start, start, start + 16, start + 16] for start in (0, 16, 32, 48)]
        assert keys.tolist() == rows.tolist() == [expected]

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_nothing_is_seen_outside_and_all_within(self, data: st.DataObject) -> None:
        """And as many tiles are whole as the longest run of them has."""
        n_keys = data.draw(st.integers(1, 100))
        n_queries = data.draw(st.integers(1, n_keys))
        sizes = data.draw(st.tuples(st.sampled_from([4, 8]), st.sampled_from([4, 8])))
        lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
        ids = torch.cat([torch.full((n,), i % 3) for i, n in enumerate(lengths)])
        ids = ids.repeat(n_keys)[:n_keys][None]
        real = torch.ones(2, n_keys, dtype=torch.bool)
        real[0, : data.draw(st.integers(0, n_keys))] = False
        real[1, data.draw(st.integers(0, n_keys)) :] = False
        kind = data.draw(st.sampled_from(["padding", "documents", "both"]))
        structure = Structure(
            key_padding=None if kind == "documents" else real,
            document=None if kind == "padding" else ids,
        )
        whole_problem = Tile(0, n_queries, 0, n_keys)
        allowed = tile_allowed(structure, whole_problem, n_queries, n_keys, torch.device("cpu"))
        assert allowed is not None
        matrix = allowed[:, 0].expand(2, n_queries, n_keys)
        ranges = both_ranges(structure, 2, n_queries, n_keys, Tiles(*sizes, 4, 1))
        for bounds, length, across, seen in (
            (ranges[0], sizes[0], sizes[1], matrix),
            (ranges[1], sizes[1], sizes[0], matrix.mT),
        ):
            assert bounds is not None
            for batch in range(2):
                for tile, (start, from_here, to_here, stop) in enumerate(bounds[batch].tolist()):
                    strip = seen[batch, tile * length : (tile + 1) * length]
                    assert not strip[:, :start].any()
                    assert not strip[:, stop:].any()
                    assert strip[:, from_here:to_here].all()
                    parts = [part.all().item() for part in strip.split(across, 1)]
                    runs = [len(list(run)) for of, run in itertools.groupby(parts) if of]
                    assert to_here - from_here == across * max(runs, default=0)

    def test_nothing_to_bound(self) -> None:
        assert both_ranges(Structure(3, 0), 2, 64, 64, Tiles(16, 16, 4, 1)) == (None, None)


def test_no_argument_of_a_kernel_is_a_tuple_of_tuples(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.6 loses the integers 1 in such tuples, and the interpreter does not show it."""
    inputs, options = EVERYTHING.build(torch.float32, device)
    launched = []

    def record(kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any]) -> None:
        launched.append(kernel)
        tuples = [value for value in arguments.values() if isinstance(value, tuple)]
        assert tuples
        assert not any(isinstance(part, tuple) for value in tuples for part in value)

    monkeypatch.setattr(launch, "start_kernel", record)
    gradients(EVERYTHING.run(inputs, options, "triton"), inputs)
    assert len(launched) == 5


def test_every_head_dimension_has_tiles() -> None:
    kernels = ("forward", "query_gradient", "key_gradients", "bias_gradient", "row_constants")
    for kernel in kernels:
        for width in range(1, 257):
            kinds = itertools.product(
                (torch.float16, torch.float32), (100_000, 200_000), (False, True)
            )
            for kind in kinds:
                rows, keys, warps, stages = choose_tiles(kernel, width, *kind)
                assert rows & (rows - 1) == 0
                assert keys & (keys - 1) == 0
                assert warps in (4, 8)
                assert stages >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "through"),
    [
        ("causal", "output entropy"),
        ("documents", "output entropy"),
        ("everything", "output entropy log_normalizer"),
        ("everything", "output"),
        ("everything", "entropy"),
        ("sinks", "log_normalizer"),
    ],
)
def test_compiler_accepts_the_kernels(options: str, through: str, tmp_path: Path) -> None:
    """Triton's real compiler, for a Hopper GPU that need not be there."""
    used = compile_for_hopper(
        tmp_path, "--dims", "64", "--options", options, "--through", *through.split()
    )
    assert len(used) == (5 if options == "everything" else 4)


@pytest.mark.slow
def test_a_width_of_72_is_loaded_as_fast_as_one_of_80(tmp_path: Path) -> None:
    used = compile_for_hopper(tmp_path, "--dims", "72", "80")
    for kernel in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        by_dim = (used[kernel, dim]["instructions_a_score"] for dim in (72, 80))
        assert next(by_dim) <= 1.1 * next(by_dim)


@pytest.mark.slow
def test_documents_cost_nothing_in_whole_tiles(tmp_path: Path) -> None:
    plain, packed = (
        compile_for_hopper(tmp_path, "--dims", "64", "--options", options)
        for options in ("causal", "documents")
    )
    for kernel in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        of_both = (used[kernel, 64]["instructions_a_score"] for used in (packed, plain))
        assert next(of_both) <= 1.1 * next(of_both)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["bias", "dense"])
def test_numbers_of_scores_are_loaded_several_at_a_time(option: str, tmp_path: Path) -> None:
    """Where rows begin at multiples of 16; 4,100 is none."""
    together, apart = (
        compile_for_hopper(tmp_path, "--dims", "64", "--options", option, "--tokens", tokens)
        for tokens in ("4096", "4100")
    )
    for kernel in ("forward_kernel", "query_gradient_kernel"):
        of_both = (used[kernel, 64]["instructions_a_score"] for used in (together, apart))
        assert next(of_both) <= 0.85 * next(of_both)


def compile_for_hopper(folder: Path, *chosen: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Run benchmarks/kernel_resources.py in bfloat16; return what (kernel, dim) uses."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    output = folder / "used.json"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "kernel_resources.py"), "--dtypes", "bfloat16",
        "--output", str(output), *chosen,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(output.read_text())["kernels"]
    assert [row for row in rows if row["overwritten_inputs"]] == []
    return {(row["kernel"], row["dim"]): row for row in rows}
