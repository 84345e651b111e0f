"""A run's folder: what is ours in it, and what is left alone."""

import os
from pathlib import Path

import pytest

from entropy_regularization.cli.checkpoints import Checkpoints
from entropy_regularization.cli.errors import UsageProblem
from entropy_regularization.cli.runs import RunFolder


def test_only_our_checkpoints_are_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    theirs = ("checkpoint-best", "checkpoint-8-kept", "checkpoint-²")
    for name in (*theirs, "checkpoint-4", "checkpoint-5", "checkpoint-7"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text("1234")
    (tmp_path / "checkpoint-9").write_text("a plain file")
    (tmp_path / "checkpoint-10").symlink_to(tmp_path / "checkpoint-best")
    for step in (4, 7):
        checkpoints.mark_complete(step)
    checkpoints.clear_after(4)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*theirs, "checkpoint-4", "checkpoint-9", "checkpoint-10"}
    assert checkpoints.last() == (4, tmp_path / "checkpoint-4")


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / os.fsdecode(b"\xe4"))
    for take in (folder.begin, folder.take):
        with pytest.raises(UsageProblem, match="is not UTF-8, or the locale is not; choose anoth"):
            take()
    assert not list(tmp_path.iterdir())


def test_folder_that_nothing_was_written_into_is_as_it_was_before(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new", "mine/outer/inner"):
        with RunFolder(tmp_path / name) as folder:
            folder.begin()
            assert (tmp_path / name / ".lock").is_file()
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with RunFolder(tmp_path / "kept" / "run") as folder:
        folder.begin()
        (tmp_path / "kept" / "notes.txt").touch()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes.txt"]
    with RunFolder(tmp_path / "gone") as folder:
        folder.begin()
        (tmp_path / "gone" / ".lock").unlink()
        (tmp_path / "gone").rmdir()
