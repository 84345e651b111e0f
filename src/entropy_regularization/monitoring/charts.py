"""Charts over training steps or numbers of keys: SVG text that takes its ink from the page."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from entropy_regularization.monitoring.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.4, 2.5)  # inches; at the width of a phone its 9 pt text is still read without zooming

# Stand-ins that nothing else is drawn in, replaced by CSS variables in the SVG text: one picture
# serves light, dark and paper.
FIRST, SECOND, QUIET = "#010203", "#020304", "#040506"
_RULE = "#070809"
_VARIABLES = {
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    QUIET: "var(--quiet)",
    _RULE: "var(--rule)",
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        x: for instance steps.
        y: same length; NaN leaves a gap.
        colour: of matplotlib; FIRST and SECOND are those of the page for two runs.
        dashed: draw dashes.
        width: of the line, points.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dashed: bool = False
    width: float = 1.8


def draw_curves(
    title: str,
    curves: Sequence[Curve],
    *,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    x_label: str = "step",
    doubling: bool = False,
) -> str:
    """Return a line chart as SVG text without a fixed size.

    Args:
        title: of the chart; no two of a page have one.
        curves: the lines.
        y_range: of the axis; None fits it to the lines.
        percent: label shares as percentages.
        x_label: what x is.
        doubling: let every step to the right double x.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    for curve in curves:
        few = sum(not math.isnan(y) for y in curve.y) < 3  # a line needs two points to be seen
        axes.plot(
            curve.x,
            curve.y,
            "--" if curve.dashed else "-",
            color=curve.colour,
            linewidth=curve.width,
            marker="o" if few else "",
            markersize=4,
        )
    if y_range is not None:
        axes.set_ylim(*y_range)
    if percent:
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    return _finish(title, figure, axes, x_label, doubling=doubling)


def draw_shares(title: str, steps: Sequence[float], shares: Mapping[str, Sequence[float]]) -> str:
    """Return shares that add up to 1 over steps, stacked, as SVG text.

    Args:
        title: of the chart; no two of a page have one.
        steps: of the x axis.
        shares: colour to one share per step, from the bottom up.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    figure = new_figure(*SIZE)
    axes = figure.add_subplot()
    axes.stackplot(steps, *shares.values(), colors=list(shares), linewidth=0)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    return _finish(title, figure, axes)


def variable_of(colour: str) -> str:
    """Return what a colour is called in the style sheet of the page."""
    return _VARIABLES[colour]


def _finish(
    title: str, figure: "Figure", axes: "Axes", x_label: str = "step", *, doubling: bool = False
) -> str:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_xlabel(x_label, color=QUIET, fontsize=10)
    axes.tick_params(colors=QUIET, labelsize=10, length=0)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    if doubling:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    return _svg(title, figure)


def _svg(title: str, figure: "Figure") -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # text stays text: it is searched, copied, and set in the font of the page
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "entropy-regularization"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]+"', text)
    assert view_box is not None
    text = re.sub(r"<svg[^>]*>", f'<svg {view_box[0]} aria-hidden="true">', text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]+;?|xlink:(?=href)", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r"\s*\n\s*", " ", _unique_names(title, text))


def _unique_names(title: str, text: str) -> str:
    """Keep only names that something refers to, made unique among the charts of a page."""
    chart = sha256((title + text).encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{chart}-{m[1]}"' if m[1] in used else "", text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{chart}-", text)
