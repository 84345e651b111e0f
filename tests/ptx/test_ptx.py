"""The kernels as compiled for GPUs, run without one: see emulation.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
BENCHMARKS = HERE.parents[1] / "benchmarks"
KERNELS = HERE.parent / "attention" / "kernels" / "test_kernels.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves"),
]


def run(*command: str | Path, capability: int = 90) -> str:
    """Run Python where Triton compiles; return what it printed."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "PTX_CAPABILITY": str(capability),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(BENCHMARKS), *sys.path]),
    }
    ran = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout


# float16 is the first type, and left out
CHOSEN = {
    80: "(own-tiles-causal or own-tiles-everything) and not dtype0",
    90: "(own_tiles or nan_shows) and not dtype0",
}


@pytest.mark.parametrize("capability", CHOSEN)
def test_kernels_are_right(capability: int) -> None:
    """In tiles of a GPU, with tensor cores: every kernel and option."""
    options = ["-p", "emulation", "-p", "no:cacheprovider", "-n", "0", "-q"]
    printed = run(
        "-m", "pytest", *options, KERNELS, "-k", CHOSEN[capability], capability=capability
    )
    launched = dict(re.findall(r"(\w+_kernel)=(\d+)", printed))
    assert launched.keys() == {
        "forward_kernel", "row_constants_kernel", "query_gradient_kernel", "key_gradient_kernel",
        "bias_gradient_kernel",
    }  # fmt: skip
    assert not re.search(r"[1-9]\d* (skipped|failed)", printed), printed


SAID = {
    "as it is": "nothing",
    "no barriers": "no barrier between",
    "no waiting for copies": "what an asynchronous copy may still write",
    "no waiting for products": "what a product may still read",
    "no fences": "no fence between",
    "reads before a tensor": "outside of every tensor",
    "copies from behind a tensor": "outside of every tensor",
    "reads that are not aligned": "not aligned",
}


def test_what_no_program_may_do_is_seen() -> None:
    lines = run(HERE / "broken.py").splitlines()
    assert len(lines) == 3 * len(SAID)  # kernels
    for line in lines:
        found, _, said = line.partition(": ")
        assert said.endswith(SAID[found.partition(", ")[2]]), line
