"""Plots by matplotlib, as parts of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

from align.report.compare import Cloud
from align.report.curves import Journey, Panel

COLORS = {"#010101": "currentColor", "#020202": "var(--line)", "#030303": "var(--train)", "#040404": "var(--held)"}
"""Matplotlib's colors here to the page's, so that plots follow its light and dark themes."""
INK, GRID, TRAIN, HELD = COLORS
DRAWN = 250
"""Parts of an axis in each of which a curve has at most two points."""


def curve(panel: Panel, index: int) -> str:
    """`panel` as an inline SVG; `index` keeps its ids apart from those of the page's other plots."""
    from matplotlib.ticker import MaxNLocator

    with _axes(panel.title, "step", index) as (axes, drawn):
        for label, points, _ in panel.series:
            color = TRAIN if label == "train" else HELD
            few: dict[str, Any] = {"marker": "o", "markersize": 3.2} if len(points) < 12 else {}
            axes.plot(*zip(*thinned(points), strict=True), color=color, linewidth=1.5, label=label, solid_joinstyle="round", **few)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len(panel.series) > 1:
            axes.legend(frameon=False, fontsize=7, handlelength=1.2, borderpad=0)
    return drawn[0]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Steps and values as a plot of this size can show them: of many neighbours the lowest and the highest, so no peak is lost."""
    if len(points) <= 2 * DRAWN:
        return points
    size = -(-len(points) // DRAWN)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return sorted({points[0], *(end(part, key=itemgetter(1)) for part in parts for end in (min, max)), points[-1]})


def cloud(models: Cloud, index: int) -> str:
    """Models with their intervals; where one is ten times further than the next, the distance is drawn as its logarithm."""
    with _axes("", models.x_title, index) as (axes, drawn):
        for label, x, y, low, high in models.points:
            axes.errorbar(x, y, yerr=[[max(y - low, 0.0)], [max(high - y, 0.0)]], fmt="o", color=TRAIN, markersize=4, capsize=2)
            axes.annotate(plain(brief(label)), (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
        far = sorted(abs(point.x) for point in models.points)
        if far[-1] > 10 * max(far[-2], 1e-9) and far[-2] > 0:
            axes.set_xscale("symlog", linthresh=max(far[-2] / 4, 1e-3))
        axes.margins(x=0.12)
    return drawn[0]


def journey(path: Journey, index: int) -> str:
    """Where a policy went: from the hollow point to the full one."""
    with _axes("score", path.title, index) as (axes, drawn):
        xs, ys = zip(*path.points, strict=True)
        axes.plot(xs, ys, color=TRAIN, linewidth=0.9, marker="o", markersize=2.2, alpha=0.85)
        axes.plot(xs[0], ys[0], marker="o", markersize=5.5, markerfacecolor="none", color=HELD)
        axes.plot(xs[-1], ys[-1], marker="o", markersize=5.5, color=HELD)
    return drawn[0]


def brief(label: str, most: int = 26) -> str:
    """`label`, where it is long without its middle: beside all of it no room would be left for the plot, and the branches of a
    sweep differ at the end.
    """
    return label if len(label) <= most else f"{label[: most // 2 - 1]}…{label[-most // 2 :]}"


def plain(label: str) -> str:
    """`label` with no sign that matplotlib reads as mathematics."""
    return label.replace("$", r"\$")


@contextmanager
def _axes(title: str, x_title: str, index: int) -> Iterator[tuple[Any, list[str]]]:
    """Axes in the page's style, and a list that holds the SVG once the block is left."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sizes = {"font.size": 7.5, "axes.labelsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7}
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    whole = {"axes.formatter.useoffset": False}  # 0.69312 and not 2.4, with 1e-5+6.931e-1 above the axis
    svg = {"svg.fonttype": "none", "svg.hashsalt": "align"}
    drawn: list[str] = []
    with rc_context({**svg, "axes.edgecolor": GRID, "grid.color": GRID, **sizes, **inks, **whole}):
        figure = Figure(figsize=(3.5, 2.1), layout="constrained")
        axes = figure.add_subplot()
        axes.yaxis.set_major_locator(MaxNLocator(5))
        yield axes, drawn
        axes.set_title(plain(title), loc="left", fontsize=8)
        axes.set_xlabel(plain(x_title))
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn.append(_inline(buffer.getvalue(), f"p{index}-"))


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as a part of a page: no prolog, no style sheet that would reach the page, its own ids, the page's colors."""
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    return re.sub("|".join(COLORS), lambda match: COLORS[match[0]], svg)
