"""One training step on a GPU: plain sdpa, ours with the penalty, the published module on eager.

    python benchmarks/gpu_training_step.py                  # 1B at 8192; GPT-2 small at 4096, 1024
    python benchmarks/gpu_training_step.py --largest        # also the largest context each fits
    python benchmarks/gpu_training_step.py --dry-run        # the plan; needs no GPU

Random weights in bfloat16. The 1B model has the shape of Llama 3.2 1B (16 layers, width 2048, 32
query and 8 key heads) and runs with non-reentrant checkpointing. Each arm runs in a process of its
own, so that peak memory is its own; all of them import what they need at once, while the first one
runs. An arm that fails is reported, the others go on, and the exit status is 1.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_attention import environment, milliseconds
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from entropy_regularization import EntropyRegularization, HeadThresholds, record_entropy
from entropy_regularization.attention import api

RESULTS = Path(__file__).parent / "results" / "gpu_training_step.json"
ARMS = ("ours", "sdpa", "published")  # the most wanted first
PROBLEMS = [("llama-1b", 8192), ("gpt2-small", 4096), ("gpt2-small", 1024)]
OUT_OF_MEMORY = 3  # exit code of a worker


def build_model(name: str, tokens: int, arm: str, tiny: bool = False, device: str = "cpu") -> Any:
    """Make a model with random weights; ``tiny`` keeps the architecture and shrinks it."""
    with torch.device(device):  # a billion normal numbers take a CPU longer than all steps
        return assemble(name, tokens, arm, tiny)


def assemble(name: str, tokens: int, arm: str, tiny: bool) -> Any:
    attention = "eager" if arm == "published" else "sdpa"
    if name == "gpt2-small":
        small = {"n_layer": 2, "n_embd": 24, "n_head": 2, "vocab_size": 100} if tiny else {}
        config: Any = GPT2Config(
            n_positions=tokens, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
            attn_implementation=attention, **small,
        )  # fmt: skip
        return GPT2LMHeadModel(config).to(torch.bfloat16).train()
    size = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
        | {"num_attention_heads": 4, "num_key_value_heads": 2}
        if tiny
        else {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    )
    config = LlamaConfig(
        **size, max_position_embeddings=tokens, tie_word_embeddings=True,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def step_of(model: Any, arm: str, tokens: int) -> Callable[[], float]:
    """Return a function that runs forward, penalty and backward once."""
    device = next(model.parameters()).device
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    ids = torch.randint(
        100 if model.config.vocab_size <= 100 else 10000, (1, tokens), device=device
    )
    regularization = EntropyRegularization(loss_coeff=1e-5, tolerance_margin_factor=0.05)
    thresholds = HeadThresholds(layers, heads).to(device)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        thresholds.zero_grad(set_to_none=True)
        if arm == "ours":
            with record_entropy(model) as recording:
                output = model(input_ids=ids, labels=ids, use_cache=False)
            loss = output.loss + regularization(recording, thresholds=thresholds())
        elif arm == "published":
            output = model(input_ids=ids, labels=ids, use_cache=False, output_attentions=True)
            loss = output.loss + regularization.compute_loss(
                output.attentions, thresholds(), heads, layers
            )
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.item())

    return step


def work(name: str, tokens: int, arm: str, turns: int) -> dict[str, float]:
    """Measure one arm in this process."""
    torch.manual_seed(0)
    model = build_model(name, tokens, arm, device="cuda")
    step = step_of(model, arm, tokens)
    loss = step()
    step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = [milliseconds(step) for _ in range(turns)]
    if api._say_once.cache_info().currsize:
        raise RuntimeError("attention did not run by the kernels; see the warning above.")
    return {
        "loss": loss,
        "milliseconds_median": statistics.median(times),
        "milliseconds_min": min(times),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "peak_bytes_above_weights": torch.cuda.max_memory_allocated() - held,
    }


def start_worker() -> subprocess.Popen[str]:
    """Start a fresh process, which waits for what it shall run when it has imported all it needs.

    Imports take as long as most arms do.
    """
    pipe = subprocess.PIPE
    command = [sys.executable, __file__, "--worker"]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run_worker(
    process: subprocess.Popen[str], arguments: list[str], seconds: float
) -> dict[str, Any]:
    """Let a started process run one arm; what goes wrong there is a result as well."""
    try:
        printed, said = process.communicate(json.dumps(arguments) + "\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        stop_worker(process)
        return {"skipped": f"took more than {seconds:.0f} s"}
    if process.returncode == OUT_OF_MEMORY:
        return {"skipped": "out of memory"}
    if process.returncode != 0:
        print(said[-3000:], file=sys.stderr, flush=True)
        return {"failed": said.strip()[-500:]}
    row: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return row


def stop_worker(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def largest_context(name: str, arm: str, seconds: float) -> dict[str, Any]:
    """Double the tokens until a step does not fit in memory, or would not in time."""
    begin, fits, taken = time.perf_counter(), 0, 0.0
    for tokens in (2**k for k in range(11, 21)):
        # attention's share of a step grows fourfold
        if time.perf_counter() - begin + 4 * taken > seconds:
            return {"tokens": fits, "stopped_by": "time"}
        start = time.perf_counter()
        try:
            model = build_model(name, tokens, arm, device="cuda")
            step_of(model, arm, tokens)()
        except RuntimeError as error:  # torch.OutOfMemoryError is one; a library's is another
            if not re.search("out of memory|ALLOC_FAILED|NOT_ENOUGH", str(error)):
                raise
            return {"tokens": fits, "stopped_by": "memory"}
        fits, taken = tokens, time.perf_counter() - start
        del model
        torch.cuda.empty_cache()
    return {"tokens": fits, "stopped_by": "the list"}


def worker(arguments: list[str]) -> None:
    task, name, arm, tokens, number = arguments
    try:
        if task == "largest":
            found: dict[str, Any] = largest_context(name, arm, float(number))
        else:
            found = work(name, int(tokens), arm, int(number))
    except torch.OutOfMemoryError:
        sys.exit(OUT_OF_MEMORY)
    print(json.dumps(found))


def measure(chosen: argparse.Namespace, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run all arms of all problems, then the largest contexts, until the time is up."""
    begin = time.perf_counter()

    def left() -> float:
        return chosen.total_seconds - (time.perf_counter() - begin)

    searched = ("gpt2-small", "llama-1b") if chosen.largest else ()
    arms_in_all = (len(PROBLEMS) + len(searched)) * len(ARMS)
    workers = [start_worker() for _ in range(arms_in_all if left() >= 1 else 0)]
    for name, tokens in PROBLEMS:
        arms: dict[str, Any] = {}
        result["problems"].append({"model": name, "tokens": tokens, "arms": arms})
        for arm in ARMS:
            limit = min(chosen.seconds, left())
            if limit < 1:
                arms[arm] = {"skipped": "not reached in time"}
                yield arms[arm]
                continue
            task = ["step", name, arm, str(tokens), str(chosen.turns)]
            arms[arm] = run_worker(workers.pop(0), task, limit)
            print(f"{name:10s} {tokens:6d} {arm:9s} {arms[arm]}", flush=True)
            yield arms[arm]
    for name in searched:
        found = result["largest"][name] = {}
        for arm in ARMS:
            limit = min(chosen.seconds, left())
            if limit < 30:
                found[arm] = {"skipped": "not reached in time"}
                yield found[arm]
                continue
            task = ["largest", name, arm, "0", str(limit - 20)]
            found[arm] = run_worker(workers.pop(0), task, limit)
            print(f"{name:10s} largest context {arm:9s} {found[arm]}", flush=True)
            yield found[arm]
    for process in workers:
        stop_worker(process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=240.0, help="limit of one arm")
    parser.add_argument("--total-seconds", type=float, default=3600.0, help="limit of all")
    parser.add_argument("--largest", action="store_true", help="also search the largest context")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        given = sys.stdin.readline()
        if given:
            worker(json.loads(given))
        return
    if chosen.dry_run:
        for name, tokens in PROBLEMS:
            print(f"{name} at {tokens} tokens: {', '.join(ARMS)}")
        print(f"{chosen.turns} turns; largest context: {chosen.largest}; to {chosen.output}")
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run prints the plan without one.")
    result: dict[str, Any] = {"environment": environment(), "problems": [], "largest": {}}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for row in measure(chosen, result):
        failed = failed or "failed" in row
        chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {chosen.output}")
    if failed:
        sys.exit("an arm failed; see above.")


if __name__ == "__main__":
    main()
