"""Time each kernel with a few tile configurations on a GPU, so that tiles.py can take the best.

    python benchmarks/gpu_tiles.py                # about a minute
    python benchmarks/gpu_tiles.py --dry-run      # the candidates; needs no GPU

Causal, bfloat16, an entropy gradient, one document or several. Everything is compiled first, in
processes side by side; then the candidates of a kernel take turns. One that does not fit the device
is reported and not timed. The exit status is 1 if results differ from those of the chosen tiles, or
the chosen do not run.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_attention import compile_all, environment, milliseconds

from entropy_regularization.attention.masking import Structure
from entropy_regularization.attention.triton import launch
from entropy_regularization.attention.triton.tiles import Tiles, choose_tiles

RESULTS = Path(__file__).parent / "results" / "gpu_tiles.json"
# kernel -> head dimension -> what may be faster than tiles.py: rows, keys, warps, stages
CANDIDATES: dict[str, dict[int, list[tuple[int, int, int, int]]]] = {
    "forward": {
        64: [(128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 4, 3), (128, 128, 8, 2), (64, 128, 4, 3)],
        128: [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 32, 8, 4)],
        256: [(128, 64, 8, 1), (128, 64, 8, 2)],
    },
    "query_gradient": {
        64: [(128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 3), (64, 64, 4, 3)],
        128: [(128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)],
        256: [(128, 32, 8, 2), (128, 64, 8, 1)],
    },
    "key_gradients": {
        64: [(64, 128, 8, 1), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1), (32, 64, 4, 2)],
        128: [(32, 128, 8, 1), (32, 128, 8, 3), (64, 128, 8, 1), (32, 64, 4, 1)],
        256: [(32, 128, 8, 1), (64, 64, 8, 1)],
    },
}


class Workload(NamedTuple):
    """A batch; its documents are of one length."""

    batch: int
    tokens: int
    documents: int = 1


WORKLOADS = (Workload(4, 4096), Workload(1, 16384), Workload(1, 16384, documents=8))


class Trial(NamedTuple):
    """One kernel with one configuration."""

    kernel: str
    dim: int
    tiles: Tiles


def plan() -> list[Trial]:
    """List the trials: first what tiles.py has for every kernel and head dimension."""
    chosen, others = [], []
    for kernel, by_dim in CANDIDATES.items():
        for dim, given in by_dim.items():
            chosen.append(Trial(kernel, dim, choose_tiles(kernel, dim, torch.bfloat16)))
            others += [Trial(kernel, dim, Tiles(*numbers)) for numbers in given]
    return chosen + others


def prepare(
    dim: int, workload: Workload, device: str, width: int = 2048
) -> dict[str, Callable[[], Any]]:
    """Return, by kernel, a function that launches it once."""
    torch.manual_seed(0)
    batch, tokens, documents = workload
    query, key, value, upstream = (
        torch.randn(batch, width // dim, tokens, dim, device=device, dtype=torch.bfloat16)
        for _ in range(4)
    )
    structure = Structure(None, 0)
    if documents > 1:
        ids = torch.arange(tokens, device=device) // -(-tokens // documents)
        structure = structure._replace(document=ids[None])
    problem = launch.Problem(query, key, value, structure, dim**-0.5, None, None, None, 0.0, None)
    output, entropy, *_, log2_normalizer = launch.forward(problem)
    saved = (output, entropy, log2_normalizer)
    constants = launch.row_constants(
        problem, saved, launch.Upstream(upstream, torch.randn_like(saved[1]), None)
    )
    arguments = launch.common_arguments(problem) | {
        "d_output": launch.view(upstream),
        "constants": tuple(constants),
    }
    return {
        "forward": lambda: launch.forward(problem)[:2],
        "query_gradient": lambda: (launch.query_gradient(problem, arguments),),
        "key_gradients": lambda: launch.key_gradients(problem, arguments),
    }


def with_tiles(trial: Trial, function: Callable[[], Any]) -> Callable[[], Any]:
    """Make a launch use the tiles of a trial."""

    def run() -> Any:
        kept = launch.tiles_for
        launch.tiles_for = lambda *arguments: trial.tiles
        try:
            return function()
        finally:
            launch.tiles_for = kept

    return run


def compile_trial(trial: Trial) -> str | None:
    """Launch a trial on small problems, so that Triton's cache has it; say why it failed."""
    try:
        for documents in {workload.documents for workload in WORKLOADS}:
            small = Workload(1, 512, documents)
            with_tiles(trial, prepare(trial.dim, small, "cuda", 2 * trial.dim)[trial.kernel])()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - a configuration that does not fit is a result
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference, as a share of the largest number."""
    pairs = zip(found, expected, strict=True)
    return max(
        ((one - other).abs().max() / other.abs().max()).item()
        for one, other in ((a.float(), b.float()) for a, b in pairs)
    )


def measure(trials: list[Trial], workload: Workload, turns: int) -> list[dict[str, Any]]:
    """Let the trials of one kernel take turns on one problem; the first says what is right."""
    function = prepare(trials[0].dim, workload, "cuda")[trials[0].kernel]
    steps = {trial: with_tiles(trial, function) for trial in trials}
    expected = steps[trials[0]]()
    errors = {trial: difference(step(), expected) for trial, step in steps.items()}
    taken: dict[Trial, list[float]] = {trial: [] for trial in trials if errors[trial] <= 0.02}
    for _ in range(turns):
        for trial, times in taken.items():
            times.append(milliseconds(steps[trial]))
    rows = []
    for trial in trials:
        row = {**trial._asdict(), "tiles": list(trial.tiles), **workload._asdict()}
        row["difference"] = errors[trial]
        if trial in taken:
            row["milliseconds_median"] = statistics.median(taken[trial])
        rows.append(row)
    return rows


def run(turns: int, seconds: float, jobs: int, output: Path) -> list[str]:
    """Compile and time all trials; write what there is after each problem; return what failed."""
    begin = time.perf_counter()
    trials = plan()
    failed = compile_all(compile_trial, trials, jobs, seconds / 2)
    result: dict[str, Any] = {"environment": environment(), "trials": [], "not_reached": []}
    result["failed"] = [[*trial[:2], list(trial.tiles), why] for trial, why in failed.items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    own = {(trial.kernel, trial.dim): trial for trial in reversed(trials)}
    wrong = [f"{t.kernel} {t.dim}: {failed[t]}" for t in own.values() if t in failed]
    for trial, why in failed.items():
        print(f"{trial.kernel:14s} {trial.dim:3d} {tuple(trial.tiles)} does not run: {why}")
    for workload in WORKLOADS:
        for kernel, by_dim in CANDIDATES.items():
            for dim in by_dim:
                chosen = [t for t in trials if t[:2] == (kernel, dim) and t not in failed]
                if own["forward", dim] in failed:  # it is what prepares the others
                    continue
                if not chosen:
                    continue
                if time.perf_counter() - begin > seconds:
                    result["not_reached"].append([kernel, dim, workload._asdict()])
                    continue
                rows = measure(chosen, workload, turns)
                result["trials"] += rows
                for row in rows:
                    taken = row.get("milliseconds_median", float("nan"))
                    print(f"{kernel:14s} {dim:3d} {workload} {row['tiles']!s:20} {taken:8.3f} ms")
                    if "milliseconds_median" not in row:
                        wrong.append(f"{kernel} {dim} {row['tiles']}: off by {row['difference']}")
                output.write_text(json.dumps(result, indent=1) + "\n")
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {output}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="half of it may be compilation"
    )
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="print the candidates")
    chosen = parser.parse_args()
    if chosen.dry_run:
        for trial in plan():
            print(f"{trial.kernel} at head dimension {trial.dim}: {trial.tiles}")
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run prints the candidates without one.")
    wrong = run(chosen.turns, chosen.seconds, chosen.jobs, chosen.output)
    if wrong:
        sys.exit("failed:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
