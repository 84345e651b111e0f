"""What scripts/gpu runs on a GPU, as far as a CPU can tell: plans, floors, steps, refusals."""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import worst_error

ROOT = Path(__file__).parents[3]
PARTS = ("tests", "attention", "tiles", "training", "kernels")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load_module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load_module


def test_floor_counts_products_and_bytes(load: Any) -> None:
    bench = load("gpu_attention")
    shape = bench.Shape(batch=2, heads=3, tokens=4, dim=8)
    pairs = 2 * 3 * (4 + 3 + 2 + 1)  # causal
    slow_product = {"flops_per_second": 1.0, "bytes_per_second": 1e18}
    assert bench.floor_seconds(shape, slow_product, False) == 2 * 2 * 8 * pairs
    assert bench.floor_seconds(shape, slow_product, True) == 7 * 2 * 8 * pairs
    slow_memory = {"flops_per_second": 1e18, "bytes_per_second": 1.0}
    assert bench.floor_seconds(shape, slow_memory, False) == 2 * 3 * 4 * (4 * 8 * 2 + 2 * 4)


def test_plan_keeps_tokens_and_width(load: Any) -> None:
    shapes = load("gpu_attention").plan([1024, 32768], [64, 128], 16384)
    assert [tuple(shape) for shape in shapes] == [
        (16, 32, 1024, 64), (16, 16, 1024, 128), (1, 32, 32768, 64), (1, 16, 32768, 128),
    ]  # fmt: skip


def test_what_compiles_for_every_shape_comes_last(load: Any) -> None:
    bench = load("gpu_attention")
    assert bench.rounds_of(list(bench.ARMS)) == [
        ["ours", "sdpa_flash", "sdpa_cudnn"],
        ["ours", "sdpa_flash", "flex", "flex_widened", "eager_published"],
    ]
    assert bench.rounds_of(["ours", "sdpa_flash"]) == [["ours", "sdpa_flash"]]


def test_an_arm_that_fails_is_reported(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("gpu_attention")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench.first_call(lambda: lambda: 1)[1] == 1
    nothing = (None, {"failed": "ZeroDivisionError: division by zero"})
    assert bench.attempt(lambda: bench.first_call(lambda: lambda: 1 / 0)) == nothing
    assert bench.attempt(lambda: bench.first_call(lambda: 1 / 0)) == nothing


def test_an_arm_that_fails_in_its_turn_does_not_end_the_others(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load("gpu_attention")
    answers = iter([1.0, 2.0])
    monkeypatch.setattr(bench, "time_step", lambda step: (step(), 0.5))
    steps = {"sdpa_flash": lambda: 1.0, "ours": lambda: 3.0, "eager_published": answers.__next__}
    found = bench.take_turns(steps, 3, {arm: {"peak_bytes": 1} for arm in steps})
    assert found["ours"]["ratio_to_sdpa_flash"] == 3.0
    assert found["eager_published"] == {"peak_bytes": 1, "failed": "StopIteration: "}


def test_arms_agree_and_wrong_results_are_refused(load: Any, device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    bench = load("gpu_attention")
    shape = bench.Shape(1, 2, 21, 16)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    steps = {arm: bench.step_of(arm, shape, False, inputs) for arm in ("ours", "eager_published")}
    results = {arm: step() for arm, step in steps.items()}
    assert worst_error(list(results["ours"]), list(results["eager_published"])) <= 1e-5
    assert bench.compare_results(results, backward=False) == ({}, {})
    output, entropy = results["ours"]
    for wrong in ((output + 1, entropy), (output, entropy + 1), (output * torch.nan, entropy)):
        reasons, _ = bench.compare_results(results | {"ours": wrong}, backward=False)
        assert list(reasons) == ["ours"]
    derivatives = {
        arm: bench.step_of(arm, shape, True, inputs)() for arm in ("ours", "eager_published")
    }
    assert [tuple(gradient.shape) for gradient in derivatives["ours"]] == [tuple(shape)] * 3
    assert bench.compare_results(derivatives, backward=True) == ({}, {})
    negative = [-gradient for gradient in derivatives["ours"]]
    reasons, _ = bench.compare_results(derivatives | {"flex_widened": negative}, backward=True)
    assert list(reasons) == ["flex_widened"]
    assert reasons["flex_widened"].startswith("d_value is off by")


def test_gradients_with_entropy_are_compared_with_no_others(load: Any) -> None:
    """Flash attention has no entropy, but the same gradient of the value."""
    bench = load("gpu_attention")
    given = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    plain = [torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), given[2]]
    results = {"ours": given, "sdpa_flash": plain}
    alone = {"ours": ["d_query with entropy", "d_key with entropy"]}
    assert bench.compare_results(results, backward=True) == ({}, alone)
    results["sdpa_flash"] = [*plain[:2], -given[2]]
    wrong, unverified = bench.compare_results(results, backward=True)
    assert wrong["ours"].startswith("d_value is off by")
    assert unverified == alone


@pytest.mark.parametrize("name", ["gpt2-small", "llama-1b"])
def test_training_steps_agree(name: str, load: Any) -> None:
    bench = load("gpu_training_step")
    losses = {}
    for arm in bench.ARMS:
        torch.manual_seed(0)
        model = bench.build_model(name, 24, arm, tiny=True).float()
        losses[arm] = bench.step_of(model, arm, 24)()
        assert all(p.grad is not None for p in model.parameters())
    assert losses["ours"] == pytest.approx(losses["published"], rel=1e-5)
    assert losses["ours"] > losses["sdpa"]


@pytest.mark.parametrize("name", ["gpt2-small", "llama-1b"])
def test_largest_context_stops_where_memory_or_time_ends(
    name: str, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load("gpu_training_step")

    def build(name: str, tokens: int, arm: str, device: str) -> int:
        if tokens > 8192:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return tokens

    monkeypatch.setattr(bench, "build_model", build)
    monkeypatch.setattr(bench, "step_of", lambda model, arm, tokens: lambda: 0.0)
    assert bench.largest_context(name, "ours", 60.0) == {"tokens": 8192, "stopped_by": "memory"}
    assert bench.largest_context(name, "ours", -1.0) == {"tokens": 0, "stopped_by": "time"}


@pytest.mark.parametrize("largest", [False, True])
def test_what_training_did_not_reach_is_written(
    largest: bool, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = load("gpu_training_step")
    output = tmp_path / "steps.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "environment", dict)
    arguments = ["gpu_training_step.py", "--total-seconds", "0", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments + ["--largest"] * largest)
    bench.main()
    written = json.loads(output.read_text())
    skipped = {arm: {"skipped": "not reached in time"} for arm in bench.ARMS}
    assert [problem["arms"] for problem in written["problems"]] == [skipped] * 3
    expected = {"gpt2-small": skipped, "llama-1b": skipped} if largest else {}
    assert written["largest"] == expected


def test_a_worker_that_fails_is_a_result(load: Any) -> None:
    bench = load("gpu_training_step")
    task = ["step", "gpt2-small", "ours", "many", "1"]
    failing, late = bench.start_worker(), bench.start_worker()
    assert "invalid literal for int" in bench.run_worker(failing, task, 200.0)["failed"]
    assert bench.run_worker(late, task, 0.01) == {"skipped": "took more than 0 s"}
    assert late.returncode is not None


def test_workers_import_while_others_run(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Imports, one after the other, would take more of a call on a GPU than the steps."""
    bench = load("gpu_training_step")
    started, ran = [], []

    def run_worker(process: int, task: list[str], seconds: float) -> dict[str, Any]:
        assert len(started) == len(bench.PROBLEMS) * len(bench.ARMS)
        ran.append(process)
        return {}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "environment", dict)
    monkeypatch.setattr(bench, "start_worker", lambda: started.append(0) or len(started))
    monkeypatch.setattr(bench, "run_worker", run_worker)
    monkeypatch.setattr(sys, "argv", ["gpu_training_step.py", "--output", str(tmp_path / "steps")])
    bench.main()
    assert sorted(ran) == list(range(1, len(started) + 1))


def test_tile_configurations_give_the_same_numbers(load: Any, device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    bench = load("gpu_tiles")
    functions = [
        bench.prepare(16, bench.Workload(1, 40, documents), device, width=32)
        for documents in (1, 3)
    ]
    assert not torch.equal(functions[0]["forward"]()[0], functions[1]["forward"]()[0])
    for kernel, function in (*functions[0].items(), *functions[1].items()):
        expected = function()
        trial = bench.Trial(kernel, 16, bench.Tiles(32, 16, 4, 1))
        assert bench.difference(bench.with_tiles(trial, function)(), expected) <= 0.02
        assert bench.difference([expected[0] + 1], expected[:1]) > 0.02


def test_tile_configurations_start_with_the_chosen(load: Any) -> None:
    bench = load("gpu_tiles")
    trials = bench.plan()
    assert len(set(trials)) == len(trials)
    firsts = {(trial.kernel, trial.dim): trial.tiles for trial in reversed(trials)}
    for kernel, dim, tiles in trials[: len(firsts)]:  # or time may end before one is compiled
        assert tiles == firsts.pop((kernel, dim)) == bench.choose_tiles(kernel, dim, torch.bfloat16)
    assert not firsts


def test_tile_configurations_are_timed_and_written(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = load("gpu_tiles")
    prepare = bench.prepare
    monkeypatch.setattr(bench, "CANDIDATES", {"forward": {16: [(32, 16, 4, 1), (16, 32, 4, 1)]}})
    small = bench.Workload(1, 40)
    monkeypatch.setattr(bench, "WORKLOADS", (small,))
    monkeypatch.setattr(bench, "compile_all", lambda call, trials, *rest: {trials[1]: "too large"})
    monkeypatch.setattr(bench, "prepare", lambda dim, *rest: prepare(dim, small, "cpu", width=dim))
    monkeypatch.setattr(bench, "milliseconds", lambda step: float(step() is not None))
    assert bench.run(2, 60.0, 1, tmp_path / "tiles.json") == []
    written = json.loads((tmp_path / "tiles.json").read_text())
    assert [row["tiles"] for row in written["trials"]] == [[128, 128, 8, 3], [16, 32, 4, 1]]
    assert [row["milliseconds_median"] for row in written["trials"]] == [1.0, 1.0]
    assert written["failed"] == [["forward", 16, [32, 16, 4, 1], "too large"]]
    assert bench.run(2, 0.0, 1, tmp_path / "tiles.json") == []
    written = json.loads((tmp_path / "tiles.json").read_text())
    assert written["trials"] == []
    assert written["not_reached"] == [["forward", 16, small._asdict()]]


def test_attention_is_written_after_every_problem(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = load("gpu_attention")
    output = tmp_path / "attention.json"
    shapes = bench.plan([16, 32], [64], 32)
    rates = {"flops_per_second": 1e12, "bytes_per_second": 1e12}
    steps = {"sdpa_flash": lambda: 2.0, "ours": lambda: 3.0}
    monkeypatch.setattr(bench, "measure_rates", lambda: rates)
    monkeypatch.setattr(bench, "time_step", lambda step: (step(), 0.5))

    def measure(shape: Any, backward: bool, arms: list[str], turns: int) -> dict[str, Any]:
        found = bench.take_turns(steps, turns, {arm: {"peak_bytes": 1} for arm in steps})
        if shape.tokens == 32:
            assert len(json.loads(output.read_text())["problems"]) == 2 + backward
            found["sdpa_cudnn"] = {"failed": "no plan"}
        return dict(found)

    monkeypatch.setattr(bench, "measure", measure)
    failed = bench.run(shapes, list(bench.QUICK), 3, 60.0, output)
    assert failed == ["sdpa_cudnn at 32 x 64"] * 2
    written = json.loads(output.read_text())
    assert written["not_reached"] == []
    assert written["problems"][0]["arms"]["ours"]["ratio_to_sdpa_flash"] == 1.5
    assert bench.run(shapes, list(bench.QUICK), 3, 0.0, output) == []
    assert len(json.loads(output.read_text())["not_reached"]) == 4


def test_what_compiles_for_every_shape_is_compiled_side_by_side_before(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = load("gpu_attention")
    shapes = bench.plan([16, 32], [64], 32)
    done: list[Any] = []

    def measure(shape: Any, backward: bool, arms: list[str], turns: int) -> dict[str, Any]:
        done.append(arms)
        return {}

    def compile_all(call: Any, tasks: list[Any], jobs: int, seconds: float) -> dict[Any, str]:
        assert call is bench.compile_arm
        assert 0 < seconds < 60
        done.append(tasks)
        return {}

    monkeypatch.setattr(bench, "measure_rates", lambda: bench.NOMINAL)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "compile_all", compile_all)
    assert bench.run(shapes, ["ours", "flex"], 3, 60.0, tmp_path / "attention.json") == []
    tasks = [("flex", shape, backward) for shape in shapes for backward in (False, True)]
    assert done == [*[["ours"]] * 4, tasks, *[["ours", "flex"]] * 4]
    done.clear()
    assert bench.run(shapes, ["ours"], 3, 60.0, tmp_path / "attention.json") == []
    assert done == [["ours"]] * 4


@pytest.mark.slow
def test_no_process_that_compiles_is_left(load: Any) -> None:
    bench = load("gpu_attention")
    late = {600.0: "not compiled in time"}
    assert bench.compile_all(time.sleep, [0.0, 600.0], 2, 15.0) == late
    assert multiprocessing.active_children() == []


def run_script(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHON": sys.executable,
        "OUT": str(out),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(ROOT / "scripts" / "gpu"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_script_plans_without_a_gpu(tmp_path: Path) -> None:
    done = run_script("--dry-run", out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test_error_is_at_most_that_of_naive_attention[large-causal-dtype0]" in done.stdout
    assert "llama-1b at 8192 tokens: ours, sdpa, published" in done.stdout
    assert "forward at head dimension 64" in done.stdout
    assert "test_equals_reference[plain]" in done.stdout
    order = [done.stdout.index(f"== {part} (at most") for part in PARTS]
    assert order == sorted(order)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_script_refuses_clearly(tmp_path: Path) -> None:
    done = run_script(out=tmp_path / "none")
    assert done.returncode == 1
    assert "torch sees no CUDA device" in done.stderr
    assert not (tmp_path / "none").exists()
    done = run_script("--fast", out=tmp_path / "none")
    assert done.returncode == 2
    assert "unknown argument '--fast'" in done.stderr


def test_a_part_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    """A python that fails at everything but the question whether there is a device."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *is_available*) exit 0 ;; esac\necho "$2"; exit 1\n')
    python.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu")],
        env=os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"failed or did not finish: {' '.join(PARTS)};" in done.stderr
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f"== {part} took" in log for part in PARTS)


@pytest.mark.slow
def test_the_call_ends_in_time(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *is_available*) exit 0 ;; esac\nexec sleep 60\n')
    python.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu"), "tests", "tiles"],
        env=os.environ | {"PYTHON": str(python), "OUT": str(tmp_path), "SECONDS_LEFT": "11"},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 1
    assert "== tiles: no time left" in done.stdout


PRODUCT = """
  /*0000*/  MOV R24, UR4 ;
  /*0010*/  HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR4].tnspB, R88, gsb0 ;
  /*0020*/  @P0 IMAD.WIDE R22, R1, 0x4, R2 ;
  /*0030*/  STS.128 [R24], R28 ;
  /*0040*/  @!P1 BRA 0x60 ;
  /*0050*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
  /*0060*/  LDS.128 R20, [R3] ;
  /*0070*/  LDSM.16.M88.4 R24, [R3] ;
  /*0080*/  BRA 0x50 ;
"""


def test_writing_the_inputs_of_a_product_in_flight_is_seen(load: Any) -> None:
    """On one of two ways to the last load there was no waiting."""
    pytest.importorskip("triton")
    code = load("machine_code")
    overwritten = code.overwritten_inputs(code.instructions(PRODUCT))
    assert overwritten == ["LDSM.16.M88.4 R24, [R3]"]
    waiting = PRODUCT.replace("@!P1 BRA 0x60", "NOP")
    assert code.overwritten_inputs(code.instructions(waiting)) == []
    for written, found in (("@P0 IMAD.WIDE R23", 1), ("LDS.128 R21", 1), ("MOV R28", 0)):
        changed = code.instructions(waiting.replace("@P0 IMAD.WIDE R22", written))
        assert len(code.overwritten_inputs(changed)) == found, written
