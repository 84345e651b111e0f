"""attention_with_entropy beside scaled_dot_product_attention: time, memory, growth with length.

    python benchmarks/attention.py                 # everything; about 20 minutes on 2 cores
    python benchmarks/attention.py --quick         # N up to 2048
    entropy-reg bench --quick                      # the same

The agreement tests run first; if one fails, nothing is reported. Times are ratios: the functions
take turns in one process, and each turn's time is divided by that of SDPA in the same turn. Memory
is the rise of the highest resident set of a fresh process over its level before the call, inputs
and outputs taken off. Causal float32, 12 heads of width 64, batch 1, unless a row says otherwise.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from entropy_regularization import (
    EntropyRegularization,
    __version__,
    attention_with_entropy,
)
from entropy_regularization.attention.compiled.build import unavailable_reason

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "attention.json"
HEADS, DIM = 12, 64
EAGER_UP_TO = 2048  # beyond it the matrices of eager attention take the machine's memory
BLOCKWISE_UP_TO = 8192  # what runs without a compiler; beyond it nothing changes but the time taken


def inputs(n: int, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return query, key, value, and the gradients of output and entropy."""
    generator = torch.Generator().manual_seed(n)
    made = [torch.randn(1, heads, n, DIM, generator=generator).to(dtype) for _ in range(4)]
    entropy_gradient = torch.randn(1, heads, n, generator=generator)
    return [*(tensor.requires_grad_() for tensor in made[:3]), made[3], entropy_gradient]


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
    return scaled_dot_product_attention(query, key, value, is_causal=True), None


def ours(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    found = attention_with_entropy(query, key, value, causal=True, **options)
    return found.output, found.entropy


def blockwise(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return ours(query, key, value, implementation="blockwise")


def windowed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return ours(query, key, value, window=(255, 0))


def packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    documents = torch.arange(key.shape[2])[None] // (key.shape[2] // 16)
    return ours(query, key, value, document=documents)


def padded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    real = torch.arange(key.shape[2])[None] >= key.shape[2] // 2
    return ours(query, key, value, key_padding=real)


def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(-1, -2) * DIM**-0.5).masked_fill(future, -torch.inf)
    weights = torch.softmax(scores, -1)
    return weights @ value, EntropyRegularization.compute_entropy(weights)


FUNCTIONS = {
    "sdpa": sdpa,
    "ours": ours,
    "blockwise": blockwise,
    "window of 256": windowed,
    "16 documents": packed,
    "left half padding": padded,
    "eager": eager,
}


def forward(name: str, given: list[Tensor]) -> Callable[[], Any]:
    function = FUNCTIONS[name]

    def run() -> Any:
        with torch.no_grad():
            return function(*given[:3])

    return run


def both(name: str, given: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward; with a gradient of the entropy where there is one."""
    function = FUNCTIONS[name]

    def run() -> Any:
        output, entropy = function(*given[:3])
        if entropy is None:
            return torch.autograd.grad(output, given[:3], given[3])
        return torch.autograd.grad((output, entropy), given[:3], (given[3], given[4].to(entropy)))

    return run


def take_turns(
    runs: dict[str, Callable[[], Any]], turns: int, base: str = "sdpa", *, warm: bool = True
) -> dict[str, dict[str, float]]:
    """Return seconds, and the ratio to the base of the same turn: min, median, max."""
    for run in runs.values() if warm else ():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    result = {}
    for name, taken in seconds.items():
        ratios = [mine / other for mine, other in zip(taken, seconds[base], strict=True)]
        result[name] = {
            "seconds_min": min(taken),
            "seconds_median": statistics.median(taken),
            "ratio_min": min(ratios),
            "ratio_median": statistics.median(ratios),
            "ratio_max": max(ratios),
            "ratio_of_minima": min(taken) / min(seconds[base]),
        }
    return result


def turns_for(n: int) -> int:
    return max(3 if n <= 16384 else 2, min(40, 40 * 1024 // n))


def measure_times(lengths: list[int], turns: int | None) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for n in lengths:
        most = {"sdpa": n, "ours": n, "blockwise": BLOCKWISE_UP_TO, "eager": EAGER_UP_TO}
        names = [name for name, limit in most.items() if n <= limit]
        given, count = inputs(n), turns or turns_for(n)
        rows[str(n)] = {
            kind: take_turns({name: of(name, given) for name in names}, count, warm=n <= 8192)
            for kind, of in (("forward", forward), ("both", both))
        }
        for kind, row in rows[str(n)].items():
            text = "  ".join(
                f"{name} {found['ratio_min']:.2f} {found['ratio_median']:.2f} "
                f"{found['ratio_max']:.2f}"
                for name, found in row.items()
            )
            base = row["sdpa"]["seconds_median"]
            print(f"N={n:6d} {kind:8s} sdpa {base * 1e3:9.1f} ms   ratios {text}", flush=True)
    return rows


def measure_structure() -> dict[str, Any]:
    """8192 tokens, a part of them excluded, against all of them: what is excluded costs nothing."""
    given = inputs(8192)
    shares = {"window of 256": 1 / 16, "16 documents": 1 / 16, "left half padding": 1 / 4}
    found = take_turns({name: both(name, given) for name in ("ours", *shares)}, 15, base="ours")
    for name, share in shares.items():
        print(
            f"N=8192 {name}: {found[name]['ratio_median']:.3f} of the time of full causal, "
            f"{share:.3f} of its scores",
            flush=True,
        )
    return found


class Shape(NamedTuple):
    """One attention as models make it; causal, if it is, with the last query at the last key."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    causal: bool


SHAPES = {
    "batch of 8, 128 tokens": Shape(8, 12, 12, 128, 128, 64, True),
    "batch of 8, 512 tokens": Shape(8, 12, 12, 512, 512, 64, True),
    "32 sentences of 64 tokens, all see all": Shape(32, 12, 12, 64, 64, 64, False),
    "4 images of 197 patches": Shape(4, 12, 12, 197, 197, 64, False),
    "32 heads over 8, width 128": Shape(1, 32, 8, 1024, 1024, 128, True),
    "512 tokens after 3584": Shape(1, 12, 12, 512, 4096, 64, True),
    "1 token after 4095": Shape(1, 12, 12, 1, 4096, 64, True),
}


def runs_of_shape(shape: Shape) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return forward, and forward and backward, of both functions on one shape."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, queries, keys, dim, causal = shape
    sizes = ((heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries))
    query, key, value, gradient = (
        torch.randn(batch, *size, dim, generator=generator) for size in sizes
    )
    given = [tensor.requires_grad_() for tensor in (query, key, value)]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mask = seen if causal and 1 < queries < keys else None
    options = {"is_causal": causal and queries == keys, "enable_gqa": heads != kv_heads}

    def plain() -> Tensor:
        return scaled_dot_product_attention(*given, mask, **options)

    def with_entropy() -> tuple[Tensor, Tensor]:
        return attention_with_entropy(*given, causal=causal)[:2]

    def without_gradient(function: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(function)

    return {
        "forward": {"sdpa": without_gradient(plain), "ours": without_gradient(with_entropy)},
        "both": {
            "sdpa": lambda: torch.autograd.grad(plain(), given, gradient),
            "ours": lambda: torch.autograd.grad(
                with_entropy(), given, (gradient, gradient[..., 0])
            ),
        },
    }


def measure_shapes() -> dict[str, Any]:
    """Ours against SDPA on the shapes that models make."""
    rows: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        rows[name] = {kind: take_turns(runs, 15) for kind, runs in runs_of_shape(shape).items()}
        text = "  ".join(
            f"{kind} {row['ours']['ratio_median']:.2f}" for kind, row in rows[name].items()
        )
        print(f"{name}: {text} times SDPA", flush=True)
    return rows


def measure_precision() -> dict[str, Any]:
    """Ours in bfloat16 and float16 against ours in float32."""
    rows = {}
    for n in (1024, 4096):
        runs = {
            str(dtype).removeprefix("torch."): both("ours", inputs(n, dtype=dtype))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        # The dtypes differ by less than two turns of one of them.
        rows[str(n)] = take_turns(runs, 4 * turns_for(n), base="float32")
        text = "  ".join(f"{name} {row['ratio_median']:.2f}" for name, row in rows[str(n)].items())
        print(f"N={n} precision: {text}", flush=True)
    return rows


def resident(highest: bool) -> int:
    """Return the resident set of this program, now or at its highest (Linux)."""
    field = "VmHWM:" if highest else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit("memory is measured on Linux only.")


def report_memory(name: str, n: int, heads: int) -> None:
    """Print bytes beyond inputs and outputs, and seconds, of one forward and backward."""
    both(name, inputs(64, heads))()  # libraries and threads are there
    given = inputs(n, heads)
    before = resident(highest=False)
    start = time.perf_counter()
    gradients = both(name, given)()
    seconds = time.perf_counter() - start
    # Output, entropy-like rows and gradients are what the caller keeps.
    kept = sum(tensor.nbytes for tensor in gradients) + gradients[0].nbytes
    print(json.dumps({"bytes": resident(highest=True) - before - kept, "seconds": seconds}))


def measure_memory(name: str, n: int, heads: int = HEADS) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory-of", name, str(n), str(heads)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, float] = json.loads(found.stdout)
    print(
        f"N={n:6d} heads={heads:2d} {name:9s} {row['bytes'] / 1e6:9.1f} MB beyond inputs and "
        f"outputs, {row['seconds']:.1f} s",
        flush=True,
    )
    return row


def flex_attention_forward(n: int) -> float | None:
    """Return the ratio of FlexAttention's compiled forward to SDPA's, None where it cannot run."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = (tensor.detach() for tensor in inputs(n)[:3])
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, n, n, device="cpu")
    try:
        compiled = torch.compile(flex_attention)
        runs = {
            "sdpa": forward("sdpa", [query, key, value]),
            "flex": lambda: compiled(query, key, value, block_mask=mask),
        }
        with torch.no_grad():
            return take_turns(runs, turns_for(n))["flex"]["ratio_median"]
    except (RuntimeError, NotImplementedError) as error:
        print(f"FlexAttention does not run here: {str(error).splitlines()[0]}", flush=True)
        return None


def agreement() -> None:
    """Run the agreement tests; stop on red."""
    folder = HERE.parent / "tests" / "attention"
    tests = [str(folder / name) for name in ("test_agreement.py", "test_compiled.py")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], check=False)
    if done.returncode:
        raise SystemExit("the agreement tests did not pass, so nothing is measured; see above.")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw time ratio and memory against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=140)
    left, right = figure.subplots(1, 2)
    lengths = [int(n) for n in result["times"]]
    for kind, label, colour in (
        ("both", "forward + backward", "#0072b2"),
        ("forward", "forward", "#d55e00"),
    ):
        ratios = [result["times"][str(n)][kind]["ours"]["ratio_median"] for n in lengths]
        left.plot(lengths, ratios, marker="o", label=f"ours, {label}", color=colour)
    left.axhline(1.0, color="#888888", linewidth=1)
    left.set(xscale="log", xlabel="tokens", title="time, SDPA without entropy = 1", ylim=(0, None))
    drawn = (
        ("ours", "ours", "#0072b2"),
        ("sdpa", "SDPA", "#888888"),
        ("eager", "eager + published formula", "#d55e00"),
    )
    for name, label, colour in drawn:
        rows = result["memory"][name]
        right.plot(
            [int(n) for n in rows],
            [row["bytes"] / 1e6 for row in rows.values()],
            marker="o",
            label=label,
            color=colour,
        )
    right.set(
        xscale="log", yscale="log", xlabel="tokens", title="memory beyond inputs and outputs [MB]"
    )
    for axes in (left, right):
        axes.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
        axes.minorticks_off()
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "entropy_regularization": __version__,
        "compiled": unavailable_reason() or "yes",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


def positive(text: str) -> int:
    """Return the number in an argument."""
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number.")


def parse_options() -> argparse.Namespace:
    """Read the arguments; what would fail only when all is measured fails here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="N up to 2048, no memory at 65536")
    parser.add_argument("--lengths", type=positive, nargs="+", help="numbers of tokens")
    parser.add_argument("--turns", type=positive, help="turns at each length; if not, by length")
    parser.add_argument("--skip-agreement", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON to write; the committed one, or build/ if only some is run",
    )
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        return options
    for package in ("pytest", "matplotlib"):
        if find_spec(package) is None:
            parser.error(f"{package} is not installed; run: pip install -e '.[tests]'")
    partly = options.quick or options.lengths
    output = options.output or (HERE.parent / "build" / RESULTS.name if partly else RESULTS)
    if output.suffix != ".json":
        parser.error(f"{output} is no name of a JSON file; the picture lies beside it, as .png.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        new = not output.exists()
        output.open("a").close()
        if new:
            output.unlink()  # nothing is left where nothing is measured
    except OSError as error:
        parser.error(f"{output} cannot be written ({error.strerror}); pass another --output.")
    options.output = output
    options.lengths = options.lengths or [
        n for n in (512, 1024, 2048, 4096, 8192, 16384, 32768) if n <= 2048 or not options.quick
    ]
    return options


def main() -> None:
    options = parse_options()
    if options.memory_of:
        name, n, heads = options.memory_of
        report_memory(name, int(n), int(heads))
        return
    if not options.skip_agreement:
        agreement()
    lengths, output = options.lengths, options.output
    result: dict[str, Any] = {"environment": hardware(), "shape": [1, HEADS, "N", DIM]}
    result["times"] = measure_times(lengths, options.turns)
    result["memory"] = {
        name: {str(n): measure_memory(name, n) for n in lengths if n <= most}
        for name, most in (
            ("sdpa", max(lengths)),
            ("ours", max(lengths)),
            ("blockwise", BLOCKWISE_UP_TO),
            ("eager", EAGER_UP_TO),
        )
    }
    if not options.quick:
        result["shapes"] = measure_shapes()
        result["structure_of_8192"] = measure_structure()
        result["precision"] = measure_precision()
        result["65536_tokens_2_heads"] = measure_memory("ours", 65536, 2)
        result["flex_forward_2048"] = flex_attention_forward(2048)
    output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, output.with_suffix(".png"))
    print(f"written: {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
