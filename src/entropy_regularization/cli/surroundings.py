"""What a command ran with and on."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("entropy-regularization", "torch", "transformers", "tokenizers", "accelerate")


def surroundings() -> dict[str, Any]:
    """Return the versions of Python and the libraries, and the machine."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    machine = {"processor": _processor(), "cores": os.cpu_count()}
    return {"versions": versions, "machine": machine}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
