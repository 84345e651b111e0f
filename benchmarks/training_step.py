"""One training step of a GPT-2 with the penalty: ours, the published module, and no penalty at all.

    python benchmarks/training_step.py                     # 6 layers, width 768, 12 heads
    python benchmarks/training_step.py --tokens 512 1024   # fewer contexts

Time: the arms take turns in one process, so that whatever else the machine does hits all of them;
the ratio to plain sdpa is taken turn by turn. Memory: each arm runs alone in a fresh process and
reports the highest resident set of a step, minus what the process held before its first step.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_regularization import EntropyRegularization, HeadThresholds, record_entropy

RESULTS = Path(__file__).parent / "results" / "training_step.json"
ARMS = ("sdpa", "ours", "published")
LAYERS, WIDTH, HEADS = 6, 768, 12


def build_model(arm: str, tokens: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=HEADS,
        n_positions=tokens,
        vocab_size=8192,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_implementation="eager" if arm == "published" else "sdpa",
    )
    return GPT2LMHeadModel(config).train()


def step_of(arm: str, tokens: int) -> Callable[[], float]:
    """Return a function that runs forward, penalty and backward once, and gives the loss."""
    model = build_model(arm, tokens)
    ids = torch.randint(8192, (1, tokens), generator=torch.Generator().manual_seed(1))
    regularization = EntropyRegularization(loss_coeff=1e-5, tolerance_margin_factor=0.05)
    thresholds = HeadThresholds(LAYERS, HEADS)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        thresholds.zero_grad(set_to_none=True)
        if arm == "sdpa":
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        elif arm == "ours":
            with record_entropy(model) as recording:
                output = model(input_ids=ids, labels=ids, use_cache=False)
            loss = output.loss + regularization(recording, thresholds=thresholds())
        else:
            output = model(input_ids=ids, labels=ids, use_cache=False, output_attentions=True)
            loss = output.loss + regularization.compute_loss(
                output.attentions, thresholds(), HEADS, LAYERS
            )
        loss.backward()
        return loss.item()

    return step


def measure_time(tokens: int, turns: int) -> dict[str, dict[str, float]]:
    """Let the arms take turns; return seconds a step and the ratio to sdpa of the same turn."""
    steps = {arm: step_of(arm, tokens) for arm in ARMS}
    losses = {arm: step() for arm, step in steps.items()}
    if abs(losses["ours"] - losses["published"]) > 1e-5 * abs(losses["published"]):
        raise SystemExit(f"the arms disagree, so no time is reported: {losses}")
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(turns):
        for arm, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[arm].append(time.perf_counter() - start)
    return {
        arm: {
            "seconds_min": min(taken),
            "seconds_median": statistics.median(taken),
            "seconds_max": max(taken),
            "ratio_to_sdpa": statistics.median(
                mine / plain for mine, plain in zip(taken, seconds["sdpa"], strict=True)
            ),
        }
        for arm, taken in seconds.items()
    }


def peak_bytes() -> int:
    """Return the highest resident set of this program (ru_maxrss keeps that of its parent)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("memory is measured on Linux only.")


def measure_memory(arm: str, tokens: int) -> int:
    """Run two steps of one arm in a fresh process; return the bytes above its idle peak."""
    command = [sys.executable, __file__, "--memory-of", arm, "--tokens", str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report_memory(arm: str, tokens: int) -> None:
    step = step_of(arm, tokens)
    idle = peak_bytes()
    step()
    step()
    print(peak_bytes() - idle)


def hardware() -> dict[str, str | int]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        report_memory(options.memory_of, options.tokens[0])
        return
    rows = {}
    for tokens in options.tokens:
        arms = measure_time(tokens, options.turns)
        for arm in ARMS:
            arms[arm]["peak_bytes"] = measure_memory(arm, tokens)
            print(
                f"{tokens:5d} tokens  {arm:9s}  {arms[arm]['seconds_median']:6.2f} s"
                f"  {arms[arm]['ratio_to_sdpa']:5.2f} x  {arms[arm]['peak_bytes'] / 1e9:5.2f} GB",
                flush=True,
            )
        rows[str(tokens)] = arms
    shape = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "batch": 1, "dtype": "float32"}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"model": shape, "environment": hardware(), "turns": options.turns, "tokens": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
