"""What entropy-reg train says about its text."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from entropy_regularization.cli.main import main

NANO = (
    "--model=gpt2-nano", "--width=16", "--vocabulary=300", "--context-length=16", "--batch-size=2",
    "--evaluation-blocks=4", "--steps=2", "--checkpoint-steps=1",
)  # fmt: skip


def train(data: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["train", f"--data={data}", f"--output={output}", *NANO, *more])


def test_files_that_are_left_out(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("to be or not to be, " * 90)
    done = train(tmp_path / "*.txt", tmp_path / "all")
    assert done.exit_code == 0, done.output
    assert "left out" not in done.stdout
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    done = train(tmp_path / "*.txt", tmp_path / "some")
    assert done.exit_code == 0, done.output
    assert "left out 1 of 5 files, which are not UTF-8 text\n" in done.stdout


@pytest.mark.parametrize("name", ["[red]", "[/x]", ":smile:"])
def test_what_was_typed_is_printed_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name.replace('/', '')}").write_text("to be or not to be, " * 300)
    pattern = str(tmp_path / f"*{name}*").replace("[", "[[]") if name == "[red]" else name
    done = train(Path(pattern), tmp_path / "run")
    assert f"reading {pattern}\n" in done.stdout


BEGUN = "to be or not to be, " * 300


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (BEGUN.replace("to", "at", 1), "training text"),
        ("that is the question, " * 300, "training text and the held-out text"),
    ],
    ids=["begin", "all"],
)
def test_text_that_changed_before_the_run_goes_on(changed: str, parts: str, tmp_path: Path) -> None:
    text, output = tmp_path / "text", tmp_path / "run"
    text.write_text(BEGUN)
    assert train(text, output).exit_code == 0
    (output / "result.json").unlink()
    records = (output / "records.jsonl").read_bytes()
    text.write_text(changed)
    done = train(text, output, "--resume")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert f"the {parts} of --data {text}, its tokenizer, or the context length in " in line
    assert (output / "records.jsonl").read_bytes() == records
    text.write_text(BEGUN)
    assert train(text, output, "--resume").exit_code == 0


def test_run_that_kept_no_checksums_goes_on(tmp_path: Path) -> None:
    text, output = tmp_path / "text", tmp_path / "run"
    text.write_text(BEGUN)
    assert train(text, output).exit_code == 0
    (output / "result.json").unlink()
    config = json.loads((output / "config.json").read_text())
    del config["text_crc32"]
    (output / "config.json").write_text(json.dumps(config))
    assert train(text, output, "--resume").exit_code == 0
