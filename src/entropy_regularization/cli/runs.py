"""A run's folder: what lies where, whether it may be written, and its last complete checkpoint."""

import json
import os
import platform
import shlex
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from entropy_regularization.cli.errors import RunProblem, UsageProblem

LIBRARIES = ("entropy-regularization", "torch", "transformers", "tokenizers", "accelerate")
COMPLETE = "complete"  # file that is written into a checkpoint last


class RunFolder:
    """The folder of one run; DESIGN.md says what is in it.

    Args:
        path: the folder, there or not.
        go_on: the command that goes on with the run; entropy-reg train --resume unless given.
    """

    def __init__(self, path: Path, go_on: str | None = None) -> None:
        self.path = path
        self.go_on = go_on or f"entropy-reg train --resume --output {shlex.quote(str(path))}"
        self.config = path / "config.json"
        self.result = path / "result.json"
        self.records = path / "records.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.tokenizer = path / "tokenizer"
        self.heatmaps = path / "heatmaps.png"

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return self.result.is_file()

    def begin(self, *, beside: tuple[str, ...] = ()) -> None:
        """Make the folder for a new run.

        Args:
            beside: names that may lie in it already.

        Raises:
            UsageProblem: if something is there already.
            RunProblem: if it cannot be written.
        """
        if self.finished:
            raise UsageProblem(
                f"{self.path} holds a finished run; choose another --output, or look at it with "
                f"'entropy-reg report {self.path}'."
            )
        if self.config.is_file():
            raise UsageProblem(
                f"{self.path} holds a run that is not finished; add --resume to go on with it, or "
                "choose another --output."
            )
        if self.path.exists() and (
            not self.path.is_dir() or any(p.name not in beside for p in self.path.iterdir())
        ):
            raise UsageProblem(
                f"{self.path} is there already and holds no run; choose another --output."
            )
        self._check_writable()

    def reopen(self) -> dict[str, Any]:
        """Return the options of the run that is to go on.

        Raises:
            UsageProblem: if there is no run, or it is finished.
            RunProblem: if it cannot be read or written.
        """
        if self.finished:
            raise UsageProblem(f"{self.path} holds a finished run; there is nothing to resume.")
        if not self.config.is_file():
            raise UsageProblem(
                f"{self.path} holds no run to resume; leave out --resume, or pass the --output of "
                "the run that was stopped."
            )
        self._check_writable()
        return self.options()

    def options(self) -> dict[str, Any]:
        """Return the options that the run was started with.

        Raises:
            RunProblem: if they cannot be read.
        """
        try:
            return dict(json.loads(self.config.read_text())["options"])
        except (ValueError, KeyError, TypeError):
            raise RunProblem(
                f"{self.config} is damaged, so the run cannot be resumed; start a new one."
            ) from None

    def _check_writable(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise RunProblem(
                f"{self.path} cannot be written ({error.strerror}); choose another --output."
            ) from None

    def write_config(self, command: str, options: dict[str, Any]) -> None:
        """Write down the options as given, and what they ran with."""
        versions = {}
        for library in LIBRARIES:
            try:
                versions[library] = metadata.version(library)
            except metadata.PackageNotFoundError:
                continue
        write_json(
            self.config,
            {
                "command": command,
                "options": options,
                "versions": {"python": platform.python_version(), **versions},
                "machine": {"processor": _processor(), "cores": os.cpu_count()},
            },
        )

    def mark_complete(self, step: int) -> None:
        """Mark a checkpoint as whole, after everything else in it is on the disk."""
        folder = self.checkpoints / f"checkpoint-{step}"
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        write_json(folder / COMPLETE, {"step": step})

    def clear_torn_checkpoints(self) -> None:
        """Remove checkpoints that a kill cut off: Trainer would keep them before whole ones."""
        for folder in self.checkpoints.glob("checkpoint-*"):
            if not (folder / COMPLETE).is_file():
                shutil.rmtree(folder)

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """Return step and folder of the last whole checkpoint; one cut off by a kill is ignored."""
        found = []
        for marker in self.checkpoints.glob(f"checkpoint-*/{COMPLETE}"):
            number = marker.parent.name.removeprefix("checkpoint-")
            if number.isdigit():
                found.append((int(number), marker.parent))
        return max(found, default=None)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
