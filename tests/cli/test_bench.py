"""entropy-reg bench hands its arguments to the benchmark, which measures or says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from entropy_regularization.cli import bench
from entropy_regularization.cli.main import main

LITTLE = ("--quick", "--lengths", "16", "--turns=1", "--skip-agreement")


def test_measures_and_draws(tmp_path: Path, run_after: Any) -> None:
    output = tmp_path / "new" / "some.json"
    done = run_after("pass", "bench", *LITTLE, f"--output={output}")
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["times"]["16"]["both"]["ours"]["ratio_median"] > 0
    assert set(result["memory"]) == {"sdpa", "ours", "blockwise", "eager"}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_or_left_where_the_tests_fail(tmp_path: Path, run_after: Any) -> None:
    failing = "lambda *_, **options: types.SimpleNamespace(returncode=1)"
    before = f"import subprocess, types; subprocess.run = {failing}"
    done = run_after(before, "bench", f"--output={tmp_path / 'some.json'}")
    assert done.returncode == 1
    assert done.stderr == "the agreement tests did not pass, so nothing is measured; see above.\n"
    assert list(tmp_path.iterdir()) == []


def test_help_is_that_of_the_benchmark(run_after: Any) -> None:
    done = run_after("pass", "bench", "--help")
    assert done.returncode == 0
    assert "--lengths" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "before", "sentence"),
    [
        (["--lengths", "-5"], "pass", "'-5' is not a positive whole number."),
        (["--lengths", "64", "0"], "pass", "'0' is not a positive whole number."),
        (["--turns=many"], "pass", "'many' is not a positive whole number."),
        (["--output={file}/x.json"], "pass", "x.json cannot be written ("),
        (["--output={file}.png"], "pass", "file.png is no name of a JSON file;"),
        ([], "sys.modules['pytest'] = None", "pytest is not installed; run: pip install -e "),
        ([], "sys.modules['matplotlib'] = None", "matplotlib is not installed; run: pip install"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    arguments: list[str], before: str, sentence: str, tmp_path: Path, run_after: Any
) -> None:
    (tmp_path / "file").write_text("")
    filled = [argument.format(file=tmp_path / "file") for argument in arguments]
    done = run_after(before, "bench", *LITTLE, f"--output={tmp_path / 'some.json'}", *filled)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert sentence in done.stderr.splitlines()[-1]


def test_a_package_without_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c" / "bench.py"))
    done = CliRunner().invoke(main, ["bench", "--help"])
    assert done.exit_code == 1
    assert "run entropy-reg bench from a checkout of the source" in done.stderr
