"""Whatever is typed wrong gives one sentence and the right exit code, and loses nothing."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from entropy_regularization.cli.main import main


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(arguments))
    return done.exit_code, done.stderr


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("to be or not to be, that is the question. " * 200)
    return path


NANO = ("--model=gpt2-nano", "--vocabulary=300", "--steps=1")
WRONG = [
    (("--data=nowhere",), 2, "nowhere is no file, folder or glob"),
    (("--data={empty}",), 2, "holds no text"),
    (("--data={binary}",), 2, "is a binary file; pass UTF-8 text"),
    (("--data={latin}",), 2, "is not UTF-8 text"),
    (("--data={short}",), 2, "fewer than one context of 256"),
    (("--data=hf:{binary}/none",), 2, "hf:"),
    (("--data=hf:",), 2, "hf: names no data set; pass hf:NAME"),
    (("--model=gpt2-tinny",), 2, "did you mean gpt2-tiny?"),
    (("--model={folder}",), 2, "a folder without a config.json"),
    (("--heads=3", "--width=64"), 2, "3 heads do not divide a width of 64"),
    (("--vocabulary=10",), 2, "a byte-level vocabulary of 10 cannot hold the 256 bytes"),
    (("--steps=0",), 2, "0 is not in the range"),
    (("--penalty=none", "--loss-coeff=1"), 2, "--loss-coeff has no effect with --penalty none"),
    (("--penalty=none", "--fixed-thresholds"), 2, "--fixed-thresholds has no effect with"),
    (("--text-column=body", "--data={short}"), 2, "--text-column body is for a data set of"),
    (("--steps=-5",), 2, "-5 is not in the range"),
    (("--learning-rate=-1",), 2, "-1.0 is not in the range"),
    (("--learning-rate=1e9",), 2, "is not in the range"),
    (("--learning-rate=nan",), 2, "--learning-rate is nan; pass a finite number"),
    (("--weight-decay=inf",), 2, "--weight-decay is inf"),
    (("--seed=99999999999",), 2, "is not in the range"),
    (("--width=60000", "--layers=900", "--heads=2"), 2, "this machine has"),
    (("--batch-size=100000", "--context-length=16"), 2, "more than the"),
    (("--batch-size=many",), 2, "'many' is not a valid integer"),
    (("--tolerance=2",), 2, "2.0 is not in the range"),
    (("--steps=5", "--epochs=2"), 2, "choose one"),
    (("--precision=float16",), 2, "needs a GPU"),
    (("--penalty=l1",), 2, "'l1' is not one of"),
    (("--resume",), 2, "holds no run to resume"),
    (("--nonsense",), 2, "No such option"),
    (("--model={other}", "--vocabulary=300"), 2, "--vocabulary: for our own sizes alone"),
    (("--model={other}", "--dropout=0", "--heads=2"), 2, "--heads and --vocabulary and --dropout"),
    (("--data=",), 2, "--data is empty; pass a value"),
    (("--text-column= ",), 2, "--text-column is empty"),
    (("--model={run}",), 2, "is the folder of a run; pass its model, "),
    (("one.py", "two.py"), 2, "two.py); quote a pattern of files: --data 'src/*.py'"),
]


@pytest.mark.parametrize(("options", "code", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_sentence(
    options: tuple[str, ...], code: int, sentence: str, words: Path, tmp_path: Path
) -> None:
    places = {
        name: tmp_path / name
        for name in ("empty", "binary", "latin", "short", "folder", "run", "other")
    }
    places["empty"].write_text("")
    places["binary"].write_bytes(b"\x7fELF\0\1\2")
    places["latin"].write_bytes("Grüße".encode("latin-1"))
    places["short"].write_text("too short")
    places["folder"].mkdir()
    (places["run"] / "model").mkdir(parents=True)
    places["other"].mkdir()
    (places["other"] / "config.json").write_text("{}")
    for config in (places["run"] / "config.json", places["run"] / "model" / "config.json"):
        config.write_text("{}")
    output = tmp_path / "output"
    typed = [option.format(**places) for option in options]
    given = {option.split("=")[0] for option in typed}
    defaults = [o for o in (*NANO, f"--data={words}") if o.split("=")[0] not in given]
    found, errors = call("train", f"--output={output}", *defaults, *typed)
    assert found == code, errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("entropy-reg: ")
    assert sentence in lines[0]
    assert not output.exists()


def test_output_that_cannot_be_written(words: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    found, errors = call("train", f"--output={blocked}/run", f"--data={words}", *NANO)
    assert found == 1
    assert "cannot be written" in errors
    found, errors = call("train", f"--output={blocked}", f"--data={words}", *NANO)
    assert found == 2
    assert "holds no run; choose another --output" in errors
    assert blocked.read_text() == "kept"


@pytest.mark.parametrize(
    "command", ["train --output", "train --resume --output", "demo --output", "report"]
)
def test_path_that_cannot_be_looked_at(command: str, words: Path) -> None:
    name = "n" * 300
    found, errors = call(*command.split(), name)
    assert found == 1
    (line,) = errors.splitlines()
    assert line.startswith(f"entropy-reg: {name}")
    assert "File name too long; pass a place that can be read" in line


def test_output_that_holds_something_else(words: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    found, errors = call("train", f"--output={tmp_path}", f"--data={words}", *NANO)
    assert found == 2
    assert "is there already and holds no run" in errors


def test_report_of_something_else(tmp_path: Path) -> None:
    found, errors = call("report", str(tmp_path / "nowhere"))
    assert found == 1
    assert len(errors.strip().splitlines()) == 1


def test_the_name_alone_shows_the_commands() -> None:
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) > 10
    assert "demo" in done.stdout


def test_help_lists_every_option_with_a_text() -> None:
    done = CliRunner().invoke(main, ["train", "--help"])
    assert done.exit_code == 0
    for option in ("--loss-coeff", "--gradient-checkpointing", "--text-column", "--resume"):
        assert option in done.stdout


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys, entropy_regularization.cli.main; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "entropy_regularization", "--version"],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=60,
    )
    assert done.returncode == 0
    assert "version" in done.stdout


def test_diverged_run_ends_with_json_and_a_sentence(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from entropy_regularization.cli import training

    found = training.evaluate
    monkeypatch.setattr(
        training, "evaluate", lambda *args, **kw: replace(found(*args, **kw), loss=math.nan)
    )
    output = tmp_path / "run"
    options = [f"--output={output}", f"--data={words}", *NANO, "--context-length=32"]
    done = CliRunner().invoke(main, ["train", *options])
    assert done.exit_code == 0, done.output
    assert "the run diverged: its held-out loss is nan; start again with a lower" in done.stdout

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    result = json.loads((output / "result.json").read_text(), parse_constant=refuse)
    assert result["after"]["loss"] is None
    assert result["after"]["perplexity"] is None


def the_line_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a command said as it failed."""
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "blocked"),
    [
        ("--help", "click"),
        ("train --output={output}", "rich"),
        ("train --output={output}", "transformers"),
        ("train --output={output}", "accelerate"),
        ("train --output={output}", "matplotlib"),
        ("demo --output={output}", "transformers"),
        ("demo --output={output}", "jinja2"),
    ],
)
def test_package_that_is_not_installed(
    arguments: str, blocked: str, tmp_path: Path, run_after: Any
) -> None:
    output = tmp_path / "run"
    before = f"sys.modules[{blocked!r}] = None"
    line = the_line_of(run_after(before, *arguments.format(output=output).split()))
    assert line.startswith("entropy-reg: ")
    assert f"needs {blocked}" in line or f"needs the package {blocked}" in line
    assert line.endswith("pip install 'entropy-regularization[all]'")
    assert not output.exists()


@pytest.mark.parametrize("command", ["train", "demo"])
def test_transformers_that_is_too_old(command: str, tmp_path: Path, run_after: Any) -> None:
    before = "import transformers; transformers.__version__ = '4.57.6'"
    line = the_line_of(run_after(before, command, f"--output={tmp_path / 'run'}"))
    assert line.startswith("entropy-reg: transformers 4.57.6 is installed")
    assert line.endswith("run: pip install --upgrade 'transformers>=5.17'")
    assert not (tmp_path / "run").exists()


def test_report_of_a_file_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("")
    found, errors = call("report", str(tmp_path / "records.jsonl"))
    assert found == 2
    assert f"records.jsonl is a file; pass the folder of the run, {tmp_path}." in errors


def test_terminal_without_unicode(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "entropy_regularization", "train", "--data=Grüße.txt",
         f"--output={tmp_path / 'run'}"],
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == "reading Gr??e.txt\n"
    assert "is no file, folder or glob" in done.stderr


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--loss-coeff=1e39", "1e+39 is not in the range 0.0<=x<=1e+38."),
        ("--epochs=1e308", "1e+308 is not in the range 0<x<=1000000000.0."),
    ],
)
def test_number_that_is_too_large(option: str, sentence: str, words: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    found, errors = call("train", f"--output={output}", f"--data={words}", NANO[0], option)
    assert found == 2
    (line,) = errors.splitlines()
    assert line == f"entropy-reg: Invalid value for '{option.split('=')[0]}': {sentence}"
    assert not output.exists()
