"""What the package asks for is what `make oldest` and `make` install."""

import itertools
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from entropy_regularization.integrations.transformers.support import OLDEST

ROOT = Path(__file__).parents[1]
EXACT = {"import-linter", "mypy", "ruff", "trl"}  # run on the exact versions alone
# What torch for Linux with CUDA requires, from its metadata: the build for CPUs alone, which CI may
# find, requires none, so that only users would meet a conflict.
TRITON_OF = {Version("2.11.0"): Version("3.6.0"), Version("2.13.0"): Version("3.7.1")}


def lower_bounds() -> dict[str, Version]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    asked = [Requirement(line) for line in lines]
    bounds = {}
    for each in asked:
        if each.name != project["name"]:
            (limit,) = each.specifier
            assert limit.operator == ">=", f"{each}: lower bounds only"
            bounds[canonicalize_name(each.name)] = Version(limit.version)
    return bounds


def exact_versions(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_oldest_versions_are_the_lower_bounds() -> None:
    bounds = {name: bound for name, bound in lower_bounds().items() if name not in EXACT}
    assert exact_versions("constraints-oldest.txt") == bounds


def test_exact_versions_are_within_the_bounds() -> None:
    exact = exact_versions("constraints.txt")
    for name, bound in lower_bounds().items():
        assert exact[name] >= bound, name


def test_oldest_transformers_is_told_as_it_is_asked_for() -> None:
    assert Version(OLDEST) == lower_bounds()["transformers"]


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_torch_with_cuda_can_be_installed(file: str) -> None:
    exact = exact_versions(file)
    assert exact["triton"] == TRITON_OF[exact["torch"]]
