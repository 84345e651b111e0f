"""What a training step keeps the host busy, on the path to a GPU: plain sdpa against ours.

    python benchmarks/host_time.py

A short step on a GPU waits for Python, so what ours adds there is a cost of its own. No GPU is
needed to see it: the model is tiny and on the CPU, the kernels go through Triton's own launcher up
to the call of the driver, and are then left out. Both arms take turns in one run, because machines
are shared: read the ratios. Writes benchmarks/results/host_time.json.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from kernel_resources import PretendedDevice
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from triton.runtime import driver

from entropy_regularization import EntropyRegularization, HeadThresholds, record_entropy
from entropy_regularization.attention import api
from entropy_regularization.attention.triton import launch
from entropy_regularization.attention.triton.tiles import Tiles
from entropy_regularization.integrations.transformers import regularize

RESULTS = Path(__file__).parent / "results" / "host_time.json"
BATCH, TOKENS, LAYERS, HEADS, VOCABULARY = 2, 32, 12, 2, 100
# what starts no kernel on a GPU
FREE = {
    f"aten::{name}"
    for name in (
        "alias", "as_strided", "as_strided_", "broadcast_tensors", "chunk", "detach", "empty",
        "empty_like", "empty_strided", "expand", "item", "lift_fresh", "_local_scalar_dense",
        "narrow", "new_empty", "permute", "promote_types", "reshape", "_reshape_alias", "resize_",
        "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t",
        "to", "_to_copy", "transpose", "unbind", "unsqueeze", "_unsafe_view", "view", "view_as",
    )
}  # fmt: skip
MODELS = ("gpt2", "gpt2 with padding", "gpt2, regularize", "llama of 32 layers with LoRA")


def pretend_gpu() -> None:
    """Let attention take the kernels on the CPU, and stop each before the driver would run it."""
    driver.set_active(PretendedDevice(90))
    choose = api.choose_implementation

    def start_kernel(kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any]) -> None:
        kernel.run(
            **arguments,
            grid=(programs,),
            warmup=True,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )

    launch.start_kernel = start_kernel
    api._reason_against["triton"] = lambda *tensors, **options: None
    api.choose_implementation = lambda asked, *problem: choose("triton", *problem)


def build_model(name: str) -> torch.nn.Module:
    size: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY}
    if name.startswith("gpt2"):
        size |= {"n_layer": LAYERS, "n_embd": 32, "n_head": HEADS, "n_positions": TOKENS}
        size |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**size)).train()
    size |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 32}
    size |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    model = LlamaForCausalLM(LlamaConfig(**size)).train()
    return get_peft_model(model, LoraConfig(target_modules="all-linear"))


def steps_of(name: str) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Return a plain training step, one with the penalty, and how many layers there are."""
    torch.manual_seed(0)
    plain, model = build_model(name), build_model(name)
    layers = model.config.num_hidden_layers
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    if "padding" in name:
        batch["attention_mask"] = (torch.arange(TOKENS) < TOKENS - 4).long().repeat(BATCH, 1)
    regularization = EntropyRegularization.calibrated()
    thresholds = HeadThresholds(layers, HEADS)
    if "gpt2" not in name or "regularize" in name:
        regularize(model, regularization)
        return step_of(plain, batch), step_of(model, batch), layers

    def recorded() -> None:
        model.zero_grad(set_to_none=True)
        with record_entropy(model) as recording:
            loss = model(**batch).loss
        (loss + regularization(recording, thresholds=thresholds())).backward()

    return step_of(plain, batch), recorded, layers


def step_of(model: torch.nn.Module, batch: dict[str, Any]) -> Callable[[], Any]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    return step


def count_operations(step: Callable[[], Any]) -> int:
    """Count the operations of torch in a step that would each start a kernel on a GPU."""

    def counts(event: Any) -> bool:
        return event.name.startswith("aten::") and event.name not in FREE

    with torch.profiler.profile() as profile:
        step()
    return sum(
        counts(event) and not any(map(counts, event.cpu_children)) for event in profile.events()
    )


def measure(name: str, turns: int, seconds: float = 0.2) -> dict[str, Any]:
    """Let both arms take turns, each for a while; return milliseconds a step."""
    plain, ours, layers = steps_of(name)
    for _ in range(3):
        plain(), ours()
    taken: list[list[float]] = []
    for _ in range(turns):
        taken.append([])
        for step in (plain, ours):
            count, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds:
                step()
                count += 1
            taken[-1].append(1e3 * (time.perf_counter() - begin) / count)
    base, mine = (statistics.median(arm) for arm in zip(*taken, strict=True))
    added = statistics.median(both[1] - both[0] for both in taken)
    found = {
        "sdpa_milliseconds_median": base,
        "ours_milliseconds_median": mine,
        "ratio_median": statistics.median(both[1] / both[0] for both in taken),
        "added_microseconds_a_layer": 1e3 * added / layers,
        "added_operations_a_layer": (count_operations(ours) - count_operations(plain)) / layers,
        "layers": layers,
    }
    print(
        f"{name}: sdpa {base:.1f} ms, ours {mine:.1f} ms, {found['ratio_median']:.2f} times; "
        f"added to each of {layers} layers: {found['added_microseconds_a_layer']:.0f} us, "
        f"{found['added_operations_a_layer']:.1f} operations",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set, which has a launcher of its own; unset it.")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what kernels leave unwritten may hold numbers that are slow
    pretend_gpu()
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "models": {name: measure(name, options.turns) for name in options.models},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
