"""The plots of docs/study.md, from the results of the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from study_head import KS, TAILS
from study_protocol import EPOCHS, MARGIN, Results, Run, choose
from study_report import EXACT, METRICS, Section, by_seed, differences, estimate, head_values, over_dense, sections

FEW_IMAGES = 20  # a bin of fewer is pale


def plot_views(results: Results, section: Section, panels: Sequence[Axes]) -> None:
    pairs = [pair for pair in section.pairs if pair[1] == EXACT]
    views = {label: int(label.split()[-1]) for label, _ in pairs}
    for axes, (metric, heading, factor, _) in zip(panels, METRICS, strict=True):
        found = {
            views[a]: [factor * x for x in differences(results, section.runs[a], section.runs[b], metric)]
            for a, b in pairs
        }
        found = {v: values for v, values in found.items() if values}
        for v, values in found.items():
            axes.plot([v] * len(values), values, "_", color="black", markersize=8)
        means = [estimate(values) for values in found.values()]
        axes.errorbar([*found], [e.mean for e in means], [e.half or 0 for e in means], marker="o", capsize=4)
        if metric == "top1":
            axes.axhspan(-factor * MARGIN, factor * MARGIN, color="tab:orange", alpha=0.2, label="equal by our margin")
            axes.legend(fontsize=8, loc="lower right")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks([*found], map(str, found))
        axes.set_xlabel(f"views in the cache, of {EPOCHS} epochs")
        axes.set_ylabel(f"{heading.replace('%', 'points')}, minus {EXACT}, V = {EPOCHS}")
        axes.grid(alpha=0.3)


def plot_pairs(results: Results, section: Section, panels: Sequence[Axes]) -> None:
    def of(a: str, b: str, metric: str) -> list[float]:
        return differences(results, section.runs[a], section.runs[b], metric)

    # A teacher that learns from the students' few images alone lies far outside.
    pairs = [pair for pair in section.pairs if pair[0] != "bdkd, online" and of(*pair, "top1")]
    places = range(len(pairs))[::-1]
    for axes, (metric, heading, factor, _) in zip(panels, METRICS, strict=True):
        rows = [[factor * v for v in of(*pair, metric)] for pair in pairs]
        for place, values in zip(places, rows, strict=True):
            found, many = estimate(values), len(values) > 2
            axes.errorbar(
                found.mean, place, xerr=found.half if many else None, marker="o", capsize=3,
                color="tab:blue" if many else "tab:grey", markerfacecolor=None if many else "white",
            )  # fmt: skip
            axes.plot(values, [place] * len(values), "|", color="black", markersize=8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(f"{heading.replace('%', 'points')}, minus {pairs[0][1]}")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(places, [a for a, _ in pairs])


def plot_reliability(pooled: dict[str, list[tuple[float, float, float]]], panels: Sequence[Axes]) -> None:
    """By label [count, confidence, accuracy] of each bin."""
    for axes, (label, bins) in zip(panels, pooled.items(), strict=False):
        total = sum(n for n, *_ in bins)
        ece = sum(n * abs(c - a) for n, c, a in bins) / total
        width = 1 / len(bins)
        edges = [i * width for i in range(len(bins))]
        bars = axes.bar(
            edges, [a if n else 0 for n, _, a in bins], width, align="edge", color="tab:blue", edgecolor="white",
            label="accuracy",
        )  # fmt: skip
        for bar, (n, *_) in zip(bars, bins, strict=True):
            bar.set_alpha(0.25 if 0 < n < FEW_IMAGES else 0.8)
        axes.plot([c for n, c, _ in bins if n], [a for n, _, a in bins if n], ".", color="black", markersize=4)
        shares = [n / total for n, *_ in bins]
        axes.step([*edges, 1], [*shares, shares[-1]], where="post", color="tab:orange", label="share of images")
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=0.8)
        axes.set_title(f"{label}: {ece:.3f}", fontsize=9)
        axes.set(xlim=(0, 1), ylim=(0, 1))
    for axes in list(panels)[len(pooled) :]:
        axes.set_visible(False)


def pooled(results: Results, runs: Sequence[Run]) -> list[tuple[float, float, float]]:
    """The reliability of all seeds' answers together."""
    tables = [results[run.name]["test"]["reliability"] for run in runs if run.name in results]
    out = []
    for bins in zip(*tables, strict=True):
        n = sum(count for count, *_ in bins)
        sure, right = (sum(count * values[i] for count, *values in bins) / max(1, n) for i in (0, 1))
        out.append((n, sure, right))
    return out


def plot_heads(results: Results, panels: Sequence[Axes]) -> None:
    parts = {"kl": "KL(teacher, head)", "others": "its part beside the label"}
    for axes, (part, heading) in zip(panels, parts.items(), strict=True):
        values = head_values(results, part)
        for i, tail in enumerate(TAILS):
            found = [estimate(over_dense(values, f"{k} {tail}")) for k in KS]
            beside = [k * 1.03 ** (i - (len(TAILS) - 1) / 2) for k in KS]  # else one hides another
            axes.errorbar(
                beside, [e.mean for e in found], [e.half or 0 for e in found], marker="o", capsize=3, label=tail
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="K stored classes of 1,000", ylabel=f"{heading}, minus dense, nats")
        axes.set_xticks(KS, map(str, KS))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8, title="tail")


def write_plots(results: Results, folder: Path) -> None:
    """The plots for which there are results."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(
        name: str, rows: int, columns: int, size: tuple[float, float], draw: Callable[[Any], None], **shared: Any
    ) -> None:
        figure, axes = pyplot.subplots(rows, columns, figsize=size, constrained_layout=True, **shared)
        draw(axes)
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)

    if head_values(results):
        save("imagenet", 1, 2, (11, 4.5), lambda panels: plot_heads(results, panels))
    if (chosen := choose(results)) is None:
        return
    of = sections(chosen)
    if by_seed(results, of["views"].runs[EXACT], "top1"):
        save("views", 1, 3, (12, 4), lambda panels: plot_views(results, of["views"], panels))
    if differences(results, of["core"].runs["nkd"], of["core"].runs["ce"], "top1"):
        count = sum(bool(by_seed(results, runs, "top1")) for runs in of["losses"].runs.values())
        save("losses", 1, 3, (12, 1.5 + 0.3 * count), lambda p: plot_pairs(results, of["losses"], p), sharey=True)
        ends = ("dense", "drop")
        calibrated = of["losses"].runs | {
            f"nkd, {label}": runs for label, runs in of["topk"].runs.items() if label.endswith(ends)
        }
        bins = {label: found for label, runs in calibrated.items() if (found := pooled(results, runs))}
        if "build-dense" in results:
            bins["the teacher"] = [tuple(one) for one in results["build-dense"]["test"]["reliability"]]
        columns = 5
        lines = -(-len(bins) // columns)

        def draw(panels: Any) -> None:
            flat = panels.reshape(-1)
            plot_reliability(bins, flat)
            flat[0].legend(fontsize=7, loc="upper left")
            panels[-1, 0].set(xlabel="confidence", ylabel="accuracy; share of images")

        save("reliability", lines, columns, (2.4 * columns, 2.5 * lines), draw, sharex=True, sharey=True, squeeze=False)
