"""Layer x head maps as PNG.

Figures are made through matplotlib's object interface: no window, no global state. The colours can
be told apart with every common colour blindness.
"""

import math
import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_regularization.checks import is_number
from entropy_regularization.monitoring.statistics import PerHead, flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEQUENTIAL = "viridis"
DIVERGING = "PuOr"
ANNOTATED_UP_TO = 12  # numbers are written into the cells of maps of at most so many heads
LEAST_REACH = 0.1  # of the colours of a change
_NOTHING = "#d9d9d9"  # a head that is not there, or has no number


def save_heatmaps(
    path: str | os.PathLike[str],
    before: PerHead,
    after: PerHead | None = None,
    *,
    quantity: str = "mean row entropy [nats]",
    maximum: float | None = None,
    title: str = "Entropy of every attention head",
    names: Sequence[str] = ("before", "after"),
) -> Path:
    """Draw layer x head maps (before, after, difference) into a PNG file.

    Args:
        path: the file to write.
        before: one number per head; layers may differ in their number of heads.
        after: the same heads later; None draws one map.
        quantity: written at the colour bars.
        maximum: upper end of the colours, above 0; None takes the largest number.
        title: above the maps.
        names: of two maps.

    Returns:
        The path.

    Raises:
        TypeError: if before or after is not one list of numbers per layer.
        ValueError: if there is no head, before and after are not of the same heads, or the maximum
            is not above 0.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    figure = draw_heatmaps(
        before, after, quantity=quantity, maximum=maximum, title=title, names=names
    )
    path = Path(path)
    figure.savefig(path, format="png", dpi=150)
    return path


def draw_heatmaps(
    before: PerHead,
    after: PerHead | None,
    *,
    quantity: str,
    maximum: float | None,
    title: str,
    names: Sequence[str] = ("before", "after"),
) -> "Figure":
    """Return the figure that save_heatmaps writes; see there."""
    _check_heads(before, after)
    if maximum is None:
        maximum = largest([*before, *(after or [])])
    elif not (is_number(maximum) and maximum > 0):
        raise ValueError(f"maximum is {maximum!r:.40}; pass a number above 0, or None.")
    heads = max(len(layer) for layer in before)
    width = 0.7 + min(max(0.42 * heads, 2.2), 6.0)
    height = 1.3 + min(max(0.36 * len(before), 1.6), 8.0)
    if after is None:
        figure = new_figure(width + 1.0, height)
        axes = [figure.add_subplot()]
        _draw_map(axes[0], before, SEQUENTIAL, 0.0, maximum)
    else:
        figure = new_figure(3 * width + 2.0, height)
        axes = list(figure.subplots(1, 3, sharey=True))
        change = subtract(after, before)
        reach = reach_of(change)
        _draw_map(axes[0], before, SEQUENTIAL, 0.0, maximum)
        _draw_map(axes[1], after, SEQUENTIAL, 0.0, maximum)
        _draw_map(axes[2], change, DIVERGING, -reach, reach)
        one, other = names
        for place, name in enumerate((one, other, f"{other} − {one}")):  # noqa: RUF001
            axes[place].set_title(name, fontsize=11)
        _add_colour_bar(figure, axes[2:], f"change of {quantity}")
    _add_colour_bar(figure, axes[:2], quantity)
    axes[0].set_ylabel("layer")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def colours_of(
    numbers: Sequence[float], low: float, high: float, scale: str
) -> list[tuple[str, str]]:
    """Return background and text colour (hex) for numbers on a colour scale; NaN is grey."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, to_hex

    place, colours = Normalize(low, high, clip=True), colormaps[scale]
    cells = []
    for number in numbers:
        if math.isnan(number):
            cells.append((_NOTHING, "#000000"))
        else:
            colour = colours(float(place(number)))
            cells.append((to_hex(colour), _ink_on(colour)))
    return cells


def blend(colours: Sequence[str], count: int) -> list[str]:
    """Return so many colours (hex), evenly spaced from the first of some to the last."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("blend", list(colours))
    return [to_hex(scale(k / max(count - 1, 1))) for k in range(count)]


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib; install entropy-regularization[plots]."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def largest(numbers: PerHead) -> float:
    """Return the largest number, or 1 where there is none above 0: the end of a colour scale."""
    return max((x for x in flatten(numbers) if x > 0), default=1.0)


def reach_of(change: PerHead) -> float:
    """Return where the colours of changes end: at the largest, but not at what is written 0.00."""
    return max(largest([[abs(x) for x in layer] for layer in change]), LEAST_REACH)


def subtract(left: PerHead, right: PerHead) -> PerHead:
    """Return left - right, head by head."""
    return [
        [a - b for a, b in zip(one, other, strict=True)]
        for one, other in zip(left, right, strict=True)
    ]


def _draw_map(axes: "Axes", table: PerHead, colours: str, low: float, high: float) -> None:
    heads = max(len(layer) for layer in table)
    grid = [[*layer, *[math.nan] * (heads - len(layer))] for layer in table]
    axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set_facecolor(_NOTHING)
    axes.set_xlabel("head")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=9, which="both")
    axes.set_xticks(_ticks(heads))
    axes.set_yticks(_ticks(len(table)))
    if heads > ANNOTATED_UP_TO or len(table) > ANNOTATED_UP_TO:
        return
    axes.set_xticks([head - 0.5 for head in range(1, heads)], minor=True)
    axes.set_yticks([layer - 0.5 for layer in range(1, len(table))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    style = "{:+.2f}" if low < 0 else "{:.2f}"
    for row, layer in enumerate(table):
        inks = colours_of(layer, low, high, colours)
        for column, (number, (_, ink)) in enumerate(zip(layer, inks, strict=True)):
            text = "" if math.isnan(number) else style.format(round(number, 2) + 0.0)
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)


def _add_colour_bar(figure: "Figure", axes: "list[Axes]", label: str) -> None:
    bar = figure.colorbar(axes[0].images[0], ax=axes, pad=0.02, aspect=30)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(length=0, labelsize=9)
    bar.outline.set_visible(False)


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, math.ceil(count / 12))))


def _check_heads(before: PerHead, after: PerHead | None) -> None:
    for name, table in (("before", before), ("after", [] if after is None else after)):
        rows = table if isinstance(table, list | tuple) else [None]
        numbers = [x for row in rows for x in (row if isinstance(row, list | tuple) else [None])]
        if not all(isinstance(x, Real) for x in numbers):
            raise TypeError(
                f"{name} is not one list of numbers per layer; pass for instance the entropy of "
                "HeadStatistics, or tensor.tolist()."
            )
    if not flatten(before):
        raise ValueError("there is no head to draw; pass one list of numbers per layer.")
    if after is not None and [len(x) for x in before] != [len(x) for x in after]:
        raise ValueError(
            f"before has {[len(x) for x in before]} heads in its layers but after has "
            f"{[len(x) for x in after]}; pass the same heads."
        )


def _ink_on(colour: Sequence[float]) -> str:
    """Return black or white, whichever has more contrast (WCAG 2 relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"
