"""Attention with entropy on a GPU against what else one could run: time, memory, and the floor.

    python benchmarks/gpu_attention.py                    # 1k..32k tokens, head dims 64 and 128
    python benchmarks/gpu_attention.py --dry-run          # the plan and its floors; needs no GPU

Arms, all causal, bfloat16: ours (output and entropy); SDPA's flash and cuDNN backends and
FlexAttention (no entropy at all); FlexAttention with values widened to [V, K], which gives
``E[s] = scale q . (P K)`` and so the entropy; eager attention with the published formula. The arms
take turns, so that clock changes hit all of them; those that compile nothing for a shape go first
over all problems, then the others beside ours and flash. FlexAttention is compiled for all problems
before, in processes side by side, so that its first call finds that on disk. Backward passes carry
a gradient of the entropy where there is one. No time is reported for an arm whose results are
wrong; what no other arm could be compared with stands in ``unverified``. Times are the device's;
what a call keeps the host busy stands beside them. An arm that fails is reported, the others go on,
and the exit status is 1.

The floor is the larger of FLOPs over the rate of a large matrix product and bytes over the rate of
a large copy, both measured on the same device.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Hashable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from entropy_regularization import attention_with_entropy

RESULTS = Path(__file__).parent / "results" / "gpu_attention.json"
ARMS = ("ours", "sdpa_flash", "sdpa_cudnn", "flex", "flex_widened", "eager_published")
COMPILED = ("flex", "flex_widened")  # anew for every shape
QUICK = ("ours", "sdpa_flash", "sdpa_cudnn")  # nothing is compiled anew for a shape
COMPARED = ("ours", "sdpa_flash")  # measured again beside the others
STANDARDS = ("sdpa_flash", "eager_published", "flex_widened")  # the first that there is is right
WITH_ENTROPY = ("ours", "flex_widened", "eager_published")
TOLERANCE = {"output": 0.05, "entropy": 0.1}  # of a gradient: 5 % of its largest number
EAGER_LIMIT = 8192  # tokens; beyond this its matrices do not fit
NOMINAL = {"flops_per_second": 8e14, "bytes_per_second": 4e12}  # for the plan of a dry run


class Shape(NamedTuple):
    """One problem: as many tokens in all at every length."""

    batch: int
    heads: int
    tokens: int
    dim: int


class Compilation(NamedTuple):
    """What is compiled for one problem, one way."""

    arm: str
    shape: Shape
    backward: bool


def plan(tokens: list[int], dims: list[int], total: int) -> list[Shape]:
    """List the problems: ``total`` tokens of width 2048 at every length and head dimension."""
    return [Shape(max(1, total // n), 2048 // dim, n, dim) for n in tokens for dim in dims]


def rounds_of(arms: list[str]) -> list[list[str]]:
    """Order the arms by what they cost: those that compile for every shape come last."""
    quick = [arm for arm in arms if arm in QUICK]
    slow = [arm for arm in arms if arm not in QUICK]
    beside = [arm for arm in arms if arm in COMPARED]
    return [found for found in (quick, [*beside, *slow] if slow else []) if found]


def floor_seconds(shape: Shape, rates: dict[str, float], backward: bool) -> float:
    """Return the least time the device could take, for fused causal attention.

    Forward: two products over half a matrix, 2 FLOPs each; backward: five more. Bytes: forward
    reads three tensors and writes one and two numbers a row; backward reads five, writes three.
    """
    batch, heads, n, dim = shape
    products = 7 if backward else 2
    flops = products * 2 * batch * heads * n * (n + 1) / 2 * dim
    tensors = 4 + (8 if backward else 0)
    moved = batch * heads * n * (tensors * dim * 2 + (16 if backward else 8))
    return max(flops / rates["flops_per_second"], moved / rates["bytes_per_second"])


def causal(batch: Any, head: Any, row: Any, key: Any) -> Any:
    return row >= key


def attention_of(arm: str, shape: Shape) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return query, key, value -> (output, entropy or None)."""
    scale = shape.dim**-0.5

    def ours(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        found = attention_with_entropy(query, key, value, causal=True, implementation="triton")
        return found.output, found.entropy

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        backend = SDPBackend.FLASH_ATTENTION if arm == "sdpa_flash" else SDPBackend.CUDNN_ATTENTION
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True
            ), None

    def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        future = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool, device=query.device)
        score = (query @ key.mT * scale).masked_fill(future.triu(1), -torch.inf)
        weight = score.softmax(-1, dtype=torch.float32)
        entropy = -torch.nansum(weight * torch.log(weight + 1e-9), -1)
        return weight.to(value.dtype) @ value, entropy

    if arm == "ours":
        return ours
    if arm == "eager_published":
        return eager
    if arm.startswith("sdpa"):
        return sdpa
    torch._dynamo.config.recompile_limit = 256  # one a shape and arm; at 8 it would run unfused
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = create_block_mask(causal, None, None, shape.tokens, shape.tokens, device="cuda")
    # Its tiles are chosen by the width of the keys; values twice as wide overflow shared memory.
    fewer_stages = {"bwd_num_stages": 1} if shape.dim > 64 else None

    def flex(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        if arm == "flex":
            return compiled(query, key, value, block_mask=block_mask), None
        wide, aux = compiled(
            query, key, torch.cat((value, key), -1),
            block_mask=block_mask, return_aux=AuxRequest(lse=True), kernel_options=fewer_stages,
        )  # fmt: skip
        output, mean_key = wide.split(shape.dim, -1)
        return output, aux.lse - scale * (query.float() * mean_key.float()).sum(-1)

    return flex


def step_of(arm: str, shape: Shape, backward: bool, inputs: list[Tensor]) -> Callable[[], Any]:
    """Return a function that runs one forward pass, and one backward pass if asked."""
    function = attention_of(arm, shape)
    device = inputs[0].device
    generator = torch.Generator(device).manual_seed(1)  # the same gradients for every arm
    upstream = torch.randn(shape, generator=generator, device=device, dtype=inputs[0].dtype)
    slope = torch.randn(shape[:3], generator=generator, device=device)

    def step() -> Any:
        with torch.set_grad_enabled(backward):
            output, entropy = function(*inputs)
        if not backward:
            return output, entropy
        outputs, gradients = [output], [upstream]
        if entropy is not None:
            outputs.append(entropy)
            gradients.append(slope.to(entropy.dtype))
        return torch.autograd.grad(outputs, inputs, gradients)

    return step


def time_step(step: Callable[[], Any]) -> tuple[float, float]:
    """Return milliseconds of the device, and those that the call kept the host busy.

    The device sleeps first, so that it never waits for the next launch: short problems are bound by
    the host otherwise.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10_000_000)  # cycles, about five milliseconds
    start.record()
    begin = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - begin)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), host


def milliseconds(step: Callable[[], Any]) -> float:
    return time_step(step)[0]


def peak_bytes(step: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_rates() -> dict[str, float]:
    """Measure what the device does: FLOPs of a large product, bytes of a large copy, a second."""
    n = 8192
    left, right = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        left @ right
        target.copy_(source)
    product = min(milliseconds(lambda: left @ right) for _ in range(20))
    copy = min(milliseconds(lambda: target.copy_(source)) for _ in range(20))
    return {"flops_per_second": 2e3 * n**3 / product, "bytes_per_second": 2e3 * 2**30 / copy}


def compare_results(
    results: dict[str, Any], backward: bool
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Compare what the arms found with what the first of STANDARDS that has it found.

    Args:
        results: (output, entropy or None), or the gradients of query, key and value, by arm.
        backward: which of the two.

    Returns:
        What is wrong with an arm, and which of its results there is nothing to compare with.
    """
    names = ("d_query", "d_key", "d_value") if backward else ("output", "entropy")
    arms: dict[str, dict[str, Tensor]] = {}
    for arm, found in results.items():
        # The entropy has a share in the gradients of query and key, none in that of the value.
        shared = " with entropy" * (arm in WITH_ENTROPY)
        arms[arm] = {
            name + shared * (name in ("d_query", "d_key")): tensor
            for name, tensor in zip(names, found, strict=True)
            if tensor is not None
        }
    wrong: dict[str, str] = {}
    unverified: dict[str, list[str]] = {}
    for arm, found in arms.items():
        for name, tensor in found.items():
            having = [other for other in STANDARDS if name in arms.get(other, ())]
            if not having:
                unverified.setdefault(arm, []).append(name)
                continue
            expected = arms[having[0]][name].float()
            error = (tensor.float() - expected).abs().max().item()
            limit = TOLERANCE.get(name, 0.05 * expected.abs().max().item())
            if not error <= limit:
                wrong[arm] = f"{name} is off by {error:.2g}"
    return wrong, unverified


def attempt(call: Callable[[], Any]) -> tuple[Any, dict[str, str]]:
    """Call something that may fail; return its result, or None and why there is none."""
    try:
        return call(), {}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, {"skipped": "out of memory"}
    except Exception as error:  # noqa: BLE001 - one arm must not end the others
        traceback.print_exc()
        return None, {"failed": f"{type(error).__name__}: {str(error)[:500]}"}


def first_call(prepare: Callable[[], Callable[[], Any]]) -> tuple[Callable[[], Any], Any, float]:
    """Prepare a step and run it once; return it, its result and the seconds of the call."""
    step = prepare()
    start = time.perf_counter()
    result = step()
    torch.cuda.synchronize()
    return step, result, time.perf_counter() - start


def inputs_of(shape: Shape) -> list[Tensor]:
    """Return query, key and value."""
    torch.manual_seed(0)
    return [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]


def compile_arm(task: Compilation) -> str | None:
    """Run an arm once, so that the compiler's caches on disk have it; say why it failed."""
    arm, shape, backward = task
    torch._inductor.config.compile_threads = 1  # there are processes enough
    prepare = functools.partial(step_of, arm, shape, backward, inputs_of(shape))
    _, problem = attempt(functools.partial(first_call, prepare))
    torch.cuda.empty_cache()
    return problem.get("failed") or problem.get("skipped")


def compile_all(
    compile_one: Callable[[Any], str | None], tasks: list[Any], jobs: int, seconds: float
) -> dict[Hashable, str]:
    """Compile in processes side by side, none of which is left; return what failed, and why.

    Args:
        compile_one: compiles a task, and says why it failed if it did.
        tasks: the first are compiled first.
        jobs: processes.
        seconds: what is not compiled then has failed.
    """
    failed = dict.fromkeys(tasks, "not compiled in time")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max_workers=jobs, mp_context=context)
    futures = {pool.submit(compile_one, task): task for task in tasks}
    try:
        for future in as_completed(futures, timeout=seconds):
            error = future.exception()  # a process that was killed, for one
            reason = future.result() if error is None else f"{type(error).__name__}: {error}"
            if reason is None:
                del failed[futures[future]]
            else:
                failed[futures[future]] = reason
    except TimeoutError:
        pass
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():  # or they would disturb what is timed
        process.kill()
        process.join()
    return failed


def measure(shape: Shape, backward: bool, arms: list[str], turns: int) -> dict[str, Any]:
    """Let the arms take turns on one problem, one way."""
    inputs = inputs_of(shape)
    rows: dict[str, Any] = {}
    steps, results = {}, {}
    for arm in arms:
        if arm == "eager_published" and shape.tokens > EAGER_LIMIT:
            rows[arm] = {"skipped": f"its matrices are too large beyond {EAGER_LIMIT} tokens"}
            continue
        prepare = functools.partial(step_of, arm, shape, backward, inputs)
        found, rows[arm] = attempt(functools.partial(first_call, prepare))
        if found is not None:
            steps[arm], results[arm], rows[arm]["first_call_seconds"] = found
    wrong, unverified = compare_results(results, backward)
    del results
    for arm, names in unverified.items():
        rows[arm]["unverified"] = names
    for arm, reason in wrong.items():
        rows[arm] = {"failed": reason}
        del steps[arm]
    for arm, step in list(steps.items()):
        peak, problem = attempt(functools.partial(peak_bytes, step))
        rows[arm] |= problem or {"peak_bytes": peak}
        if problem:
            del steps[arm]
    for arm in steps if "sdpa_flash" in steps else ():
        ratio = rows[arm]["peak_bytes"] / rows["sdpa_flash"]["peak_bytes"]
        rows[arm]["memory_ratio_to_sdpa_flash"] = ratio
    return rows | take_turns(steps, turns, rows)


def take_turns(
    steps: dict[str, Callable[[], Any]], turns: int, rows: dict[str, Any]
) -> dict[str, Any]:
    """Time the arms in turns; return their rows with the times in them."""
    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in steps}
    found = {arm: dict(rows[arm]) for arm in steps}
    for _ in range(turns):
        for arm in list(taken):
            time_taken, problem = attempt(functools.partial(time_step, steps[arm]))
            if problem:
                found[arm] |= problem
                del taken[arm]
            else:
                taken[arm].append(time_taken)
    for arm, times in taken.items():
        device = [both[0] for both in times]
        found[arm] |= {
            "milliseconds_median": statistics.median(device),
            "milliseconds_min": min(device),
            "host_milliseconds_median": statistics.median(both[1] for both in times),
        }
        if "sdpa_flash" in taken:
            plain = [both[0] for both in taken["sdpa_flash"]]
            ratios = (mine / other for mine, other in zip(device, plain, strict=True))
            found[arm]["ratio_to_sdpa_flash"] = statistics.median(ratios)
    return found


def environment() -> dict[str, Any]:
    import triton

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else None,
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def run(
    shapes: list[Shape], arms: list[str], turns: int, seconds: float, output: Path
) -> list[str]:
    """Measure every problem until the time is up; write what there is after each.

    Returns what failed.
    """
    begin = time.perf_counter()
    rates = measure_rates()
    problems = [(shape, backward) for shape in shapes for backward in (False, True)]
    left = [(found, *problem) for found in rounds_of(arms) for problem in problems]
    tasks = [Compilation(arm, *each) for each in problems for arm in COMPILED if arm in arms]
    result: dict[str, Any] = {"environment": environment(), "rates": rates, "problems": []}
    failed = []
    output.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        result["not_reached"] = [
            {"arms": found, **shape._asdict(), "backward": backward}
            for found, shape, backward in left
        ]
        output.write_text(json.dumps(result, indent=1) + "\n")

    write()
    while left and time.perf_counter() - begin < seconds:
        if tasks and not set(COMPILED).isdisjoint(left[0][0]):
            remaining = seconds - (time.perf_counter() - begin)
            late = compile_all(compile_arm, tasks, max(1, (os.cpu_count() or 1) - 1), remaining / 2)
            print(f"compiled side by side: {len(tasks) - len(late)} of {len(tasks)}", flush=True)
            tasks = []
        found, shape, backward = left.pop(0)
        floor = 1e3 * floor_seconds(shape, rates, backward)
        rows = measure(shape, backward, found, turns)
        problem = {**shape._asdict(), "backward": backward, "floor_milliseconds": floor}
        result["problems"].append(problem | {"arms": rows})
        write()
        for arm, row in rows.items():
            print(describe(shape, backward, arm, floor, row), flush=True)
            if "failed" in row:
                failed.append(f"{arm} at {shape.tokens} x {shape.dim}")
    print(f"written: {output}; problems not reached: {len(left)}")
    return failed


def describe(shape: Shape, backward: bool, arm: str, floor: float, row: dict[str, Any]) -> str:
    place = f"{shape.tokens:6d} x {shape.dim:3d} {'both' if backward else 'fwd ':4s} {arm:16s}"
    if "milliseconds_median" not in row:
        return f"{place} {row.get('skipped') or 'FAILED: ' + row['failed']}"
    ratio = row.get("ratio_to_sdpa_flash", float("nan"))
    return (
        f"{place} {row['milliseconds_median']:8.3f} ms  {ratio:5.2f} x flash"
        f"  floor {floor:7.3f} ms  {row['peak_bytes'] / 1e9:6.2f} GB"
        f"  host {row['host_milliseconds_median']:6.3f} ms"
        + "".join(f"  {name} unverified" for name in row.get("unverified", ()))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--total", type=int, default=16384, help="tokens in a batch")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no problem after this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its floors")
    chosen = parser.parse_args()
    shapes = plan(chosen.tokens, chosen.dims, chosen.total)
    if chosen.dry_run:
        for shape in shapes:
            floors = [1e3 * floor_seconds(shape, NOMINAL, both) for both in (False, True)]
            print(f"{shape}: floor at nominal rates {floors[0]:.3f} ms, both ways {floors[1]:.3f}")
        for found in rounds_of(chosen.arms):
            print(f"arms: {', '.join(found)}; {chosen.turns} turns; to {chosen.output}")
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run prints the plan without one.")
    failed = run(shapes, chosen.arms, chosen.turns, chosen.seconds, chosen.output)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
