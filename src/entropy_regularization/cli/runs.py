"""A run's folder: what lies where, whether it may be written, and what it was started with."""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from entropy_regularization.cli.checkpoints import Checkpoints
from entropy_regularization.cli.errors import RunProblem, UsageProblem
from entropy_regularization.cli.files import write_json
from entropy_regularization.cli.options import TrainOptions
from entropy_regularization.cli.surroundings import surroundings

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # file whose lock a process holds while it writes into the folder
PARTS = {"train": "training text", "held_out": "held-out text"}


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
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.model = path / "model"
        self.tokenizer = path / "tokenizer"
        self.heatmaps = path / "heatmaps.png"
        self._lock: IO[str] | None = None
        self._made: list[Path] = []  # folders that were not there before, the innermost first

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
        self._made = [each for each in (self.path, *self.path.parents) if not each.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a")
        except OSError as error:
            raise RunProblem(
                f"{self.path} cannot be written ({error.strerror}); choose another --output."
            ) from None
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UsageProblem(
                f"{self.path} is being written by another process; wait for its end, or choose "
                "another --output."
            ) from None
        except OSError:
            pass  # a file system without locks
        self._lock = lock

    def __enter__(self) -> "RunFolder":
        """Return the folder, which is given free at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the folder free; one that nothing was written into is as it was before."""
        if self._lock is None:
            return
        self._lock.close()
        self._lock = None
        with suppress(OSError):  # somebody else took it away, or put something there
            if [each.name for each in self.path.iterdir()] == [LOCK]:
                (self.path / LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()

    def write_config(
        self,
        command: str,
        options: dict[str, Any],
        in_effect: dict[str, Any],
        text_crc32: dict[str, int],
    ) -> None:
        """Write down the options as given, those that act, and what they ran with and on."""
        write_json(
            self.config,
            {
                "command": command,
                "options": options,
                "in_effect": in_effect,
                "text_crc32": text_crc32,
                **surroundings(),
            },
        )

    def how_to_go_on(self) -> str:
        """Return what to do when the run was stopped."""
        if self.config.is_file():
            return f"go on with: {self.go_on}"
        return "give the same command again"

    def where_it_stopped(self) -> str:
        """Return a sentence about a run that was stopped: what is saved and what to do."""
        found = self.checkpoints.last()
        where = "before the first checkpoint" if found is None else f"at step {found[0]}"
        return f"stopped {where}; {self.how_to_go_on()}"
