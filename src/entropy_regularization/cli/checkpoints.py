"""The checkpoints of a run: which are whole, and the last one to go on from."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from entropy_regularization.cli.errors import RunProblem
from entropy_regularization.cli.files import crc32_of, write_json

COMPLETE = "complete"  # file that is written into a checkpoint last


class Checkpoints:
    """The folder that Trainer writes checkpoints into, one folder each.

    Args:
        path: the folder, there or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark_complete(self, step: int) -> None:
        """Mark a checkpoint as whole, after everything else in it is on the disk."""
        folder = self.path / f"checkpoint-{step}"
        sums = {}
        for path in folder.rglob("*"):
            if path.is_file() and path.name != COMPLETE:
                # Windows synchronizes no file opened to be read; a copied one may be read-only
                with path.open("r+b" if os.access(path, os.W_OK) else "rb") as file:
                    os.fsync(file.fileno())
                sums[path.relative_to(folder).as_posix()] = crc32_of(path)
        write_json(folder / COMPLETE, {"step": step, "crc32": sums})

    def keep_last(self, number: int) -> None:
        """Remove all but so many: Trainer would count, and remove, folders of other names too."""
        ours = [folder for _, folder in sorted(self._all()) if not folder.is_symlink()]
        for folder in ours[:-number]:
            shutil.rmtree(folder, ignore_errors=True)

    def clear_after(self, step: int) -> None:
        """Remove what is torn, which would be kept before whole ones, and what is later."""
        for number, folder in self._all():
            to_go = not (folder / COMPLETE).is_file() or number > step
            if to_go and not folder.is_symlink():
                shutil.rmtree(folder)

    def last(self) -> tuple[int, Path] | None:
        """Return step and folder of the last whole checkpoint; one cut off by a kill is ignored."""
        found = self._complete()
        return found[0] if found else None

    def to_resume(self, say: Callable[[str], None]) -> tuple[int, Path] | None:
        """Return step and folder of the last checkpoint that is as it was written.

        Args:
            say: called with a sentence for each that is not.

        Raises:
            RunProblem: if there are checkpoints, but none to go on from.
        """
        damaged: list[str] = []
        for step, folder in self._complete():
            wrong = _damage_of(folder)
            if wrong is None:
                for sentence in damaged:
                    say(f"{sentence}; the checkpoint of step {step} is used in its place")
                return step, folder
            damaged.append(wrong)
        if damaged:
            raise RunProblem(
                f"{'; '.join(damaged)}, and there is no other checkpoint; put the file back, or "
                "start a new run with another --output."
            )
        return None

    def _complete(self) -> list[tuple[int, Path]]:
        """Return steps and folders of checkpoints that were written to the end, newest first."""
        found = [each for each in self._all() if (each[1] / COMPLETE).is_file()]
        return sorted(found, reverse=True)

    def _all(self) -> list[tuple[int, Path]]:
        """Return steps and folders of checkpoints, whole or not; other names are not ours."""
        found = []
        for folder in self.path.glob("checkpoint-*"):
            number = folder.name.removeprefix("checkpoint-")
            if number.isdecimal() and folder.is_dir():
                found.append((int(number), folder))
        return found


def _damage_of(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint: a file that is not what was written."""
    try:
        sums = json.loads((checkpoint / COMPLETE).read_bytes()).get("crc32", {})
    except (OSError, ValueError, AttributeError):
        return f"{checkpoint / COMPLETE} cannot be read"
    for name, expected in sums.items():
        path = checkpoint / name
        try:
            if crc32_of(path) != expected:
                return f"{path} is damaged"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None
