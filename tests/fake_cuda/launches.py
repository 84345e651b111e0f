"""Launches through Triton's own launcher, up to a driver that is not there (driver.cpp).

What arrives there must be what launch.py gives, pointer by pointer and number by number. Run by
test_fake_cuda.py in a process of its own, with the path of the library.
"""

import ctypes
import json
import struct
import sys
from collections import Counter
from typing import Any

import torch
from cases import CASES, Case
from emulation import flattened
from kernel_resources import PretendedDevice, compile_kernel
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from entropy_regularization.attention.triton import launch, support
from entropy_regularization.attention.triton.tiles import Tiles

CAPABILITY = 90
LAYOUTS = {"i32": "<i", "i64": "<q", "fp32": "<f"}
library = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
launched: Counter[str] = Counter()


class Utils:
    """Triton's own, but no binary is loaded."""

    def __init__(self) -> None:
        self.own = CudaUtils()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def load_binary(self, *binary: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


def start_and_compare(kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any]) -> None:
    """Take the place of launch.start_kernel: call it, and look at what arrives."""
    compiled = compile_kernel(kernel, tiles, arguments, CAPABILITY)
    kinds = compiled.src.signature
    given, types = (
        [each for name in kernel.arg_names for each in flattened(values.get(name), kinds[name])]
        for values in (arguments, kinds)
    )
    ctypes.c_int.in_dll(library, "expected").value = len(given)
    start_kernel(kernel, programs, tiles, arguments)
    arrived = (ctypes.c_uint64 * 256).in_dll(library, "arguments")
    for one, kind, other in zip(given, types, arrived, strict=False):
        if isinstance(one, Tensor):
            assert other == one.data_ptr(), kernel.__name__
        else:
            (number,) = struct.unpack_from(LAYOUTS[kind], struct.pack("<Q", other))
            wanted = struct.unpack("<f", struct.pack("<f", one))[0] if kind == "fp32" else one
            assert number == wanted, f"{kernel.__name__}: {number} for {one}"
    grid = (ctypes.c_uint * 6).in_dll(library, "last")
    assert list(grid) == [programs, 1, 1, 32 * tiles.warps, 1, 1]
    launched[kernel.__name__] += 1
    assert ctypes.c_int.in_dll(library, "launches").value == launched.total()


PretendedDevice.utils, PretendedDevice.launcher_cls = Utils(), CudaLauncher
start_kernel, launch.start_kernel = launch.start_kernel, start_and_compare
launch.tiles_for = lambda *arguments: Tiles(32, 32, 4, 1)
support._unsupported_device = lambda device: None
one = Case("one of everything", (1, 1, 1, 1, 1, 1, 1))  # ones are no arguments of compiled code
for case in (one, CASES[3], CASES[-1]):
    for through in ([0, 1, 2], [0], [1]):
        inputs, options = case.build(torch.bfloat16)
        found = case.run(inputs, {**options, "dropout": 0.3}, "triton")
        torch.autograd.grad([found[i].sum() for i in through], inputs, allow_unused=True)
print(json.dumps(launched))
