"""The plots of docs/study.md, from the results of the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from study_head import DENSE, KS, TAILS
from study_protocol import EPOCHS, Results, Run, choose
from study_report import METRICS, Section, by_seed, differences, estimate, head_values, sections


def plot_views(results: Results, section: Section, axes: Axes) -> None:
    labels = [label for label in section.runs if label != "online"]
    points = [(int(label.split()[-1]), by_seed(results, section.runs[label], "top1")) for label in labels]
    points = [(v, found) for v, found in points if found]
    for seed in sorted({seed for _, found in points for seed in found}):
        mine = [(v, 100 * found[seed]) for v, found in points if seed in found]
        axes.plot(*zip(*mine, strict=True), color="tab:blue", alpha=0.3, linewidth=0.8)
    means = [(v, estimate([100 * x for x in found.values()])) for v, found in points]
    views, middle, half = zip(*((v, e.mean, e.half or 0) for v, e in means), strict=True)
    label = "from the cache: mean, 95% interval, seeds"
    axes.errorbar(views, middle, half, color="tab:blue", marker="o", capsize=4, label=label)
    if online := by_seed(results, section.runs["online"], "top1"):
        mean = estimate([100 * x for x in online.values()])
        axes.axhspan(mean.low, mean.high, color="tab:orange", alpha=0.25, label="teacher in the loop: 95% interval")
        axes.axhline(mean.mean, color="tab:orange")
    axes.set_xscale("log", base=2)
    axes.set_xticks(views, map(str, views))
    axes.set(xlabel=f"views in the cache ({EPOCHS} epochs)", ylabel="top-1 on the test images, %")
    axes.set_title("nkd by number of views")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def plot_pairs(results: Results, section: Section, panels: Sequence[Axes]) -> None:
    def of(a: str, b: str, metric: str) -> list[float]:
        return differences(results, section.runs[a], section.runs[b], metric)

    pairs = [pair for pair in section.pairs if of(*pair, "top1")]
    places = range(len(pairs))[::-1]
    for axes, (metric, heading, factor, _) in zip(panels, METRICS, strict=True):
        rows = [[factor * v for v in of(*pair, metric)] for pair in pairs]
        for place, values in zip(places, rows, strict=True):
            found, many = estimate(values), len(values) > 2
            axes.errorbar(
                found.mean, place, xerr=found.half or 0, marker="o", color="tab:blue" if many else "tab:grey",
                markerfacecolor=None if many else "white", capsize=3,
            )  # fmt: skip
            axes.plot(values, [place] * len(values), "|", color="black", markersize=8)
        # Two seeds' intervals would hide all others.
        inside = [x for values in rows for x in values]
        inside += [x for e in map(estimate, rows) if e.n > 2 for x in (e.low, e.high)]
        room = 0.15 * (max(inside) - min(inside)) + 1e-9
        axes.set_xlim(min(inside) - room, max(inside) + room)
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
        axes.bar(
            edges, [a if n else 0 for n, _, a in bins], width, align="edge", color="tab:blue", edgecolor="white",
            alpha=0.8, label="accuracy",
        )  # fmt: skip
        axes.plot([c for n, c, _ in bins if n], [a for n, _, a in bins if n], ".", color="black", markersize=4)
        shares = [n / total for n, *_ in bins]
        axes.step([*edges, 1], [*shares, shares[-1]], where="post", color="tab:orange", label="share of images")
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=0.8)
        axes.set_title(f"{label}: ECE {ece:.3f}", fontsize=9)
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


def plot_heads(values: dict[str, list[float]], axes: Axes) -> None:
    dense = estimate(values[DENSE])
    for tail in TAILS:
        found = [estimate(values[f"{k} {tail}"]) for k in KS]
        axes.errorbar(KS, [e.mean for e in found], [e.half or 0 for e in found], marker="o", capsize=3, label=tail)
    axes.axhspan(dense.low, dense.high, color="grey", alpha=0.3)
    axes.axhline(dense.mean, color="grey", label="dense: all 1,000")
    axes.set(xscale="log", xlabel="K stored classes", ylabel="KL(teacher, head), nats")
    axes.set_xticks(KS, map(str, KS))
    axes.minorticks_off()
    axes.set_title("Heads fitted by nkd to records of ImageNet logits")
    axes.legend(fontsize=8, title="tail")
    axes.grid(alpha=0.3)


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

    if heads := head_values(results):
        save("imagenet", 1, 1, (6.5, 4.5), lambda axes: plot_heads(heads, axes))
    if (chosen := choose(results)) is None:
        return
    of = sections(chosen)
    if by_seed(results, of["views"].runs["V = 1"], "top1"):
        save("views", 1, 1, (6.5, 4.5), lambda axes: plot_views(results, of["views"], axes))
    if differences(results, of["core"].runs["nkd"], of["core"].runs["ce"], "top1"):
        count = sum(bool(by_seed(results, runs, "top1")) for runs in of["losses"].runs.values())
        save("losses", 1, 3, (12, 1.5 + 0.3 * count), lambda p: plot_pairs(results, of["losses"], p), sharey=True)
        calibrated = of["losses"].runs | {
            f"nkd, top 3, {label}": runs for label, runs in of["topk"].runs.items() if label.endswith("drop")
        }
        bins = {label: found for label, runs in calibrated.items() if (found := pooled(results, runs))}
        columns = 5
        lines = -(-len(bins) // columns)

        def draw(panels: Any) -> None:
            flat = panels.reshape(-1)
            plot_reliability(bins, flat)
            flat[0].legend(fontsize=7, loc="upper left")
            panels[-1, 0].set(xlabel="confidence", ylabel="accuracy; share of images")

        save("reliability", lines, columns, (2.4 * columns, 2.5 * lines), draw, sharex=True, sharey=True, squeeze=False)
