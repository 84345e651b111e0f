"""Charts of one or more runs, with everything that a reader without the picture needs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from entropy_regularization.monitoring.charts import (
    FIRST,
    QUIET,
    SECOND,
    Curve,
    draw_curves,
    draw_shares,
    variable_of,
)
from entropy_regularization.monitoring.lengths import LengthProfile, octave_name
from entropy_regularization.monitoring.plots import blend
from entropy_regularization.monitoring.records import Record
from entropy_regularization.monitoring.run import Run
from entropy_regularization.monitoring.statistics import mean_of_heads
from entropy_regularization.monitoring.tables import digits, percent

# Okabe & Ito (2008): told apart with every common colour blindness, on white and on black
CLASS_COLOURS = {"collapsed": "#d55e00", "well-behaved": "#009e73", "overloaded": "#56b4e9"}
# From the first layer to the last, all of one lightness: at least 3:1 on the light and dark card
_LAYER_COLOURS = ("#3d7be8", "#a95fd0", "#d64a80", "#c87400")
_MOST_POINTS = 400  # of a curve; a longer run is thinned evenly
_MOST_ROWS = 12  # of the table behind a chart


@dataclass(frozen=True)
class Chart:
    """A picture with everything around it that a reader without the picture needs.

    Attributes:
        title: what is drawn, with its unit.
        svg: the picture.
        legend: (CSS colour, label, how it is drawn: "area", "line" or "dashed").
        header: of the table behind it.
        rows: of the table behind it.
        description: one sentence.
    """

    title: str
    svg: str
    legend: list[tuple[str, str, str]]
    header: list[str]
    rows: list[list[str]]
    description: str


def training_charts(runs: dict[str, Run]) -> list[Chart]:
    """Draw loss, penalty and share in the band over the steps, all runs in one chart."""
    penalised = any(run.has_penalty for run in runs.values())
    charts = [
        _compare("loss [nats per token]", runs, lambda run, line: line["loss"]),
        _compare(
            "penalty, as added to the loss",
            runs,
            lambda run, line: line["penalty"] if penalised else math.nan,
        ),
        _compare(
            "row entropies in the band", runs, lambda run, line: run.in_band(line), shares=True
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _compare(
    title: str,
    runs: dict[str, Run],
    value: Callable[[Run, Record], float],
    *,
    shares: bool = False,
    y_range: tuple[float, float] | None = None,
) -> Chart | None:
    """Draw one number of the training lines of every run; None if no run knows it."""
    lines = {label: _thin(run.records.train, _MOST_POINTS) for label, run in runs.items()}
    series = {label: [value(runs[label], line) for line in lines[label]] for label in runs}
    known = {label: y for label, y in series.items() if not all(map(math.isnan, y))}
    if not known:
        return None
    colours = dict(zip(runs, (FIRST, SECOND), strict=False))
    dashed = dict(zip(runs, (False, True), strict=False))
    # the other run first, so that this run lies on top
    curves = [
        Curve([line.step for line in lines[label]], known[label], colours[label], dashed[label])
        for label in reversed(known)
    ]
    write = percent if shares else digits
    table: dict[int, list[str]] = {}
    for place, (label, values) in enumerate(known.items()):
        for line, y in _thin(list(zip(lines[label], values, strict=True)), _MOST_ROWS):
            row = table.setdefault(line.step, [f"{line.step:,}"] + ["–"] * len(known))  # noqa: RUF001
            row[place + 1] = write(y)
    return Chart(
        title,
        draw_curves(title, curves, y_range=(0, 1) if shares else y_range, percent=shares),
        [
            (variable_of(colours[label]), label, "dashed" if dashed[label] else "line")
            for label in known
        ],
        ["step", *known],
        [table[step] for step in sorted(table)],
        f"{title} over training steps: "
        + "; ".join(f"{k} from {write(y[0])} to {write(y[-1])}" for k, y in known.items()),
    )


def layer_charts(runs: dict[str, Run]) -> list[Chart]:
    """Draw the mean entropy of every layer over the steps, one chart a run, the same axis."""
    ends = [
        mean_of_heads([layer])
        for run in runs.values()
        for line in run.records.train
        for layer in line.statistics.entropy
    ]
    top = 1.05 * max((x for x in ends if not math.isnan(x)), default=1.0) or 1.0
    charts = []
    for label, run in runs.items():
        lines = _thin(run.records.train, _MOST_POINTS)
        if not lines:
            continue
        names = run.first.statistics.layers
        by_name = [dict(zip(x.statistics.layers, x.statistics.entropy, strict=True)) for x in lines]
        series = [[mean_of_heads([line.get(name, [])]) for line in by_name] for name in names]
        colours = blend(_LAYER_COLOURS, len(names))
        steps = [line.step for line in lines]
        rows = _thin(list(zip(steps, *series, strict=True)), _MOST_ROWS)
        charts.append(
            Chart(
                title := f"{label}, layers [nats]",
                draw_curves(
                    title,
                    [Curve(steps, y, c, width=1.5) for y, c in zip(series, colours, strict=True)],
                    y_range=(0, top),
                ),
                [(c, str(k), "line") for k, c in _thin(list(enumerate(colours)), _MOST_ROWS)],
                ["step", *(f"layer {k}" for k in range(len(names)))],
                [[f"{row[0]:,}", *map(digits, row[1:])] for row in rows],
                f"Mean entropy of each of {len(names)} layers over training steps, {label}.",
            )
        )
    mean = _compare(
        "all heads [nats]",
        runs,
        lambda run, line: mean_of_heads(line.statistics.entropy),
        y_range=(0, top),
    )
    return charts if mean is None else [*charts, mean]


def class_chart(label: str, run: Run) -> Chart | None:
    """Draw the share of heads of each class over the steps; None below two training lines."""
    lines = _thin(run.records.train, _MOST_POINTS)
    shares = [line.statistics.classify().shares() for line in lines]
    lines = [line for line, share in zip(lines, shares, strict=True) if not math.isnan(share[0])]
    shares = [share for share in shares if not math.isnan(share[0])]
    if len(lines) < 2:
        return None
    columns = [list(column) for column in zip(*shares, strict=True)]
    steps = [line.step for line in lines]
    rows = _thin(list(zip(steps, *columns, strict=True)), _MOST_ROWS)
    return Chart(
        title := f"{label}: share of heads",
        draw_shares(title, steps, dict(zip(CLASS_COLOURS.values(), columns, strict=True))),
        [(colour, name, "area") for name, colour in CLASS_COLOURS.items()],
        ["step", *CLASS_COLOURS],
        [[f"{row[0]:,}", *map(percent, row[1:])] for row in rows],
        f"Share of heads of each class over training steps, {label}.",
    )


def length_chart(label: str, profile: LengthProfile) -> Chart | None:
    """Draw the mean entropy of every layer over the keys that a row sees; None of one length."""
    means = [
        [mean_of_heads([[head[k] for head in layer]]) for k in range(len(profile.keys))]
        for layer in profile.entropy
    ]
    known = [
        k for k, octave in enumerate(zip(*means, strict=True)) if not all(map(math.isnan, octave))
    ]
    if len(known) < 2:
        return None
    most = max(n for keys in profile.typical_keys for n in keys if not math.isnan(n))
    colours = blend(_LAYER_COLOURS, len(means))
    title = f"{label} [nats]"
    line = [1.0, math.sqrt(most), most]
    curves = [
        Curve(line, list(map(math.log, line)), QUIET, dashed=True, width=1),
        *(
            Curve(keys, layer, colour, width=1.5)
            for keys, layer, colour in zip(profile.typical_keys, means, colours, strict=True)
        ),
    ]
    return Chart(
        title,
        draw_curves(
            title,
            curves,
            y_range=(0, 1.05 * math.log(most)),
            x_label="keys that a row sees",
            doubling=True,
        ),
        [(c, str(k), "line") for k, c in _thin(list(enumerate(colours)), _MOST_ROWS)]
        + [(variable_of(QUIET), "log n", "dashed")],
        ["keys", *(f"layer {k}" for k in range(len(means)))],
        [[octave_name(k), *(digits(layer[k]) for layer in means)] for k in known],
        f"Mean entropy of each of {len(means)} layers over the keys that a row sees, {label}.",
    )


def _thin(items: Sequence[Any], most: int) -> list[Any]:
    """Keep at most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]
