"""On CUDA devices that are not there: no tensor meets one of another device or is waited for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
# the library takes its place before torch asks for CUDA
RUN = """
import ctypes, runpy, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def build_device(folder: Path) -> Path:
    library = folder / "device.so"
    command = [COMPILER, "-shared", "-fPIC", "-std=c++20", HERE / "device.cpp", "-o", library]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    for path in cpp_extension.library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    return library


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton")
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch is built with CUDA")
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_steps(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", RUN, build_device(tmp_path), HERE / "steps.py"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout.splitlines()[-1])
    assert {name: found for name, found in results.items() if "error" in found} == {}
    for name, found in results.items():
        here, in_backward = (
            {kernel for kernel, in_device_thread in found["launched"] if in_device_thread is thread}
            for thread in (False, True)
        )
        assert here == {"forward_kernel"}, name
        if name not in ("layers_lie_on_two_devices", "heads_are_watched"):  # no backward
            assert in_backward >= {"query_gradient_kernel", "key_gradient_kernel"}, name
        assert ("forward_kernel" in in_backward) == ("checkpointing" in name), name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_launches(tmp_path: Path) -> None:
    """Every argument of a kernel arrives at the driver, through the launcher that Triton builds."""
    library = tmp_path / "libcuda.so.1"
    build = [COMPILER, "-shared", "-fPIC", "-std=c++20", HERE / "driver.cpp", "-o", library]
    subprocess.run(build, check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    folders = [HERE.parent / "attention", HERE.parent / "ptx", HERE.parents[1] / "benchmarks"]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([*map(str, folders), *sys.path]),
    }
    command = [sys.executable, HERE / "launches.py", library]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    launched = json.loads(ran.stdout.splitlines()[-1])
    of_three_cases = dict.fromkeys(
        ("forward_kernel", "row_constants_kernel", "query_gradient_kernel", "key_gradient_kernel"),
        9,
    )
    assert launched == {**of_three_cases, "bias_gradient_kernel": 3}
