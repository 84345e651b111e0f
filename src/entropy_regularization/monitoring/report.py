"""write_report: a run's folder -> one page that needs no network."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_regularization.monitoring.figures import (
    CLASS_COLOURS,
    class_chart,
    layer_charts,
    training_charts,
)
from entropy_regularization.monitoring.page import render
from entropy_regularization.monitoring.plots import largest
from entropy_regularization.monitoring.records import FILE_NAME, Record
from entropy_regularization.monitoring.run import Run, read_run
from entropy_regularization.monitoring.statistics import (
    COLLAPSED_BELOW,
    OVERLOADED_ABOVE,
    HeadClasses,
    flatten,
    mean_of_heads,
)
from entropy_regularization.monitoring.tables import (
    change_maps,
    counted,
    digits,
    duration,
    headlines,
    largest_change,
    looks,
    map_heads,
    percent,
)


def write_report(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    compare: str | os.PathLike[str] | None = None,
) -> Path:
    """Write one self-contained HTML page about a run, finished or not.

    Args:
        run: the folder that entropy-reg train wrote.
        output: the file to write; None is ``report.html`` in the folder.
        compare: the folder of another run to set beside it; None takes ``baseline`` inside the
            folder if there is one.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: if a folder has no records.
        RecordError: if a file of a run is broken, or holds no complete record yet.
        ModuleNotFoundError: if jinja2 or matplotlib is not installed.
    """
    folder = Path(run)
    runs = _read_runs(folder, None if compare is None else Path(compare))
    page = render("report.html.j2", _contents(runs))
    path = folder / "report.html" if output is None else Path(output)
    path.write_text(page, encoding="utf-8")
    return path


def _read_runs(folder: Path, other: Path | None) -> dict[str, Run]:
    """Return one or two runs by what the page calls them."""
    runs = [read_run(folder)]
    names = ["this run"]
    if other is not None:
        runs.append(read_run(other))
        names.append(other.resolve().name if other.resolve().name != names[0] else "other run")
    elif (folder / "baseline" / FILE_NAME).is_file():
        runs.append(read_run(folder / "baseline"))
        names.append("baseline")
    if [run.has_penalty for run in runs] == [True, False]:
        names = ["with penalty", "without penalty"]
    return dict(zip(names, runs, strict=True))


def _contents(runs: dict[str, Run]) -> dict[str, Any]:
    run = next(iter(runs.values()))
    return {
        "name": run.folder.resolve().name,
        "runs": runs,
        "run": run,
        "when": "after" if run.finished else "latest",
        "layers": run.first.statistics.layers,
        "extent": f"{counted(len(flatten(run.first.statistics.entropy)), 'head')} in "
        f"{counted(len(run.first.statistics.layers), 'layer')}, {counted(run.steps, 'step')}",
        "steps": digits(run.steps),
        "tokens": digits(run.latest("tokens")),
        "duration": duration(run.latest("elapsed")),
        "cards": _cards(runs),
        "headlines": headlines(list(runs.values())),
        "training": training_charts(runs),
        "by_layer": layer_charts(runs),
        "maps": _entropy_maps(runs),
        "classes": [class_chart(label, one) for label, one in runs.items()],
        "class_bars": _class_bars(runs),
        "class_colours": CLASS_COLOURS,
        "bounds": (f"{COLLAPSED_BELOW:.0%}", f"{OVERLOADED_ABOVE:.0%}"),
        "thresholds": _threshold_maps(runs),
        "options": _options(runs),
        "environment": _environment(run.config),
    }


def _cards(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """Return the few figures that a reader looks for first."""

    def well_behaved(record: Record) -> str:
        classes = record.statistics.classify()
        return f"{classes.well_behaved} / {sum(classes)}"

    figures: list[tuple[str, Callable[[Run, Record], str]]] = [
        ("held-out perplexity", lambda run, record: digits(record["perplexity"])),
        _band_figure(next(iter(runs.values()))),
        ("well-behaved heads", lambda run, record: well_behaved(record)),
        (
            "mean entropy [nats]",
            lambda run, record: digits(mean_of_heads(record.statistics.entropy)),
        ),
    ]
    missing = digits(math.nan)
    cards = []
    for title, figure in figures:
        values = [
            (label, figure(run, run.first), figure(run, run.last)) for label, run in runs.items()
        ]
        if values[0][2] != missing:
            cards.append({"title": title, "values": values})
    return cards


def _band_figure(run: Run) -> tuple[str, Callable[[Run, Record], str]]:
    """Return the share in the first band, the same in every run, if both looks know it."""
    if any(math.isnan(record["in_starting_band"]) for record in looks(run)):
        return "row entropies in the band", lambda run, record: percent(run.in_band(record))
    key = "in_starting_band"
    return "row entropies in the first band", lambda run, record: percent(record[key])


def _class_bars(runs: dict[str, Run]) -> list[tuple[str, HeadClasses]]:
    bars = []
    for label, run in runs.items():
        for when, record in zip(("before", _when(run)), looks(run), strict=True):
            name = f"{label}, {when}" if len(runs) > 1 else when
            bars.append((name, record.statistics.classify()))
    return bars


def _entropy_maps(runs: dict[str, Run]) -> list[tuple[str, list[Any]]]:
    tables = [record.statistics.entropy for run in runs.values() for record in looks(run)]
    end = largest([layer for table in tables for layer in table])
    # one scale for the changes of all runs: else a small change beside a large one looks as large
    reach = max(
        largest_change(run.first.statistics.entropy, run.last.statistics.entropy)
        for run in runs.values()
    )
    return [
        (
            label,
            change_maps(
                run.first.statistics.layers,
                run.first.statistics.entropy,
                run.last.statistics.entropy,
                end=end,
                reach=reach,
                when=("before", _when(run)),
            ),
        )
        for label, run in runs.items()
    ]


def _threshold_maps(runs: dict[str, Run]) -> list[tuple[str, list[Any], float | None]]:
    """Return per run maps of the thresholds, or their one value if all are equal and fixed."""
    sections: list[tuple[str, list[Any], float | None]] = []
    for label, run in runs.items():
        if run.learned_thresholds is None:
            continue
        first, last = run.learned_thresholds
        if len({*flatten(first), *flatten(last)}) == 1:
            sections.append((label, [], flatten(first)[0]))
            continue
        layers = run.first.statistics.layers
        if first == last:
            maps = [map_heads("thresholds, fixed", layers, last, end=1.0)]
        else:
            maps = change_maps(layers, first, last, end=1.0, when=("before", _when(run)))
        sections.append((label, maps, None))
    return sections


def _options(runs: dict[str, Run]) -> list[tuple[str, list[str], bool]]:
    """Return (name, value in every run, whether they differ) of the options that act."""
    given = [run.config.get("options", run.config) for run in runs.values()]
    acting = [run.config.get("in_effect") for run in runs.values()]
    configs = [_flatten(each or other) for each, other in zip(acting, given, strict=True)]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, [config.get(name, "–") for config in configs]) for name in names]  # noqa: RUF001
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def _environment(config: dict[str, Any]) -> dict[str, str]:
    """Return what a run ran on: versions of libraries, the machine."""
    parts = [config.get("versions"), config.get("machine")]
    return {
        name: text
        for part in parts
        if isinstance(part, dict)
        for name, text in _flatten(part).items()
    }


def _flatten(config: object) -> dict[str, str]:
    """Return options as text, nested ones with a dot; what is left open (null) is left out."""
    options: dict[str, str] = {}
    for name, value in config.items() if isinstance(config, dict) else ():
        if name in ("versions", "machine") or value is None:
            continue
        if isinstance(value, dict):
            options |= {f"{name}.{inner}": text for inner, text in _flatten(value).items()}
        elif isinstance(value, float):
            options[name] = min(json.dumps(value), f"{value:.6g}", key=len)
        else:
            options[name] = value if isinstance(value, str) else json.dumps(value)
    return options


def _when(run: Run) -> str:
    return "after" if run.finished else "latest"
