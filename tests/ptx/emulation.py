"""A plugin of pytest that runs the kernels as what Triton compiles them to, without a GPU.

    TRITON_INTERPRET=0 PYTHONPATH=tests/ptx:benchmarks python -m pytest -p emulation \
        tests/attention/kernels/test_kernels.py

Triton compiles every launch for a device of ``PTX_CAPABILITY`` (90) through its own launcher; the
PTX that it hands to NVIDIA's assembler is then run by :mod:`machine`, on the tensors of the CPU,
twice: asynchronous work done as early and as late as may be. Both must give the same bits.
"""

import functools
import os
from collections import Counter
from typing import Any

import numpy as np
import torch
import triton
from kernel_resources import SHARED_LIMIT, compile_kernel
from machine import Kernel, Machine
from memory import GlobalMemory, ProgramError
from program import read_program
from torch import Tensor

from entropy_regularization.attention.triton import launch, support
from entropy_regularization.attention.triton.tiles import Tiles

CAPABILITY = int(os.environ.get("PTX_CAPABILITY", "90"))
COPIES_ARE_FENCED = support.triton_version() >= support.FENCED_TRITON
launched: Counter[str] = Counter()


@functools.cache
def kernel_of(ptx: str) -> Kernel:
    return Kernel(read_program(ptx))


def flattened(value: Any, kind: Any) -> list[Any]:
    """List the arguments that are left at run time, by the signature that Triton compiled."""
    if kind == "constexpr":
        return []
    if isinstance(kind, tuple):
        pairs = zip(value, kind, strict=True)
        return [each for one, its_kind in pairs for each in flattened(one, its_kind)]
    return [value]


def start_kernel(kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any]) -> None:
    """Take the place of :func:`launch.start_kernel`."""
    if programs == 0:
        return
    compiled = compile_kernel(kernel, tiles, arguments, CAPABILITY)
    shared_bytes = compiled.metadata.shared
    if shared_bytes > SHARED_LIMIT[CAPABILITY]:
        raise ProgramError(f"{kernel.__name__} needs {shared_bytes} bytes of shared memory")
    signature = compiled.src.signature
    given = [
        each
        for name in kernel.arg_names
        for each in flattened(arguments.get(name), signature[name])
    ]
    late, early = (
        run(kernel_of(compiled.asm["ptx"]), programs, shared_bytes, given, eager)
        for eager in (False, True)
    )
    if not np.array_equal(late.bytes, early.bytes):
        raise ProgramError(f"{kernel.__name__} does not wait for its asynchronous work")
    late.copy_back()
    launched[kernel.__name__] += 1


def run(
    kernel: Kernel, programs: int, shared_bytes: int, given: list[Any], eager: bool
) -> GlobalMemory:
    """Run a grid and return the memory that it leaves."""
    memory = GlobalMemory(each for each in given if isinstance(each, Tensor))
    numbers = [memory.address_of(each) if isinstance(each, Tensor) else each for each in given]
    # after the kernel's own there are pointers to scratch memory, which it must not need
    numbers += [0] * (len(kernel.program.parameters) - len(numbers))
    machine = Machine(kernel, memory, numbers, eager, COPIES_ARE_FENCED)
    with np.errstate(all="ignore"):
        for program_id in range(programs):
            try:
                machine.run(program_id, shared_bytes)
            except ProgramError as fault:
                raise ProgramError(
                    f"{kernel.program.name}, program {program_id}: {fault}"
                ) from None
    return memory


def pytest_configure() -> None:
    assert not triton.knobs.runtime.interpret, "set TRITON_INTERPRET=0"
    assert not torch.cuda.is_available(), "there is a GPU; run the tests on it"
    launch.start_kernel = start_kernel
    support._unsupported_device = lambda device: None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = " ".join(f"{name}={count}" for name, count in sorted(launched.items()))
    terminalreporter.write_line(f"launched: {found}")
