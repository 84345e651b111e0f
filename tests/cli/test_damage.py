"""A run whose files were damaged goes on from what is whole, or says what is not."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from entropy_regularization.cli import runs
from entropy_regularization.cli.main import main

NANO = (
    "--model=gpt2-nano", "--width=16", "--vocabulary=300", "--context-length=32", "--batch-size=2",
    "--evaluation-blocks=4", "--steps=6", "--checkpoint-steps=2", "--logging-steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its last evaluation, with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "words.txt").write_text("".join(f"line {n} of {n * n}\n" for n in range(400)))
    output = folder / "whole"
    done = CliRunner().invoke(
        main, ["train", f"--data={folder}/words.txt", f"--output={output}", *NANO]
    )
    assert done.exit_code == 0, done.output
    (output / "result.json").rename(folder / "result.json")
    return output


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def resume(run: Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["train", "--resume", f"--output={run}"])
    return done.exit_code, done.stdout, done.stderr


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


FILES = (
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json",
    "tokenizer.json", "config.json", "complete",
)  # fmt: skip


@pytest.mark.parametrize("may_write", [True, False])
def test_how_files_of_a_checkpoint_are_opened_to_be_synchronized(
    may_write: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To be written, where they may be: Windows synchronizes no others."""

    def synchronize(number: int) -> None:
        modes.append(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE)

    modes: list[int] = []
    monkeypatch.setattr(os, "fsync", synchronize)
    monkeypatch.setattr(os, "access", lambda *_: may_write)  # root may write everything
    folder = runs.RunFolder(tmp_path)
    checkpoint = folder.checkpoints.path / "checkpoint-3"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "model" / "weights").write_bytes(b"1234")
    folder.checkpoints.mark_complete(3)
    assert modes == [os.O_RDWR if may_write else os.O_RDONLY, os.O_WRONLY]  # the file, the mark
    assert folder.checkpoints.last() == (3, checkpoint)
    assert (checkpoint / "model" / "weights").read_bytes() == b"1234"


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_not_used(name: str, damage: object, run: Path, whole: Path) -> None:
    damage(run / "checkpoints" / "checkpoint-6" / name)  # type: ignore[operator]
    code, said, errors = resume(run)
    assert code == 0, errors
    assert "going on from step 4" in said
    if (name, damage) != ("complete", Path.unlink):  # without the marker, it is one cut off
        sentence = "; the checkpoint of step 4 is used in its place"
        (line,) = [line for line in said.splitlines() if line.endswith(sentence)]
        assert f"checkpoint-6/{name} " in line
    ours, theirs = (
        json.loads(path.read_text())
        for path in (run / "result.json", whole.with_name("result.json"))
    )
    assert ours["after"] == theirs["after"]


def test_no_other_checkpoint(run: Path) -> None:
    for step in (4, 6):
        cut(run / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    code, _, errors = resume(run)
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert "checkpoint-6/optimizer.pt is damaged" in errors
    assert "there is no other checkpoint; put the file back" in errors
    assert (run / "checkpoints" / "checkpoint-6" / "model.safetensors").is_file()


def test_folders_of_other_names_are_not_counted_and_removed(run: Path) -> None:
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-1-backup")
    shutil.rmtree(checkpoints / "checkpoint-6")
    code, _, errors = resume(run)
    assert code == 0, errors
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {"checkpoint-1-backup", "checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "lacks what was recorded"), ("", "lacks what was recorded"), ("?\n", "holds no rec")],
)
def test_damaged_records(content: str | None, sentence: str, run: Path) -> None:
    records = run / "records.jsonl"
    if content is None:
        records.unlink()
    else:
        records.write_text(content)
    code, said, errors = resume(run)
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert sentence in errors
    assert "step 5" not in said


def test_garbage_among_the_records(run: Path) -> None:
    with (run / "records.jsonl").open("a") as file:
        file.write("garbage\n")
    code, _, errors = resume(run)
    assert code == 1
    assert "is not JSON; remove that line" in errors


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer(name: str, run: Path) -> None:
    cut(run / "tokenizer" / name)
    code, _, errors = resume(run)
    assert code == 1
    assert f"{run}/tokenizer/{name} is missing or damaged; copy the one of a checkpoint" in errors


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": null}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_tokenizer_of_another_schema(name: str, content: str, run: Path) -> None:
    (run / "tokenizer" / name).write_text(content)
    code, _, errors = resume(run)
    assert code == 1
    (line,) = errors.splitlines()
    assert f"{run}/tokenizer cannot be loaded (" in line
    assert "; copy the one of a checkpoint in" in line


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"penalty": "l1"}, "penalty: 'l1' is not one of"),
        ({"steps": -5}, "steps: -5 is not in the range"),
        ({"steps": 2.5}, "'2.5' is not a valid integer"),
        ({"steps": [1]}, "[1] is no value of steps"),
        ({"seed": None}, "seed is null; put back what it was"),
        ({"data": None}, "data is null; put back what it was"),
        ({"fixed_thresholds": None}, "fixed_thresholds is null; put back what it was"),
        ({"fixed_thresholds": "yes"}, "'yes' is no value of fixed_thresholds"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"epochs": 2.0}, "choose one"),
        ({"data": ""}, "--data is empty"),
    ],
    ids=str,
)
def test_changed_config(changed: dict[str, object], sentence: str, run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["options"] |= changed
    (run / "config.json").write_text(json.dumps(config))
    code, _, errors = resume(run)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert f"{run}/config.json was changed: " in errors
    assert sentence in errors


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": 1},
        {"layers": 3},
        {"width": 32},
        {"heads": 4},
        {"penalty": "none"},
        {"penalty": "none", "heads": 4},
        {"fixed_thresholds": True},
    ],
    ids=str,
)
def test_changed_config_of_another_model(changed: dict[str, object], run: Path) -> None:
    cut(run / "checkpoints" / "checkpoint-6" / "optimizer.pt")
    before = (run / "config.json").read_text()
    config = json.loads(before)
    config["options"] |= changed
    (run / "config.json").write_text(json.dumps(config))
    code, _, errors = resume(run)
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert f"{run}/config.json or the model that it names was changed: " in line
    assert line.endswith(
        "not that of checkpoint-4; put it back, or start again with another --output."
    )
    (run / "config.json").write_text(before)
    code, _, errors = resume(run)
    assert code == 0, errors


def test_changed_context_length_gives_other_tokens(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"context_length": 32', '"context_length": 16'))
    code, _, errors = resume(run)
    assert code == 2
    assert f"or the context length in {path} changed since the run was started" in errors


def test_folder_that_is_called_like_a_size(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = ["train", f"--data={whole.parent}/words.txt", "--output=gpt2-nano", *NANO]
    assert CliRunner().invoke(main, start).exit_code == 0
    (tmp_path / "gpt2-nano" / "result.json").unlink()
    code, _, errors = resume(Path("gpt2-nano"))
    assert code == 0, errors


@pytest.mark.parametrize("data", ["words.txt", "*.txt", "../*/words.txt"])
def test_relative_data_is_found_from_another_folder(
    data: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a [1] b"  # a path may hold what is a wildcard in a pattern
    place.mkdir()
    shutil.copy(whole.parent / "words.txt", place)
    monkeypatch.chdir(place)
    output = tmp_path / "run"
    start = ["train", f"--data={data}", f"--output={output}", *NANO]
    assert CliRunner().invoke(main, start).exit_code == 0
    (output / "result.json").unlink()
    same = CliRunner().invoke(main, ["train", "--resume", *start[1:3]])
    assert same.exit_code == 0, same.output
    (output / "result.json").unlink()
    monkeypatch.chdir(tmp_path)
    code, _, errors = resume(output)
    assert code == 0, errors
    (output / "result.json").unlink()
    other = CliRunner().invoke(main, ["train", "--resume", *start[1:3]])
    assert f"--data {data} was given, but the run" in other.stderr


@pytest.mark.parametrize("size", [40_000, 60_000], ids=["weights", "optimizer"])
def test_full_disk(size: int, whole: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that is full."""
    output = tmp_path / "run"
    start = [sys.executable, "-m", "entropy_regularization", "train", f"--output={output}"]
    done = subprocess.run(
        [*start, f"--data={whole.parent}/words.txt", *NANO],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "could not be written, its disk is probably full; make room, then go on with: " in line
    code, _, errors = resume(output)
    assert code == 0, errors


@pytest.mark.parametrize(
    ("during", "sentence"),
    [
        ("prepare", "stopped before the first checkpoint; give the same command again"),
        ("evaluate", "stopped before the first checkpoint; go on with: entropy-reg train --resume"),
        ("save_heatmaps", "stopped at step 6; go on with: entropy-reg train --resume"),
    ],
)
def test_stopped_at_once(
    during: str, sentence: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from entropy_regularization.cli import training

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, during, interrupted)
    start = [f"--data={whole.parent}/words.txt", f"--output={tmp_path / 'run'}", *NANO]
    done = CliRunner().invoke(main, ["train", *start])
    assert done.exit_code == 130
    (line,) = done.stderr.splitlines()
    assert sentence in line


def test_two_processes_on_one_folder(whole: Path, run: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from entropy_regularization.cli.runs import *; "
        "folder = RunFolder(Path(sys.argv[1])); folder.take(); print('taken', flush=True); input()"
    )
    new = ["train", f"--data={whole.parent}/words.txt", *NANO]
    for output, again in ((run, ["train", "--resume"]), (tmp_path / "new", new)):
        arguments = [*again, f"--output={output}"]
        with subprocess.Popen(
            [sys.executable, "-c", program, str(output)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"taken\n"
            refused = CliRunner().invoke(main, arguments)
            assert refused.exit_code == 2
            (line,) = refused.stderr.splitlines()
            assert f"{output} is being written by another process; wait for its end" in line
            assert (output / ".lock").is_file()
            other.kill()
        done = CliRunner().invoke(main, arguments)  # what a kill leaves is in nobody's way
        assert done.exit_code == 0, done.output


def test_reader_that_goes_away(whole: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-u", "-m", "entropy_regularization", "train", "--steps=400"]
    with subprocess.Popen(
        [*start, f"--data={whole.parent}/words.txt", f"--output={tmp_path / 'run'}", *NANO[:-3]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 141
