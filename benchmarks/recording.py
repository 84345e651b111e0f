"""What watching costs: a forward of GPT-2 small with record_entropy(gradient=False) against sdpa.

    python benchmarks/recording.py

Both take turns in one run, because machines are shared: read the ratios. Writes
benchmarks/results/recording.json.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_regularization import record_entropy

RESULTS = Path(__file__).parent / "results" / "recording.json"


def take_turns(plain: Callable[[], Any], recorded: Callable[[], Any], turns: int) -> dict[str, Any]:
    """Return seconds of both, and the ratio of each turn: min, median, max."""
    plain(), recorded()
    seconds: list[tuple[float, float]] = []
    for _ in range(turns):
        marks = [time.perf_counter()]
        for run in (plain, recorded):
            run()
            marks.append(time.perf_counter())
        seconds.append((marks[1] - marks[0], marks[2] - marks[1]))
    ratios = [mine / base for base, mine in seconds]
    return {
        "sdpa_seconds_median": statistics.median(base for base, _ in seconds),
        "recorded_seconds_median": statistics.median(mine for _, mine in seconds),
        "ratio_min": min(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_max": max(ratios),
    }


def measure(n: int, turns: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=n, attn_implementation="sdpa")).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, n))

    def plain() -> None:
        with torch.no_grad():
            model(ids)

    def recorded() -> None:
        with torch.no_grad(), record_entropy(model, gradient=False) as recording:
            model(ids)
        if len(recording) != model.config.n_layer:
            raise SystemExit(f"{len(recording)} layers were recorded, not {model.config.n_layer}.")

    found = take_turns(plain, recorded, turns)
    print(
        f"GPT-2 small, {n} tokens: sdpa {found['sdpa_seconds_median'] * 1e3:.0f} ms, recorded "
        f"{found['ratio_min']:.3f} {found['ratio_median']:.3f} {found['ratio_max']:.3f} times that "
        "(min, median, max of turns)",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "tokens": {str(n): measure(n, options.turns) for n in (256, 1024)},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
