"""write_page: analyses of the same text -> one page that needs no network."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from entropy_regularization.monitoring.analysis import Analysis, figures_of, short_names
from entropy_regularization.monitoring.figures import CLASS_COLOURS, length_chart
from entropy_regularization.monitoring.page import render
from entropy_regularization.monitoring.plots import largest, reach_of, subtract
from entropy_regularization.monitoring.statistics import COLLAPSED_BELOW, OVERLOADED_ABOVE, flatten
from entropy_regularization.monitoring.tables import HeadMap, counted, digits, map_heads, percent

# Figures that a reader looks for first.
CARDS = ("perplexity", "mean entropy [nats]", "growth with log n", "heads well-behaved")
MOST_ENDS = 8  # heads in the tables of the lowest and the highest


class HeadLine(NamedTuple):
    """One head in a table of heads."""

    layer: int
    head: int
    name: str
    entropy: str
    utilisation: str
    growth: str


def write_page(
    analyses: Sequence[Analysis],
    path: Path,
    *,
    extent: str,
    options: Mapping[str, str],
    environment: Mapping[str, str],
) -> None:
    """Write one self-contained HTML page about analyses of the same text.

    Args:
        analyses: at least one.
        path: the file to write.
        extent: of the text, in words.
        options: what was asked for.
        environment: what it ran on.

    Raises:
        ModuleNotFoundError: if jinja2 or matplotlib is not installed.
    """
    labels = short_names([found.name for found in analyses])
    by_label = dict(zip(labels, analyses, strict=True))
    figures = figures_of(analyses)
    cards = [line for line in figures if line[0] in CARDS]
    contents = {
        "name": labels[0] if len(labels) == 1 else counted(len(labels), "model"),
        "labels": labels,
        "kinds": [found.kind for found in analyses],
        "extent": extent,
        "figures": figures,
        "cards": cards,
        "maps": _maps(by_label),
        "lengths": [length_chart(label, found.profile) for label, found in by_label.items()],
        "class_bars": [(label, found.statistics.classify()) for label, found in by_label.items()],
        "class_colours": CLASS_COLOURS,
        "bounds": (f"{COLLAPSED_BELOW:.0%}", f"{OVERLOADED_ABOVE:.0%}"),
        "ends": [(label, *_ends(found)) for label, found in by_label.items()],
        "options": options,
        "environment": environment,
        "layers": {label: found.statistics.layers for label, found in by_label.items()},
    }
    path.write_text(render("analysis.html.j2", contents), encoding="utf-8")


def _maps(analyses: Mapping[str, Analysis]) -> list[tuple[str, list[HeadMap]]]:
    """Return per model maps of every head, all models on one scale; of two alike, their change."""
    found = list(analyses.values())
    entropy_end = largest([row for each in found for row in each.statistics.entropy])
    deviation_end = largest([row for each in found for row in each.profile.deviation])
    sections = []
    for label, each in analyses.items():
        layers = each.statistics.layers
        maps = [
            map_heads("mean entropy [nats]", layers, each.statistics.entropy, end=entropy_end),
            map_heads("share of the reachable maximum", layers, each.statistics.utilisation, end=1),
            map_heads(
                "standard deviation over rows [nats]", layers, each.profile.deviation,
                end=deviation_end,
            ),
        ]  # fmt: skip
        if not all(map(math.isnan, flatten(each.profile.growth))):
            maps.append(
                map_heads("growth with log n", layers, each.profile.growth, end=1, diverging=True)
            )
        sections.append((label, maps))
    shapes = [[len(row) for row in each.statistics.entropy] for each in found]
    if len(found) == 2 and shapes[0] == shapes[1]:
        label = "{1} minus {0}".format(*analyses)
        sections.append((label, _changes(*found)))
    return sections


def _changes(first: Analysis, second: Analysis) -> list[HeadMap]:
    layers = first.statistics.layers
    pairs = {
        "mean entropy [nats]": (first.statistics.entropy, second.statistics.entropy),
        "share of the reachable maximum": (
            first.statistics.utilisation,
            second.statistics.utilisation,
        ),
    }
    maps = []
    for caption, (one, other) in pairs.items():
        change = subtract(other, one)
        maps.append(map_heads(caption, layers, change, end=reach_of(change), diverging=True))
    return maps


def _ends(found: Analysis) -> tuple[list[HeadLine], list[HeadLine]]:
    """Return the heads that use the least and the most of what their rows can reach."""
    statistics, profile = found.statistics, found.profile
    places = [
        (layer, head)
        for layer, heads in enumerate(statistics.utilisation)
        for head, share in enumerate(heads)
        if not math.isnan(share)
    ]
    places.sort(key=lambda at: statistics.utilisation[at[0]][at[1]])
    lines = [
        HeadLine(
            layer,
            head,
            statistics.layers[layer],
            digits(statistics.entropy[layer][head]),
            percent(statistics.utilisation[layer][head]),
            digits(profile.growth[layer][head]),
        )
        for layer, head in places
    ]
    return lines[:MOST_ENDS], lines[::-1][:MOST_ENDS]
