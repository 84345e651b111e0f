"""Tables of the page: headline figures, maps of heads as HTML tables, data behind a chart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from entropy_regularization.monitoring.plots import (
    ANNOTATED_UP_TO,
    DIVERGING,
    SEQUENTIAL,
    colours_of,
    reach_of,
    subtract,
)
from entropy_regularization.monitoring.records import Record
from entropy_regularization.monitoring.run import Run
from entropy_regularization.monitoring.statistics import HeadClasses, PerHead, mean_of_heads

LEVELS = 32  # colours of a map; a class of the style sheet each, so that a cell is a few bytes
SCALES = {"s": SEQUENTIAL, "d": DIVERGING}


@dataclass(frozen=True)
class HeadMap:
    """A layer x head map as a table.

    Attributes:
        caption: what it shows.
        rows: per layer (name, cells), a cell being (colour class, text, or None for no head).
        heads: number of columns.
        numbers: whether the numbers are written into the cells.
        every: how many heads apart column numbers are written.
        scale: "s" (sequential) or "d" (diverging).
        ends: what the two ends of the colours stand for.
    """

    caption: str
    rows: list[tuple[str, list[tuple[str, str] | None]]]
    heads: int
    numbers: bool
    every: int
    scale: Literal["s", "d"]
    ends: tuple[str, str]


def map_heads(
    caption: str, layers: Sequence[str], numbers: PerHead, *, end: float, diverging: bool = False
) -> HeadMap:
    """Return a map of one number per head, coloured from 0 (or -end) to end."""
    heads = max(len(layer) for layer in numbers)
    scale: Literal["s", "d"] = "d" if diverging else "s"
    low = -end if diverging else 0.0
    style = "{:+.2f}" if diverging else "{:.2f}"
    rows = []
    for name, layer in zip(layers, numbers, strict=True):
        cells: list[tuple[str, str] | None] = [None] * heads
        for head, number in enumerate(layer):
            if math.isnan(number):
                cells[head] = ("none", "no row")
            else:
                share = min(max((number - low) / ((end - low) or 1.0), 0.0), 1.0)
                cells[head] = (
                    f"{scale}{round(share * (LEVELS - 1))}",
                    style.format(round(number, 2) + 0.0),
                )  # never -0.00
        rows.append((name, cells))
    small = heads <= ANNOTATED_UP_TO
    every = 1 if small else math.ceil(heads / 8)
    ends = (f"{low:+.3g}", f"{end:+.3g}") if diverging else (f"{low:.3g}", f"{end:.3g}")
    return HeadMap(caption, rows, heads, small, every, scale, ends)


def largest_change(before: PerHead, after: PerHead) -> float:
    """Return where the colours of the changes end; 1 where nothing changed."""
    return reach_of(subtract(after, before))


def change_maps(
    layers: Sequence[str],
    before: PerHead,
    after: PerHead,
    *,
    end: float,
    when: tuple[str, str],
    reach: float | None = None,
) -> list[HeadMap]:
    """Return maps before, after and of the difference.

    Args:
        layers: names.
        before: one number per head.
        after: the same later.
        end: upper end of the colours of the first two.
        reach: ends of the colours of the difference; None takes its largest size.
        when: captions of the first two.
    """
    maps = [
        map_heads(when[0], layers, before, end=end),
        map_heads(when[1], layers, after, end=end),
    ]
    if [len(layer) for layer in before] == [len(layer) for layer in after]:
        reach = largest_change(before, after) if reach is None else reach
        caption = f"change: {when[1]} minus {when[0]}"
        change = subtract(after, before)
        maps.append(map_heads(caption, layers, change, end=reach, diverging=True))
    return maps


def colour_rules() -> list[tuple[str, str, str]]:
    """Return (class, background, text colour) of every colour of the maps."""
    steps = [level / (LEVELS - 1) for level in range(LEVELS)]
    return [
        (f"{letter}{level}", background, ink)
        for letter, scale in SCALES.items()
        for level, (background, ink) in enumerate(colours_of(steps, 0.0, 1.0, scale))
    ]


@dataclass(frozen=True)
class Headline:
    """One line of the headline table.

    Attributes:
        label: the quantity, with its unit.
        cells: per run, before and after (or one cell over both).
    """

    label: str
    cells: list[list[str]]


def headlines(runs: Sequence[Run]) -> list[Headline]:
    """Return the figures of every run, before and after, lines that no run knows left out."""
    lines = []
    for label, format_number, values in _BEFORE_AND_AFTER:
        numbers = [values(run) for run in runs]
        if not all(math.isnan(x) for pair in numbers for x in pair):
            lines.append(Headline(label, [[format_number(x) for x in pair] for pair in numbers]))
    for name in HeadClasses._fields:
        counts = [[getattr(r.statistics.classify(), name) for r in looks(run)] for run in runs]
        label = f"heads {name.replace('_', '-')}"
        lines.append(Headline(label, [[str(count) for count in pair] for pair in counts]))
    for label, format_number, value in _WHOLE_RUN:
        singles = [value(run) for run in runs]
        if not all(math.isnan(x) for x in singles):
            lines.append(Headline(label, [[format_number(x)] for x in singles]))
    return lines


def looks(run: Run) -> tuple[Record, Record]:
    """Return the first and the last look at the heads."""
    return run.first, run.last


def digits(number: float) -> str:
    """Write a number with as many digits as are read; an en dash for NaN."""
    if math.isnan(number):
        return "–"  # noqa: RUF001
    if abs(number) >= 1000:
        return f"{number:,.0f}" if abs(number) < 1e12 else f"{number:.3g}"
    return f"{number:.4g}" if abs(number) >= 0.1 else f"{number:.2g}"


def percent(number: float) -> str:
    """Write a share as a percentage; an en dash for NaN."""
    return digits(number) if math.isnan(number) else f"{100 * number:.1f} %"


def counted(count: int, name: str) -> str:
    """Write how many there are of something: "1 step", "2,000 steps"."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds; an en dash for NaN."""
    if math.isnan(seconds):
        return digits(seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def held_out_loss(record: Record) -> float:
    """Return the loss of an evaluation; NaN for a training line, whose loss is another."""
    return record["loss"] if record.kind == "evaluation" else math.nan


def _penalties(run: Run) -> tuple[float, float]:
    known = [line["penalty"] for line in run.records.train if "penalty" in line.numbers]
    return (known[0], known[-1]) if known and run.has_penalty else (math.nan, math.nan)


def _of_both(value: Callable[[Record], float]) -> Callable[[Run], tuple[float, float]]:
    return lambda run: (value(run.first), value(run.last))


_BEFORE_AND_AFTER: list[
    tuple[str, Callable[[float], str], Callable[[Run], tuple[float, float]]]
] = [
    ("held-out perplexity", digits, _of_both(lambda record: record["perplexity"])),
    ("held-out loss [nats per token]", digits, _of_both(held_out_loss)),
    ("penalty, first and last step", digits, _penalties),
    ("mean entropy [nats]", digits, _of_both(lambda r: mean_of_heads(r.statistics.entropy))),
    (
        "share of the reachable maximum",
        percent,
        _of_both(lambda r: mean_of_heads(r.statistics.utilisation)),
    ),
    (
        "row entropies in the band",
        percent,
        lambda run: (run.in_band(run.first), run.in_band(run.last)),
    ),
    ("row entropies in the first band", percent, _of_both(lambda r: r["in_starting_band"])),
]

_WHOLE_RUN: list[tuple[str, Callable[[float], str], Callable[[Run], float]]] = [
    ("training speed [tokens/s]", digits, Run.speed),
    ("tokens trained on", digits, lambda run: run.latest("tokens")),
    ("duration of training", duration, lambda run: run.latest("elapsed")),
]
