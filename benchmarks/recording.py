"""What a recording costs, against the same model without one.

    python benchmarks/recording.py

Of GPT-2 small, whose attention is fused: a forward pass with record_entropy(gradient=False) against
sdpa. Of a model of GPT-Neo's shape, which takes a softmax of its own: forward and backward of the
loss and the entropies, against the loss alone and against the published formula on the matrices
that the model returns, and the bytes that backward keeps. All take turns in one run, because
machines are shared: read the ratios. Writes benchmarks/results/recording.json.
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
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from entropy_regularization import record_entropy

RESULTS = Path(__file__).parent / "results" / "recording.json"
Runs = dict[str, Callable[[], Any]]


def take_turns(runs: Runs, turns: int) -> dict[str, Any]:
    """Return the median seconds of the first run, and the ratios of the others to it.

    Ratios are those of each turn: min, median, max.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    first, *others = seconds
    found: dict[str, Any] = {f"{first}_seconds_median": statistics.median(seconds[first])}
    for name in others:
        ratios = [mine / base for mine, base in zip(seconds[name], seconds[first], strict=True)]
        found[name] = {
            "ratio_min": min(ratios),
            "ratio_median": statistics.median(ratios),
            "ratio_max": max(ratios),
        }
    return found


def kept(run: Callable[[], Any]) -> int:
    """Return the bytes that a run keeps for its backward pass, each storage counted once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storages.values())


def fused(n: int, turns: int) -> dict[str, Any]:
    """Measure GPT-2 small."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=n, attn_implementation="sdpa")).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, n))

    @torch.no_grad()
    def plain() -> None:
        model(ids)

    @torch.no_grad()
    def recorded() -> None:
        with record_entropy(model, gradient=False) as recording:
            model(ids)
        check(len(recording), model.config.n_layer)

    return take_turns({"sdpa": plain, "recorded": recorded}, turns)


def own_softmax(n: int, turns: int) -> dict[str, Any]:
    """Measure a model of GPT-Neo's shape, 4 layers of 12 heads, without dropout."""
    torch.manual_seed(0)
    kinds = [[["global", "local"], 2]]
    config = GPTNeoConfig(hidden_size=768, num_layers=4, num_heads=12, attention_types=kinds)
    model = GPTNeoForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (1, n))

    def plain() -> Tensor:
        return model(ids, labels=ids).loss

    def recorded() -> Tensor:
        with record_entropy(model) as recording:
            loss = model(ids, labels=ids).loss
        check(len(recording), config.num_layers)
        return loss + sum(layer.entropy.mean() for layer in recording)

    def published() -> Tensor:
        output = model(ids, labels=ids, output_attentions=True)
        rows = [-(p * torch.log(p + 1e-9)).sum(-1) for p in output.attentions]
        return output.loss + sum(each.mean() for each in rows)

    runs: Runs = {"plain": plain, "recorded": recorded, "published formula": published}
    found = take_turns(
        {name: lambda run=run: run().backward() for name, run in runs.items()}, turns
    )
    bytes_kept = {name: kept(run) for name, run in runs.items()}
    for name in ("recorded", "published formula"):
        found[name]["bytes_kept_ratio"] = bytes_kept[name] / bytes_kept["plain"]
    return found


def check(layers: int, wanted: int) -> None:
    if layers != wanted:
        raise SystemExit(f"{layers} layers were recorded, not {wanted}.")


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
        "GPT-2 small": {str(n): fused(n, options.turns) for n in (256, 1024)},
        "GPT-Neo's shape": {str(n): own_softmax(n, options.turns) for n in (256, 1024)},
    }
    print(json.dumps(result, indent=1))
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
