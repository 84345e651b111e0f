"""What scripts/gpu runs on a GPU, as far as a CPU can tell: plans, floors, steps, refusals."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import worst_error

ROOT = Path(__file__).parents[3]


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
        (16, 32, 1024, 64), (1, 32, 32768, 64), (16, 16, 1024, 128), (1, 16, 32768, 128),
    ]  # fmt: skip


def test_arms_agree_and_wrong_results_are_refused(load: Any, device: str, set_tiles: Any) -> None:
    set_tiles(16, 16)
    bench = load("gpu_attention")
    shape = bench.Shape(1, 2, 21, 16)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    steps = {arm: bench.step_of(arm, shape, False, inputs) for arm in ("ours", "eager_published")}
    results = {arm: step() for arm, step in steps.items()}
    assert worst_error(list(results["ours"]), list(results["eager_published"])) <= 1e-5
    bench.refuse_wrong_results(results, backward=False)
    output, entropy = results["eager_published"]
    for wrong in ((output + 1, entropy), (output, entropy + 1)):
        with pytest.raises(SystemExit, match="eager_published"):
            bench.refuse_wrong_results(results | {"eager_published": wrong}, backward=False)
    gradients = bench.step_of("ours", shape, True, inputs)()
    assert [tuple(gradient.shape) for gradient in gradients] == [tuple(shape)] * 3


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
    assert "llama-1b at 8192 tokens: sdpa, ours, published" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "tests.log", "attention.log", "training_step.log",
    }  # fmt: skip


def test_script_refuses_clearly(tmp_path: Path) -> None:
    done = run_script(out=tmp_path / "none")
    assert done.returncode == 1
    assert "torch sees no CUDA device" in done.stderr
    assert not (tmp_path / "none").exists()
    done = run_script("--fast", out=tmp_path / "none")
    assert done.returncode == 2
    assert "unknown argument '--fast'" in done.stderr
