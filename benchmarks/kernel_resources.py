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
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from entropy_regularization.attention.masking import Structure
from entropy_regularization.attention.triton import launch
from entropy_regularization.attention.triton.tiles import Tiles, choose_tiles

RESULTS = Path(__file__).parent / "results" / "kernel_resources.json"
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
# bytes of shared memory that a program may have, by compute capability
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def build_problem(options: str, dim: int, dtype: torch.dtype) -> launch.Problem:
    """Make a problem without storage: grouped heads, 4096 tokens, causal."""

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    n = 4096
    query, key, value = empty(2, 8, n, dim), empty(2, 4, n, dim), empty(2, 4, n, dim)
    if options == "causal":
        return launch.Problem(
            query, key, value, Structure(None, 0), 0.1, None, None, None, 0.0, None
        )
    structure = Structure(
        300,
        0,
        empty(1, 8, n, n, of=torch.bool),
        empty(2, n, of=torch.bool),
        empty(2, n, of=torch.int64),
    )
    bias, sinks, seed = empty(1, 8, n, n), empty(8), empty(1, of=torch.int64)
    return launch.Problem(query, key, value, structure, 0.1, bias, 30.0, sinks, 0.1, seed)


def record_launches(
    problem: launch.Problem, capability: int
) -> list[tuple[Any, Tiles, dict[str, Any]]]:
    """Return what would be launched by a forward and a backward pass."""
    launches: list[tuple[Any, Tiles, dict[str, Any]]] = []

    def record(kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any]) -> None:
        launches.append((kernel, tiles, arguments))

    def tiles_for(kernel: str, query: torch.Tensor, value: torch.Tensor) -> Tiles:
        width = max(query.shape[-1], value.shape[-1])
        return choose_tiles(kernel, width, query.dtype, SHARED_LIMIT[capability])

    kept = launch.start_kernel, launch.tiles_for
    launch.start_kernel, launch.tiles_for = record, tiles_for
    try:
        output, entropy, log_normalizer, _ = launch.forward(problem)
        upstream = launch.Upstream(output, entropy, None)
        saved = (output, entropy, log_normalizer)
        launch.backward(problem, saved, upstream, (True, True, True, True, False))
    finally:
        launch.start_kernel, launch.tiles_for = kept
    return launches


def signature_of(argument: Any) -> Any:
    """Describe an argument as Triton's compiler wants it."""
    if isinstance(argument, tuple):
        return tuple(signature_of(part) for part in argument)
    if argument is None or (isinstance(argument, int) and argument == 1):
        return "constexpr"
    if isinstance(argument, torch.Tensor):
        return mangle_type(argument)
    return "i32" if isinstance(argument, int) else "fp32"


def specialise(argument: Any, path: tuple[int, ...], constants: Any, attributes: Any) -> None:
    """Collect what Triton specialises on at a launch: None and 1, multiples of 16."""
    if isinstance(argument, tuple):
        for place, part in enumerate(argument):
            specialise(part, (*path, place), constants, attributes)
    elif signature_of(argument) == "constexpr":
        constants[path] = argument
    elif isinstance(argument, torch.Tensor) or (isinstance(argument, int) and argument % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]


def dump(machine_code: bytes, what: str) -> str:
    """Let NVIDIA's cuobjdump print something about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [str(CUOBJDUMP), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def spills_in_inner_loops(assembly: str) -> int:
    """Count loads and stores of spilled registers between a loop's head and its branch back."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", assembly)
    code = [(int(address, 16), instruction) for address, instruction in found]
    loops = []
    for address, instruction in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    inner = [
        loop
        for loop in loops
        if not any(loop[0] <= o[0] and o[1] <= loop[1] for o in loops if o != loop)
    ]
    spills = (address for address, text in code if re.search(r"\b(LDL|STL)\b", text))
    return sum(any(head <= address <= tail for head, tail in inner) for address in spills)


def compile_kernel(
    kernel: Any, tiles: Tiles, arguments: dict[str, Any], capability: int
) -> dict[str, Any]:
    """Compile one kernel down to machine code and read what it uses."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(kernel.params):
        argument = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", argument
        else:
            signature[parameter.name] = signature_of(argument)
            specialise(argument, (place,), constants, attributes)
    start = time.perf_counter()
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "enable_fp_fusion": True,
        },
    )
    seconds = time.perf_counter() - start
    found = dict(re.findall(r"(REG|STACK):(\d+)", dump(compiled.asm["cubin"], "-res-usage")))
    return {
        "registers": int(found["REG"]),
        "stack_bytes": int(found["STACK"]),
        "spills_in_inner_loops": spills_in_inner_loops(dump(compiled.asm["cubin"], "-sass")),
        "shared_bytes": compiled.metadata.shared,
        "compile_seconds": round(seconds, 1),
    }


def compile_all(
    dtypes: list[str], dims: list[int], options: str, capability: int
) -> list[dict[str, Any]]:
    """Compile every kernel for every dtype and head dimension."""
    rows = []
    for dtype in dtypes:
        for dim in dims:
            problem = build_problem(options, dim, getattr(torch, dtype))
            for kernel, tiles, arguments in record_launches(problem, capability):
                used = compile_kernel(kernel, tiles, arguments, capability)
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
    parser.add_argument("--options", choices=["causal", "everything"], default="causal")
    parser.add_argument("--capability", type=int, choices=SHARED_LIMIT, default=90)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set, which leaves nothing to compile; unset it.")
    with tempfile.TemporaryDirectory() as cache:  # so that nothing was compiled before
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = compile_all(chosen.dtypes, chosen.dims, chosen.options, chosen.capability)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    result = {
        "capability": chosen.capability,
        "options": chosen.options,
        "versions": versions,
        "kernels": rows,
    }
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {chosen.output}")


if __name__ == "__main__":
    main()
