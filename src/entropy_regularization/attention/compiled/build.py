"""Compile kernel.cpp where it runs, and lend it the products and the threads of torch.

Once per machine, compiler and source, in about a second, into a cache folder. Where that cannot be
done, blockwise/ computes the same.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernel.cpp")
SWITCH = "ENTROPY_REGULARIZATION_COMPILE"  # 0: never compile
COMPILERS = ("g++", "clang++", "c++")  # unless CXX names one
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp-simd",  # its pragmas alone; the threads are torch's
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-shared",
    "-fPIC",
)
SECONDS = 120  # a compiler that takes longer is given up

logger = logging.getLogger("entropy_regularization.attention")


class UnavailableError(Exception):
    """Why there is no compiled kernel here, in words."""


def unavailable_reason() -> str | None:
    """Return why the kernel cannot run here, or None; the first call may compile it."""
    found = _found()
    return str(found) if isinstance(found, UnavailableError) else None


def kernel() -> ctypes.CDLL:
    """Return the compiled kernel.

    Raises:
        UnavailableError: if there is none.
    """
    found = _found()
    if isinstance(found, UnavailableError):
        raise found
    return found


@functools.cache
def _found() -> ctypes.CDLL | UnavailableError:
    try:
        path = _compiled()
        try:
            return _load(path)
        except OSError:  # cut off by a full disk, or a power cut
            path.unlink(missing_ok=True)  # another process may have been faster
            return _load(_compiled())
    except UnavailableError as reason:
        logger.info("attention on the CPU runs blockwise, not compiled: %s", reason)
        return reason
    except OSError as error:  # a cache folder on a disk that is full, or that runs no programs
        logger.info("attention on the CPU runs blockwise, not compiled: %s", error)
        return UnavailableError(f"it cannot be kept or loaded: {error}")


def _load(path: Path) -> ctypes.CDLL:
    content = path.read_bytes()
    if _checksum(content[:-4]) != content[-4:]:  # to load a part of a file may end the process
        raise OSError(f"{path} is not whole")
    found = ctypes.CDLL(str(path))
    if not hasattr(found, "masked_score"):
        raise OSError(f"{path} is something else")
    for name in ("scratch_floats", "call_bytes", "multiple"):
        getattr(found, name).restype = ctypes.c_int64
    found.masked_score.restype = ctypes.c_float
    return found


@functools.cache
def functions_of_torch() -> tuple[int, int, int]:
    """Return the addresses of BLAS's sgemm and of the OpenMP runtime's functions in torch.

    Raises:
        UnavailableError: if this build of torch does not have them.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    names = ("sgemm_", "GOMP_parallel", "omp_get_thread_num")
    try:
        torch_cpu = ctypes.CDLL(str(path))
        addresses = [ctypes.cast(getattr(torch_cpu, n), ctypes.c_void_p).value for n in names]
    except (OSError, AttributeError) as error:
        raise UnavailableError(
            f"this build of torch does not lend its products: {error}"
        ) from error
    sgemm, parallel, thread_number = (address or 0 for address in addresses)
    return sgemm, parallel, thread_number


def _compiled() -> Path:
    """Return the compiled file, after compiling it if it is not there yet."""
    if os.environ.get(SWITCH) == "0":
        raise UnavailableError(f"{SWITCH} is 0")
    if platform.system() != "Linux":
        raise UnavailableError(f"it is built on Linux alone, and this is {platform.system()}")
    functions_of_torch()
    wanted = shlex.split(os.environ.get("CXX", ""))  # it may have arguments
    compiler = next(filter(None, map(shutil.which, wanted[:1] or COMPILERS)), None)
    if compiler is None:
        names = ", ".join(wanted[:1] or COMPILERS)
        raise UnavailableError(f"no C++ compiler ({names}) is installed")
    command = [compiler, *wanted[1:]]
    target = _cache() / f"kernel-{_fingerprint(command)}.so"
    if not target.exists():
        logger.info("compiling the attention kernel for this machine, once: %s", target)
        _compile(command, target)
    return target


def _cache() -> Path:
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise UnavailableError("there is no home directory; set XDG_CACHE_HOME") from error
    folder = Path(base) / "entropy_regularization"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owned = folder.stat()
    if owned.st_uid != os.getuid() or owned.st_mode & 0o022:
        raise UnavailableError(f"others may write to {folder}, from which a program is loaded")
    return folder


def _fingerprint(compiler: list[str]) -> str:
    """Hash all that decides what the compiled file is: source, flags, compiler, processor."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text("utf-8").splitlines() if processor.exists() else []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Feat"))})
    version = _run([*compiler, "--version"])
    parts = (SOURCE.read_text("utf-8"), *FLAGS, *compiler, version, platform.machine(), *features)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], target: Path) -> None:
    """Write the compiled file in one step, so that no other process sees half of it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        _run([*compiler, *FLAGS, str(SOURCE), "-o", str(made)])
        with made.open("ab") as file:  # behind what the loader reads
            file.write(_checksum(made.read_bytes()))
        made.replace(target)


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True, timeout=SECONDS
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        telling = next((line for line in lines if "error" in line), lines[-1])
        raise UnavailableError(f"{command[0]} failed: {telling}") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{command[0]} took more than {SECONDS} seconds") from error
    return done.stdout
