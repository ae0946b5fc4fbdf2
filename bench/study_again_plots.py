"""The plots of docs/study-views.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import study_again as again
from matplotlib import pyplot
from matplotlib.axes import Axes
from study_again_report import KINDS, Results, sections
from study_protocol import EPOCHS
from study_report import by_seed, estimate


def plot_spread(results: Results, axes: Axes) -> None:
    runs = sections()["spread"].runs
    for sequence, color in (("random", "tab:grey"), ("spread", "tab:blue")):
        found = {v: [*by_seed(results, runs[f"{v} {sequence}"], "top1").values()] for v in again.VIEWS}
        _line(axes, [v for v in found if found[v]], [found[v] for v in found if found[v]], sequence, color)
    axes.set(xscale="log", xlabel=f"views in the cache, of {EPOCHS} epochs", ylabel="top-1, %")
    axes.set_xticks(again.VIEWS, map(str, again.VIEWS))
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)


def plot_strong(results: Results, axes: Axes) -> None:
    runs = sections()["strong"].runs
    colors = {"ce": "tab:grey", "kd": "tab:orange", "nkd": "tab:blue"}
    for shift, (loss, color) in zip((-0.06, 0.0, 0.06), colors.items(), strict=True):
        found = [[*by_seed(results, runs[f"{loss}, {kind}"], "top1").values()] for kind in KINDS.values()]
        done = [i for i, values in enumerate(found) if values]
        _line(axes, [i + shift for i in done], [found[i] for i in done], loss, color)
    axes.set_xticks(range(len(KINDS)), [f"{kind}\n{augment}" for augment, kind in KINDS.items()], fontsize=8)
    axes.set_ylabel("top-1, %")
    axes.legend()
    axes.grid(alpha=0.3)


def _line(axes: Axes, places: Sequence[float], values: Sequence[Sequence[float]], label: str, color: str) -> None:
    means = [estimate([100 * v for v in some]) for some in values]
    axes.errorbar(
        places, [e.mean for e in means], [e.half or 0 for e in means], marker="o", capsize=4, label=label, color=color
    )


DRAWN: dict[str, Callable[[Results, Axes], None]] = {"spread": plot_spread, "strong": plot_strong}


def draw(name: str, results: Results, folder: Path) -> None:
    """Write one of DRAWN as a PNG file of its name."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    DRAWN[name](results, axes)
    figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
