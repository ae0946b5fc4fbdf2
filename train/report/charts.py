"""Charts as SVG that stands in the page itself: drawn by Matplotlib, in the colours of the page.

Matplotlib draws in colours that stand for the page's own (`var(--...)`), so that a chart is light or dark as the page
is. No name of a class, file or run ever gets into a chart: legends and titles are the page's, which escapes them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kdcache.cache.errors import InputError

SERIES = 8  # colours; a ninth series has the first one's, and is dashed
_WIDTH, _HEIGHT = 4.4, 2.9  # inches of 72 points
_INK, _GRID = "#c0dea0", "#c0dea1"
_OF_SERIES = [f"#c0deb{i}" for i in range(SERIES)]
_NAMED = {_INK: "--ink-soft", _GRID: "--line"} | {colour: f"--series-{i + 1}" for i, colour in enumerate(_OF_SERIES)}
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.0, "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK, "axes.facecolor": "none", "figure.facecolor": "none", "xtick.color": _INK,
    "ytick.color": _INK, "text.color": _INK, "axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "lines.linewidth": 1.5,
    "path.simplify": True, "path.simplify_threshold": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """A line of points. colour: its place among the page's colours, from 0. thin: whether it is one of many."""

    points: Sequence[tuple[float, float]]
    colour: int = 0
    thin: bool = False
    dashed: bool = field(default=False)


class Pen:
    """Draws charts; opening it imports Matplotlib. InputError where that is not installed."""

    def __init__(self) -> None:
        try:
            import matplotlib
            from matplotlib.backends.backend_svg import FigureCanvasSVG
            from matplotlib.figure import Figure
        except ImportError as e:
            raise InputError("a report needs Matplotlib: pip install matplotlib") from e
        self._style, self._figure, self._canvas = matplotlib.rc_context, Figure, FigureCanvasSVG
        self._drawn = 0

    def lines(
        self, series: Sequence[Series], x: str, y: str, level: float | None = None, steps: int | None = None
    ) -> str:
        """Lines over a common axis. level: a dashed line across, such as a teacher's figure.

        steps: how many steps an epoch has, where x counts epochs: then a second axis counts steps.
        """
        with self._style(_STYLE):
            figure, axes = self._axes(x, y, steps=bool(steps))
            for one in series:
                colour = _OF_SERIES[one.colour % SERIES]
                style = "--" if one.dashed or one.colour >= SERIES else "-"
                marker = "o" if len(one.points) == 1 else None
                width, alpha = (1.1, 0.8) if one.thin else (1.6, 1.0)
                axes.plot(
                    *zip(*one.points, strict=True), style, color=colour, lw=width, alpha=alpha, marker=marker, ms=4
                )
            if level is not None:
                axes.axhline(level, color=_INK, lw=1, ls=(0, (4, 3)))
            axes.margins(x=0.02)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if steps:
                above = axes.secondary_xaxis("top", functions=(lambda e: e * steps, lambda n: n / steps))
                above.set_xlabel("step")
                above.tick_params(length=0)
                above.spines["top"].set_visible(False)
            return self._svg(figure)

    def steps(self, heights: Sequence[Sequence[float]], edges: Sequence[float], x: str, y: str) -> str:
        """Histograms over the same bins, as outlines with a light filling."""
        with self._style(_STYLE):
            figure, axes = self._axes(x, y)
            for colour, of in enumerate(heights):
                axes.stairs(of, edges, color=_OF_SERIES[colour], lw=1.5)
                axes.stairs(of, edges, color=_OF_SERIES[colour], alpha=0.18, fill=True)
            axes.set_xlim(edges[0], edges[-1])
            axes.set_ylim(bottom=0)
            return self._svg(figure)

    def steps_up(self, heights: Sequence[Sequence[float]], x: str, y: str) -> str:
        """Lines that rise with a whole number, from 1 on."""
        series = [Series([*enumerate(of, 1)], colour) for colour, of in enumerate(heights)]
        return self.lines(series, x, y)

    def reliability(self, bins: Sequence[Sequence[dict[str, Any]]], x: str, y: str) -> str:
        """Accuracy by confidence, for each list of bins a line with a dot for each bin, as large as it has images."""
        with self._style(_STYLE):
            figure, axes = self._axes(x, y, square=True)
            axes.plot([0, 100], [0, 100], color=_INK, lw=1, ls=(0, (4, 3)))
            for colour, of in enumerate(bins):
                some = [one for one in of if one["images"]]
                total = sum(one["images"] for one in some) or 1
                xs, ys = ([100 * one[key] for one in some] for key in ("confidence", "accuracy"))
                sizes = [8 + 90 * one["images"] / total for one in some]
                axes.plot(xs, ys, color=_OF_SERIES[colour % SERIES], lw=1.2, alpha=0.8)
                axes.scatter(xs, ys, sizes, color=_OF_SERIES[colour % SERIES], zorder=3, linewidths=0)
            axes.set_xlim(0, 102)
            axes.set_ylim(0, 102)
            return self._svg(figure)

    def _axes(self, x: str, y: str, square: bool = False, steps: bool = False) -> tuple[Any, Any]:
        # Fixed margins: to fit them to the texts takes Matplotlib longer than all the rest.
        width = _HEIGHT * 1.2 if square else _WIDTH
        figure = self._figure(figsize=(width, _HEIGHT))
        self._canvas(figure)
        axes = figure.add_axes((0.55 / width, 0.16, 1 - 0.65 / width, 0.68 if steps else 0.8))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.tick_params(length=0)
        return figure, axes

    def _svg(self, figure: Any) -> str:
        """The chart as an element of the page: without the file's head, ids that nothing names, and fixed colours."""
        file = io.StringIO()
        self._drawn += 1
        with self._style({"svg.hashsalt": f"chart {self._drawn}"}):  # else charts share ids, and their clips mix up
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = file.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r"<\?.*?\?>|<!DOCTYPE.*?>", "", text, flags=re.DOTALL)
        named = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", text))
        text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in named else "", text)
        text = re.sub("#c0de[ab][0-9a-f]", lambda m: f"var({_NAMED[m[0]]})", text)
        text = re.sub(r" font-family: [^;\"]*;", "", text)  # the page's own
        text = re.sub(r"\s+", " ", text).replace("> <", "><").replace("<g/>", "")
        text = re.sub(r'="[^"]*"', lambda m: re.sub(r"(\d\.\d)\d+", r"\1", m[0]), text)  # tenths of a point
        return re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
