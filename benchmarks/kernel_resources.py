"""Compile every kernel for a GPU that need not be there; report registers, spills, shared memory.

    python benchmarks/kernel_resources.py                          # the table of docs/kernel.md
    python benchmarks/kernel_resources.py --dims 64 --options everything

Triton brings NVIDIA's assembler, so this checks on any machine that the real compiler, not only the
interpreter, accepts each kernel, and that its tiles fit the registers: a stack that is not empty
means spilled registers, which cost time where inner loops touch them.
"""

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from machine_code import dump, inner_loops, instructions, overwritten_inputs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from entropy_regularization.attention.masking import Structure
from entropy_regularization.attention.triton import launch
from entropy_regularization.attention.triton.tiles import Tiles, choose_tiles

RESULTS = Path(__file__).parent / "results" / "kernel_resources.json"
OPTIONS = (
    "causal", "window", "padding", "documents", "dense", "bias", "softcap", "sinks", "dropout",
    "everything",
)  # fmt: skip
# bytes of shared memory that a program may have, by compute capability
SHARED_LIMIT = {
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip


def build_problem(options: str, dim: int, dtype: torch.dtype, n: int = 4096) -> launch.Problem:
    """Make a problem without storage: grouped heads, ``n`` tokens, causal, one option or all."""

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    def given(option: str) -> bool:
        return options in (option, "everything")

    structure = Structure(
        300 if given("window") else None,
        0,
        empty(1, 8, n, n, of=torch.bool) if given("dense") else None,
        empty(2, n, of=torch.bool) if given("padding") else None,
        empty(2, n, of=torch.int64) if given("documents") else None,
    )
    return launch.Problem(
        empty(2, 8, n, dim),
        empty(2, 4, n, dim),
        empty(2, 4, n, dim),
        structure,
        0.1,
        empty(1, 8, n, n, of=torch.float32) if given("bias") else None,
        30.0 if given("softcap") else None,
        empty(8) if given("sinks") else None,
        0.1 if given("dropout") else 0.0,
        empty(1, of=torch.int64) if given("dropout") else None,
    )


def record_launches(
    problem: launch.Problem, through: list[str], capability: int
) -> list[tuple[Any, Tiles, dict[str, Any]]]:
    """Return what would be launched by a forward and a backward pass ``through`` some results."""
    launches: list[tuple[Any, Tiles, dict[str, Any]]] = []

    def record(kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any]) -> None:
        launches.append((kernel, tiles, arguments))

    def tiles_for(
        kernel: str, query: torch.Tensor, value: torch.Tensor, loaded: bool = False
    ) -> Tiles:
        width = max(query.shape[-1], value.shape[-1])
        return choose_tiles(kernel, width, query.dtype, SHARED_LIMIT[capability], loaded)

    kept = launch.start_kernel, launch.tiles_for
    launch.start_kernel, launch.tiles_for = record, tiles_for
    try:
        output, entropy, log_normalizer, _, log2_normalizer = launch.forward(problem)
        results = launch.Upstream(output, entropy, log_normalizer)._asdict()
        upstream = launch.Upstream(
            *(results[name] if name in through else None for name in results)
        )
        saved = (output, entropy, log2_normalizer)
        launch.backward(problem, saved, upstream, (True, True, True, True, False))
    finally:
        launch.start_kernel, launch.tiles_for = kept
    return launches


class PretendedDevice:
    """What Triton's launcher asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_kernel(kernel: Any, tiles: Tiles, arguments: dict[str, Any], capability: int) -> Any:
    """Compile one kernel by Triton's own launcher, for a device that need not be there."""
    driver.set_active(PretendedDevice(capability))
    return kernel.run(
        **arguments,
        grid=(1,),
        warmup=True,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=True,
    )


def resources_of(
    kernel: Any, tiles: Tiles, arguments: dict[str, Any], capability: int
) -> dict[str, Any]:
    """Compile one kernel and read what its machine code uses."""
    start = time.perf_counter()
    compiled = compile_kernel(kernel, tiles, arguments, capability)
    seconds = time.perf_counter() - start
    found = dict(re.findall(r"(REG|STACK):(\d+)", dump(compiled.asm["cubin"], "-res-usage")))
    code = instructions(dump(compiled.asm["cubin"], "-sass"))
    loops = inner_loops(code)
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for loop in loops for text in loop)
    # Of the loops that compute scores (others wait for memory) the shortest has no masks; a warp
    # has 32 threads, each some of the scores.
    lengths = [len(loop) for loop in loops if any("MUFU.EX2" in text for text in loop)]
    threads, scores = 32 * tiles.warps, tiles.rows * tiles.keys
    per_score = min(lengths) * threads / scores if lengths and scores else None
    return {
        "registers": int(found["REG"]),
        "stack_bytes": int(found["STACK"]),
        "spills_in_inner_loops": spills,
        "overwritten_inputs": len(overwritten_inputs(code)),
        "instructions_a_score": per_score and round(per_score, 1),
        "shared_bytes": compiled.metadata.shared,
        "compile_seconds": round(seconds, 1),
    }


def compile_all(
    dtypes: list[str],
    dims: list[int],
    options: str,
    tokens: int,
    through: list[str],
    capability: int,
) -> list[dict[str, Any]]:
    """Compile every kernel for every dtype and head dimension."""
    rows = []
    for dtype in dtypes:
        for dim in dims:
            problem = build_problem(options, dim, getattr(torch, dtype), tokens)
            for kernel, tiles, arguments in record_launches(problem, through, capability):
                used = resources_of(kernel, tiles, arguments, capability)
                if used["shared_bytes"] > SHARED_LIMIT[capability]:
                    raise SystemExit(f"{kernel.__name__} at dim {dim} needs {used}: too much")
                row = {"kernel": kernel.__name__, "dim": dim, "dtype": dtype, **tiles._asdict()}
                rows.append(row | used)
                print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--options", choices=OPTIONS, default="causal")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--through", nargs="+", choices=launch.Upstream._fields, default=["output", "entropy"],
        help="what is differentiated",
    )  # fmt: skip
    parser.add_argument("--capability", type=int, choices=SHARED_LIMIT, default=90)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set, which leaves nothing to compile; unset it.")
    with tempfile.TemporaryDirectory() as cache:  # so that nothing was compiled before
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = compile_all(
            chosen.dtypes, chosen.dims, chosen.options, chosen.tokens,
            chosen.through, chosen.capability,
        )  # fmt: skip
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    result = {
        "capability": chosen.capability,
        "options": chosen.options,
        "tokens": chosen.tokens,
        "through": chosen.through,
        "versions": versions,
        "kernels": rows,
    }
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
