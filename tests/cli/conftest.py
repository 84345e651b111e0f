"""What the tests of commands share."""

import subprocess
import sys
from collections.abc import Callable

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_after() -> Run:
    """Return a function that runs a command in a process where something was done before."""

    def run(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = (
            f"import runpy, sys; {before}; sys.argv[1:] = {list(arguments)!r}; "
            "runpy.run_module('entropy_regularization')"
        )
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    return run
