"""Leave something out of a compiled kernel and print what the machine says to it.

One line a kernel and change: ``forward_kernel, no fences: forward_kernel, program 0: ...``.
"""

import re

import emulation
import torch
from memory import ProgramError
from program import Program, read_program

from entropy_regularization import attention_with_entropy

CHANGES = {
    "as it is": (r"^", ""),
    "no barriers": (r"bar\.sync\s+0;", ""),
    "no waiting for copies": (r"cp\.async\.wait_group[^;]*;", ""),
    "no waiting for products": (r"wgmma\.wait_group[^;]*;", ""),
    "no fences": (r"fence\.proxy[^;]*;", ""),
    "reads before a tensor": (r"(ld\.global[^\[]*\[ *%rd\d+ \+ )0", r"\g<1>-16"),
    "copies from behind a tensor": (r"(cp\.async\.c[ag][^,]*, *\[ *%rd\d+ \+ )0", r"\g<1>16"),
    "reads that are not aligned": (r"(ld\.global[^\[]*\[ *%rd\d+ \+ )0", r"\g<1>2"),
}
KERNELS = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")


def attend() -> None:
    """Run all kernels over several tiles."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, 1, 300, 64, generator=generator, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    got = attention_with_entropy(*inputs, causal=True, implementation="triton")
    torch.autograd.grad(got.output.float().sum() + got.entropy.square().sum(), inputs)


def try_change(kernel: str, pattern: str, replacement: str) -> str:
    """Change one kernel; return what happens."""

    def read_changed(ptx: str) -> Program:
        if f".entry {kernel}(" in ptx:
            ptx, count = re.subn(pattern, replacement, ptx)
            assert count, (kernel, pattern)
        return read_program(ptx)

    emulation.kernel_of.cache_clear()
    emulation.read_program = read_changed
    try:
        attend()
    except ProgramError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    emulation.pytest_configure()
    for kernel in KERNELS:
        for name, (pattern, replacement) in CHANGES.items():
            print(f"{kernel}, {name}: {try_change(kernel, pattern, replacement)}", flush=True)
