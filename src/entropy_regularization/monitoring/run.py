"""A run's folder, read for people: its configuration, records and result."""

import json
import math
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entropy_regularization.monitoring.records import (
    STATISTICS,
    Record,
    RecordError,
    Records,
    read_records,
)
from entropy_regularization.monitoring.statistics import (
    HeadStatistics,
    PerHead,
    flatten,
    mean_of_heads,
)


@dataclass(frozen=True)
class Run:
    """What a run left behind, finished or not.

    Attributes:
        folder: where it lies.
        config: the options as given; empty if there is no config.json.
        records: at least one line.
        result: the closing numbers; None if the run is not finished.
    """

    folder: Path
    config: dict[str, Any]
    records: Records
    result: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.result is not None

    @property
    def first(self) -> Record:
        """The earliest look at the heads: the evaluation before training, if there is one."""
        return self.records.evaluation("before") or self.records.lines[0]

    @property
    def last(self) -> Record:
        """The latest look at the heads: the evaluation after training, if there is one.

        Its layers are those of the first look, in that order; a layer that it lacks (layer
        dropout) has NaN.
        """
        after, during = map(self.records.evaluation, ("after", "during"))
        last = after or during or self.records.lines[-1]
        return replace(last, statistics=_like(last.statistics, self.first.statistics))

    @property
    def diverged(self) -> bool:
        """Whether the last look has a loss or perplexity that was not finite (null)."""
        numbers = self.last.numbers
        return any(math.isnan(numbers.get(key, 0.0)) for key in ("loss", "perplexity"))

    @property
    def steps_without_loss(self) -> list[int]:
        """The steps of training lines whose loss was not finite (null)."""
        lines = self.records.train
        return [line.step for line in lines if math.isnan(line.numbers.get("loss", 0.0))]

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return max(line.step for line in self.records.lines)

    @property
    def has_penalty(self) -> bool:
        """Whether a penalty was ever added to the loss."""
        return any(line["penalty"] > 0 for line in self.records.train)

    @property
    def learned_thresholds(self) -> tuple[PerHead, PerHead] | None:
        """Thresholds at the first and the last look; None if the run has none."""
        first, last = self.first.statistics.threshold, self.last.statistics.threshold
        return None if first is None or last is None else (first, last)

    def train_numbers(self, key: str) -> list[float]:
        """Return one number per training line; NaN where it is missing."""
        return [line[key] for line in self.records.train]

    def latest(self, key: str) -> float:
        """Return the last known value of a number of the training lines; NaN without one."""
        known = [x for x in self.train_numbers(key) if not math.isnan(x)]
        return known[-1] if known else math.nan

    def speed(self) -> float:
        """Return the median tokens per second of training; NaN if it was not written."""
        known = [x for x in self.train_numbers("tokens_per_second") if not math.isnan(x)]
        return statistics.median(known) if known else math.nan

    def in_band(self, record: Record) -> float:
        """Return the mean over heads of the share of row entropies in the band; NaN without."""
        share = record.statistics.in_band
        return math.nan if share is None else mean_of_heads(share)


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run's folder.

    Args:
        folder: what entropy-reg train wrote, or is still writing.

    Raises:
        FileNotFoundError: if there are no records in it.
        RecordError: if a file is broken, or no record is complete yet.
    """
    folder = Path(folder)
    records = read_records(folder)
    if not any(flatten(line.statistics.entropy) for line in records.lines):
        raise RecordError(
            f"{folder} has no complete record of a head yet; wait for the first logging step."
        )
    config = _read_object(folder / "config.json")
    return Run(folder, config or {}, records, _read_object(folder / "result.json"))


def _like(statistics: HeadStatistics, first: HeadStatistics) -> HeadStatistics:
    if statistics.layers == first.layers:
        return statistics

    def reorder(table: PerHead | None) -> PerHead | None:
        if table is None:
            return None
        by_name = dict(zip(statistics.layers, table, strict=True))
        missing = {
            name: [math.nan] * len(heads)
            for name, heads in zip(first.layers, first.entropy, strict=True)
        }
        return [by_name.get(name, missing[name]) for name in first.layers]

    tables = {key: reorder(getattr(statistics, key)) for key in STATISTICS}
    return HeadStatistics(first.layers, **tables)  # type: ignore[arg-type]


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise RecordError(f"{path} is not JSON; restore it, or remove it.") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} is not a JSON object; restore it, or remove it.")
    return content
