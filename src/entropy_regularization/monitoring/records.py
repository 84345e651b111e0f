"""records.jsonl: one JSON object a line and logging step; docs/records.md describes version 1."""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeGuard

from torch import Tensor

from entropy_regularization.checks import as_integer
from entropy_regularization.monitoring.statistics import HeadStatistics, PerHead

VERSION = 1
FILE_NAME = "records.jsonl"
STATISTICS = ("entropy", "reachable_maximum", "utilisation", "in_band", "threshold")
_KINDS = ("train", "evaluation")
_WHENS = ("before", "during", "after")
_NAMED = {"version", "kind", "step", "layers", "when", *STATISTICS}


class RecordError(ValueError):
    """A records file that cannot be read."""


@dataclass(frozen=True)
class Record:
    """One line.

    Attributes:
        kind: "train" or "evaluation".
        step: optimizer steps done.
        statistics: of every head, over the rows of this step.
        numbers: all the rest, by the key of the file; NaN where the file has null.
        when: "before", "during" or "after" training; None on train lines.
    """

    kind: Literal["train", "evaluation"]
    step: int
    statistics: HeadStatistics
    numbers: dict[str, float]
    when: str | None = None

    def __getitem__(self, key: str) -> float:
        """Return a number; NaN where it is missing."""
        return self.numbers.get(key, math.nan)


@dataclass(frozen=True)
class Records:
    """The lines of a file.

    Attributes:
        lines: in the order written.
        torn: True if the last line was cut off in the middle and left out: the process that wrote
            it was killed.
    """

    lines: list[Record]
    torn: bool = False

    @property
    def train(self) -> list[Record]:
        """The lines of training steps."""
        return [line for line in self.lines if line.kind == "train"]

    def evaluation(self, when: str) -> Record | None:
        """Return the last evaluation "before", "during" or "after" training, if there is one."""
        found = [line for line in self.lines if line.when == when]
        return found[-1] if found else None


class RecordWriter:
    """Append lines to a records file; every line is on its way to the disk when write returns.

    Args:
        path: the file; made if it is not there, with a line cut off by a kill removed.
        keep_until: continue from a checkpoint of this step: later lines are removed first, and so
            is an evaluation "after". None keeps every complete line.

    Raises:
        TypeError: if keep_until is no integer.
        FileNotFoundError: if there is no folder to write it into.
        RecordError: if the file holds something else than records.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_until: int | None = None) -> None:
        self.path = Path(path)
        if keep_until is not None and as_integer(keep_until) is None:
            raise TypeError(f"keep_until is {keep_until!r}; pass a step, or None.")
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"{self.path} cannot be written; pass a file such as {FILE_NAME} in a folder that "
                "is there."
            )
        self._last = truncate_records(self.path, keep_until) if self.path.exists() else 0
        self._file = self.path.open("ab", buffering=0)  # a line is one write, whole or torn

    def write(
        self,
        kind: Literal["train", "evaluation"],
        step: int,
        statistics: HeadStatistics,
        *,
        when: Literal["before", "during", "after"] | None = None,
        **numbers: float | Tensor,
    ) -> None:
        """Append one line.

        Args:
            kind: "train" or "evaluation".
            step: optimizer steps done.
            statistics: of every head, over the rows of this step.
            when: of an evaluation.
            **numbers: what else is known of the step, by the key of the file: ``loss``,
                ``penalty`` and so on, of Python, numpy or torch; not finite is written as null.

        Raises:
            TypeError: if statistics or a number is something else.
            ValueError: if kind and when do not go together, the step is negative or before one
                that the file held when it was opened, or a number has the key of something else.
        """
        if (kind, when) != ("train", None) and not (kind == "evaluation" and when in _WHENS):
            raise ValueError(
                f"kind is {kind!r} and when is {when!r}; pass 'train' without when, or "
                "'evaluation' with 'before', 'during' or 'after'."
            )
        line: dict[str, Any] = {"version": VERSION, "kind": kind, "step": self._checked(step)}
        if when is not None:
            line["when"] = when
        if taken := _NAMED & numbers.keys():
            raise ValueError(f"{min(taken)} is a key of every record; give the number another.")
        line |= {key: _plain(key, number) for key, number in numbers.items()}
        _check_statistics(statistics)
        line["layers"] = statistics.layers
        line |= {key: _shorten(getattr(statistics, key)) for key in STATISTICS}
        text = json.dumps(line, separators=(",", ":"), allow_nan=False)
        self._file.write(text.encode() + b"\n")

    def _checked(self, step: object) -> int:
        done = as_integer(step)
        if not _is_index(done):
            raise ValueError(f"step is {step!r}; pass the number of optimizer steps done.")
        if done < self._last:
            raise ValueError(
                f"step is {done} but {self.path} held step {self._last} when it was opened; write "
                f"to another file, or remove the later lines by RecordWriter(path, keep_until=...)."
            )
        return done

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "RecordWriter":
        """Return the writer, to be closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()


def read_records(path: str | os.PathLike[str]) -> Records:
    """Read a records file.

    Args:
        path: the file, or the folder of the run that holds it.

    Returns:
        Its lines. A last line cut off by a kill is left out and said in ``torn``.

    Raises:
        FileNotFoundError: if there is no such file.
        RecordError: if a line is broken or of an unknown version, or a layer changes its heads.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no records at {path}; pass the folder that entropy-reg train wrote."
        )
    lines = [record for _, record in _complete_lines(path)]
    _check_heads(lines, path)
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(max(size - 1, 0))
        torn = size > 0 and file.read() != b"\n"
    return Records(lines, torn)


def truncate_records(path: str | os.PathLike[str], keep_until: int | None = None) -> int:
    """Remove what a run that continues will write again, and a line cut off by a kill.

    Args:
        path: the file; replaced in one step, so that a kill leaves the old or the new one.
        keep_until: keep lines up to this step, without an evaluation "after" training; None keeps
            every complete line.

    Returns:
        The latest step that is left, 0 without one.

    Raises:
        FileNotFoundError: if there is no such file.
        RecordError: if a line is broken or of an unknown version.
    """
    path = Path(path)
    kept = [
        (raw, record.step)
        for raw, record in _complete_lines(path)
        if keep_until is None or (record.step <= keep_until and record.when != "after")
    ]
    text = b"".join(raw for raw, _ in kept)
    if len(text) != path.stat().st_size:
        beside = path.with_name(path.name + ".new")
        beside.write_bytes(text)
        beside.replace(path)
    return max((step for _, step in kept), default=0)


def _complete_lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.endswith(b"\n"):
                versionless = number == 1 and b'"version"' not in raw
                if versionless and not any(b'"version"' in line for line in file):
                    raise RecordError(f"{path} holds no records; pass a run's folder.")
                yield raw, _parse(raw, f"line {number} of {path}")
            elif not _is_torn_record(raw):
                raise RecordError(
                    f"line {number} of {path} is no record that was cut off; pass a run's folder."
                )


def _is_torn_record(raw: bytes) -> bool:
    """Tell the beginning of a record, which a power cut may have filled with zeros."""
    begins, start = raw.replace(b" ", b"").rstrip(b"\0"), b'{"version":'
    return begins.startswith(start) or start.startswith(begins)


def _check_heads(lines: list[Record], path: Path) -> None:
    heads: dict[str, int] = {}
    for line in lines:
        for name, row in zip(line.statistics.layers, line.statistics.entropy, strict=True):
            if heads.setdefault(name, len(row)) != len(row):
                raise RecordError(
                    f"{path} has {heads[name]} and {len(row)} heads of {name}; give each model a "
                    "file of its own."
                )


def _parse(raw: bytes, where: str) -> Record:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise RecordError(
            f"{where} is not JSON; remove that line, or write the records again."
        ) from error
    if not isinstance(line, dict) or "version" not in line:
        raise RecordError(f"{where} is no record; pass a file that entropy-reg train wrote.")
    if line["version"] != VERSION:
        raise RecordError(
            f"{where} has version {line['version']!r} but this package reads version {VERSION}; "
            "read it with the package that wrote it."
        )
    kind, step, layers, when = (line.get(key) for key in ("kind", "step", "layers", "when"))
    if kind not in _KINDS or not _is_index(step) or not _are_names(layers):
        raise RecordError(
            f"{where} lacks kind, step or layers; remove that line, or write the records again."
        )
    numbers = {key: _number(v) for key, v in line.items() if key not in _NAMED and _is_number(v)}
    statistics = {
        key: _per_head(line.get(key), len(layers), f"{key} in {where}") for key in STATISTICS
    }
    for key in STATISTICS[:3]:
        if statistics[key] is None:
            raise RecordError(f"{where} lacks {key}; remove it, or write the records again.")
    if not _have_same_heads(statistics.values()):
        raise RecordError(f"{where} has tables of different heads; write the records again.")
    return Record(kind, step, HeadStatistics(layers, **statistics), numbers, when)  # type: ignore[arg-type]


def _per_head(table: object, layers: int, where: str) -> PerHead | None:
    if table is None:
        return None
    if not _is_table(table, layers):
        raise RecordError(f"{where} is not one list of numbers per layer; write the records again.")
    return [[_number(value) for value in row] for row in table]


def _is_table(table: object, layers: int) -> TypeGuard[list[list[Any]]]:
    return (
        isinstance(table, list)
        and len(table) == layers
        and all(isinstance(row, list) and all(map(_is_number, row)) for row in table)
    )


def _check_statistics(given: object) -> None:
    """Refuse statistics that no reader would take."""
    if not isinstance(given, HeadStatistics):
        raise TypeError(
            f"statistics is a {type(given).__name__}; pass the HeadStatistics of a monitor."
        )
    if not _are_names(given.layers):
        raise TypeError(
            "layers of the statistics is no list of names, each once; pass the names of modules."
        )
    for key in STATISTICS:
        table = getattr(given, key)
        optional = key not in STATISTICS[:3]
        if not (_is_table(table, len(given.layers)) or (optional and table is None)):
            raise TypeError(
                f"{key} of the statistics is not one list of numbers per layer; pass lists."
            )
    if not _have_same_heads(getattr(given, key) for key in STATISTICS):
        raise ValueError("the statistics have tables of different heads; pass those of a monitor.")


def _have_same_heads(tables: Iterable[PerHead | None]) -> bool:
    return len({tuple(map(len, table)) for table in tables if table is not None}) == 1


def _is_index(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _are_names(value: object) -> TypeGuard[list[str]]:
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return False
    return len(set(value)) == len(value)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: float | None) -> float:
    if value is None or not -sys.float_info.max <= value <= sys.float_info.max:
        return math.nan  # as not finite is written
    return float(value)


def _plain(key: str, given: object) -> float | None:
    """Return a number, also of numpy or a tensor with one, as JSON has it: not finite is None."""
    number = given.item() if getattr(given, "ndim", None) == 0 else given  # type: ignore[attr-defined]
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{key} is a {type(given).__name__}; pass a number.")
    finite = abs(number) <= sys.float_info.max  # type: ignore[operator]
    return None if not finite else number if isinstance(number, int) else float(number)


def _shorten(table: PerHead | None) -> list[list[float | None]] | None:
    """Keep the seven digits that a float32 has; not finite becomes null."""
    if table is None:
        return None
    rows = ([_number(x) for x in row] for row in table)
    return [[float(f"{x:.7g}") if math.isfinite(x) else None for x in row] for row in rows]
