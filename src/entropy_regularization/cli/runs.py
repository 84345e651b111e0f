"""A run's folder: what lies where, whether it may be written, and its last complete checkpoint."""

import json
import math
import os
import platform
import shlex
import shutil
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from entropy_regularization.cli.errors import RunProblem, UsageProblem
from entropy_regularization.cli.options import TrainOptions

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LIBRARIES = ("entropy-regularization", "torch", "transformers", "tokenizers", "accelerate")
LOCK = ".lock"  # file whose lock a process holds while it writes into the folder
PARTS = {"train": "training text", "held_out": "held-out text"}
COMPLETE = "complete"  # file that is written into a checkpoint last


class RunFolder:
    """The folder of one run; DESIGN.md says what is in it.

    Args:
        path: the folder, there or not.

    Attributes:
        go_on: the command that goes on with the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.go_on = f"entropy-reg train --resume --output {shlex.quote(str(path))}"
        self.config = path / "config.json"
        self.result = path / "result.json"
        self.records = path / "records.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.tokenizer = path / "tokenizer"
        self.heatmaps = path / "heatmaps.png"
        self._lock: IO[str] | None = None

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return self.result.is_file()

    def begin(self, *, beside: tuple[str, ...] = ()) -> None:
        """Make the folder for a new run.

        Args:
            beside: names that may lie in it already.

        Raises:
            UsageProblem: if something is there already, or another process holds it.
            RunProblem: if it cannot be written.
        """
        if (self.path / LOCK).is_file():
            self.take()  # a run that is going on is not to be resumed
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
            not self.path.is_dir()
            or any(p.name not in (LOCK, *beside) for p in self.path.iterdir())
        ):
            raise UsageProblem(
                f"{self.path} is there already and holds no run; choose another --output."
            )
        self.take()

    def reopen(self) -> TrainOptions:
        """Return the options of the run that is to go on.

        Raises:
            UsageProblem: if there is no run, or it is finished.
            RunProblem: if it cannot be read.
        """
        if self.finished:
            raise UsageProblem(f"{self.path} holds a finished run; there is nothing to resume.")
        if not self.config.is_file():
            raise UsageProblem(
                f"{self.path} holds no run to resume; leave out --resume, or pass the --output of "
                "the run that was stopped."
            )
        return self.options()

    def options(self) -> TrainOptions:
        """Return the options that the run was started with.

        Raises:
            UsageProblem: if one of them is not what the command line would take.
            RunProblem: if they cannot be read.
        """
        return TrainOptions.of_config(self._saved("options"), self.config)

    def check_text(self, sums: dict[str, int], source: str) -> None:
        """Check that the tokens are those that the run began with.

        Args:
            sums: the checksums of the tokens to train on and of those held out, by name; older
                runs kept none.
            source: of the text, as it was typed.

        Raises:
            UsageProblem: if they are others.
            RunProblem: if the checksums cannot be read.
        """
        begun = self._saved("text_crc32", {})
        changed = [name for name in sums if begun.get(name, sums[name]) != sums[name]]
        if changed:
            parts = " and the ".join(PARTS[name] for name in changed)
            raise UsageProblem(
                f"the {parts} of --data {source}, its tokenizer, or the context length in "
                f"{self.config} changed since the run was started; put back what it was, or start "
                "a new run with another --output."
            )

    def _saved(self, key: str, default: Any = None) -> dict[str, Any]:
        """Return what config.json holds under a key.

        Raises:
            RunProblem: if that is no object, or is missing and there is no default.
        """
        try:
            return dict(json.loads(self.config.read_bytes()).get(key, default))
        except (ValueError, AttributeError, TypeError):
            raise RunProblem(
                f"{self.config} is damaged, so the run cannot be resumed; start a new one."
            ) from None

    def take(self) -> None:
        """Hold the folder until the end of the block, or of the process however it ends.

        Raises:
            UsageProblem: if another process holds it, or its name is not UTF-8.
            RunProblem: if it cannot be written.
        """
        if self._lock is not None:
            return
        try:
            str(self.path).encode()
        except UnicodeEncodeError:  # tokenizers and safetensors write to no such path
            raise UsageProblem(
                f"{self.path} is not UTF-8, or the locale is not; choose another --output."
            ) from None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("a")
        except OSError as error:
            raise RunProblem(
                f"{self.path} cannot be written ({error.strerror}); choose another --output."
            ) from None
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageProblem(
                f"{self.path} is being written by another process; wait for its end, or choose "
                "another --output."
            ) from None
        except OSError:
            pass  # a file system without locks

    def __enter__(self) -> "RunFolder":
        """Return the folder, which is given free at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the folder free."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(
        self,
        command: str,
        options: dict[str, Any],
        in_effect: dict[str, Any],
        text_crc32: dict[str, int],
    ) -> None:
        """Write down the options as given, those that act, and what they ran with and on."""
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
                "in_effect": in_effect,
                "text_crc32": text_crc32,
                "versions": {"python": platform.python_version(), **versions},
                "machine": {"processor": _processor(), "cores": os.cpu_count()},
            },
        )

    def mark_complete(self, step: int) -> None:
        """Mark a checkpoint as whole, after everything else in it is on the disk."""
        folder = self.checkpoints / f"checkpoint-{step}"
        sums = {}
        for path in folder.rglob("*"):
            if path.is_file() and path.name != COMPLETE:
                # Windows synchronizes no file opened to be read; a copied one may be read-only
                with path.open("r+b" if os.access(path, os.W_OK) else "rb") as file:
                    os.fsync(file.fileno())
                sums[path.relative_to(folder).as_posix()] = _sum_of(path)
        write_json(folder / COMPLETE, {"step": step, "crc32": sums})

    def clear_checkpoints_after(self, step: int) -> None:
        """Remove what is torn or damaged: Trainer would keep it before whole checkpoints."""
        for number, folder in self._checkpoints():
            to_go = not (folder / COMPLETE).is_file() or number > step
            if to_go and not folder.is_symlink():
                shutil.rmtree(folder)

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """Return step and folder of the last whole checkpoint; one cut off by a kill is ignored."""
        found = self._complete_checkpoints()
        return found[0] if found else None

    def how_to_go_on(self) -> str:
        """Return what to do when the run was stopped."""
        if self.config.is_file():
            return f"go on with: {self.go_on}"
        return "give the same command again"

    def where_it_stopped(self) -> str:
        """Return a sentence about a run that was stopped: what is saved and what to do."""
        found = self.last_checkpoint()
        where = "before the first checkpoint" if found is None else f"at step {found[0]}"
        return f"stopped {where}; {self.how_to_go_on()}"

    def checkpoint_to_resume(self, say: Callable[[str], None]) -> tuple[int, Path] | None:
        """Return step and folder of the last checkpoint that is as it was written.

        Args:
            say: called with a sentence for each that is not.

        Raises:
            RunProblem: if there are checkpoints, but none to go on from.
        """
        damaged: list[str] = []
        for step, folder in self._complete_checkpoints():
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

    def _complete_checkpoints(self) -> list[tuple[int, Path]]:
        """Return steps and folders of checkpoints that were written to the end, newest first."""
        found = [each for each in self._checkpoints() if (each[1] / COMPLETE).is_file()]
        return sorted(found, reverse=True)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """Return steps and folders of checkpoints, whole or not; other names are not ours."""
        found = []
        for folder in self.checkpoints.glob("checkpoint-*"):
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
            if _sum_of(path) != expected:
                return f"{path} is damaged"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def _sum_of(path: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found = zlib.crc32(part, found)
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all; not finite becomes null."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            json.dump(_finite(content), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
