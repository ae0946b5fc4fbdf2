"""What the study found: its statistics, the tables of docs/study.md and the plots, all from the results of the runs."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from scipy.stats import t as student_t
from study_head import DENSE, KS, TAILS
from study_protocol import (
    EPOCHS,
    ONLINE_BDKD,
    SMALL_STUDENT,
    TOPK_NKDS,
    VIEWS,
    Chosen,
    Results,
    Run,
    best,
    choose,
    group,
    recipe_runs,
    weight_runs,
    with_tail,
)

from kdcache.pipeline.progress import duration, size
from kdcache.train.presets import make_loss

# Name in the results, heading, factor, digits.
METRICS = (("top1", "top-1, %", 100, 2), ("nll", "NLL", 1, 4), ("ece", "ECE", 1, 4))
MORE = (*METRICS, ("agreement", "agreement, %", 100, 2), ("kl", "KL", 1, 4))
NOT_YET = "*Not run yet.*"


# Statistics


@dataclass(frozen=True)
class Estimate:
    """A mean of n values with their standard deviation (None for one) and half the 95% t-interval of the mean."""

    mean: float
    n: int
    deviation: float | None = None
    half: float | None = None

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def estimate(values: Sequence[float]) -> Estimate:
    n = len(values)
    if n == 1:
        return Estimate(values[0], 1)
    deviation = statistics.stdev(values)
    return Estimate(statistics.fmean(values), n, deviation, float(student_t.ppf(0.975, n - 1)) * deviation / math.sqrt(n))


def by_seed(results: Results, runs: Sequence[Run], metric: str) -> dict[int, float]:
    """Of the runs that are done, on the test images."""
    return {run.seed: results[run.name]["test"][metric] for run in runs if run.name in results}


def differences(results: Results, runs: Sequence[Run], others: Sequence[Run], metric: str) -> list[float]:
    """Those of the seeds that both have, in the order of seeds."""
    a, b = by_seed(results, runs, metric), by_seed(results, others, metric)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


# What is compared


@dataclass(frozen=True)
class Section:
    """Runs by label, a run a seed; and which labels are compared pair by pair."""

    runs: dict[str, list[Run]]
    pairs: list[tuple[str, str]]


def sections(chosen: Chosen) -> dict[str, Section]:
    every = {name: group(name, chosen) for name in ("core", "views", "losses", "topk", "small")}

    def where(name: str, **has: Any) -> list[Run]:
        return [
            run for run in every[name] if isinstance(run, Run) and all(getattr(run, k) == v for k, v in has.items())
        ]

    named = {"ce": "ce", "kd": chosen.kd, "nkd": chosen.nkd}
    core = {label: where("core", loss=loss) for label, loss in named.items()}
    small = {label: where("small", loss=loss) for label, loss in named.items()}
    pairs = [("kd", "ce"), ("nkd", "ce"), ("nkd", "kd")]
    views = {f"V = {v}": where("views", views=v, online=False) for v in VIEWS}
    views |= {f"V = {EPOCHS}": core["nkd"], "online": where("views", online=True)}
    others = dict.fromkeys(run.loss for run in where("losses", online=False))
    losses = core | {loss: where("losses", loss=loss, online=False) for loss in others}
    losses["bdkd, online"] = where("losses", loss=ONLINE_BDKD, online=True)
    topk, of_dense = {}, []
    for nkd in TOPK_NKDS:
        at = f"T = {make_loss(nkd, 32).temperature:g}"
        topk[f"{at}, dense"] = where("topk", loss=nkd)
        for tail in TAILS:
            topk[f"{at}, {tail}"] = where("topk", loss=with_tail(nkd, tail))
            of_dense.append((f"{at}, {tail}", f"{at}, dense"))
    return {
        "core": Section(core, pairs),
        "views": Section(views, [(label, "online") for label in views if label != "online"]),
        "losses": Section(losses, [(label, "ce") for label in losses if label != "ce"]),
        "topk": Section(topk, of_dense),
        "small": Section(small, pairs),
    }


def head_values(results: Results) -> dict[str, list[float]]:
    """KL by head, over seeds in their order."""
    found = [results[head.name]["kl"] for head in group("imagenet", Chosen()) if head.name in results]
    return {name: [kl[name] for kl in found] for name in (found[0] if found else {})}


# Tables


def plain(value: Estimate, factor: float, digits: int) -> str:
    spread = "" if value.deviation is None else f" ± {factor * value.deviation:.{digits}f}"
    return f"{factor * value.mean:.{digits}f}{spread}"


def signed(value: Estimate, factor: float, digits: int) -> str:
    if value.half is None:
        return f"{factor * value.mean:+.{digits}f}"
    return f"{factor * value.mean:+.{digits}f} ({factor * value.low:+.{digits}f} to {factor * value.high:+.{digits}f})"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def means_table(results: Results, section: Section) -> str:
    rows = []
    for label, runs in section.runs.items():
        if values := by_seed(results, runs, "top1"):
            cells = [plain(estimate([*by_seed(results, runs, m).values()]), f, d) for m, _, f, d in MORE]
            rows.append([label, str(len(values)), *cells])
    return markdown(["", "seeds", *(heading for _, heading, *_ in MORE)], rows) if rows else NOT_YET


def pairs_table(results: Results, section: Section) -> str:
    rows = []
    for a, b in section.pairs:
        found = [(differences(results, section.runs[a], section.runs[b], m), f, d) for m, _, f, d in METRICS]
        if n := len(found[0][0]):
            rows.append([f"{a} - {b}", str(n), *(signed(estimate(values), f, d) for values, f, d in found)])
    heads = ["", "pairs", *(heading.replace("%", "points") for _, heading, *_ in METRICS)]
    return markdown(heads, rows) if rows else NOT_YET


def tuning_table(results: Results) -> str:
    """What the held-out images said: each setting's mean over its seeds."""
    runs = recipe_runs()
    if recipe := best(results, runs):
        runs = runs + weight_runs(recipe.lr, recipe.decay)
    same: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for run in runs:
        if run.name in results:
            same.setdefault((run.loss, run.lr, run.decay), []).append(results[run.name]["held_out"])
    rows = []
    for (loss, lr, decay), found in same.items():
        figures = [plain(estimate([m[name] for m in found]), f, d) for name, _, f, d in METRICS]
        rows.append([f"`{loss}`", f"{lr:g}", f"{decay:g}", str(len(found)), *figures])
    heads = ["loss", "lr", "weight decay", "seeds", *(heading for _, heading, *_ in METRICS)]
    return markdown(heads, rows) if rows else NOT_YET


def chosen_text(results: Results) -> str:
    chosen = choose(results)
    if chosen is None:
        return NOT_YET
    return (
        f"Chosen: learning rate {chosen.lr:g}, weight decay {chosen.decay:g}; `kd` below is `{chosen.kd}`, `nkd` is "
        f"`{chosen.nkd}` (a bare name is the preset of [Losses](losses.md))."
    )


def teacher_table(results: Results) -> str:
    if "build-dense" not in results:
        return NOT_YET
    parts = {"held out": "held_out", "test": "test"}
    rows = [
        [label, *(f"{f * results['build-dense'][part][m]:.{d}f}" for m, _, f, d in METRICS)]
        for label, part in parts.items()
    ]
    return markdown(["images", *(heading for _, heading, *_ in METRICS)], rows)


def heads_table(results: Results) -> str:
    found = head_values(results)
    if not found:
        return NOT_YET
    dense = found[DENSE]

    def cell(name: str) -> str:
        minus = estimate([a - b for a, b in zip(found[name], dense, strict=True)])
        return f"{plain(estimate(found[name]), 1, 3)}; {signed(minus, 1, 3)}"

    rows = [[f"K = {k}", *(cell(f"{k} {tail}") for tail in TAILS)] for k in KS]
    text = markdown(["KL, and over dense", *TAILS], rows)
    n = len(dense)
    return f"{text}\n\nDense: {plain(estimate(dense), 1, 3)}; no teacher (`ce`): {plain(estimate(found['ce']), 1, 3)}; {n} seeds."


def cost_table(results: Results, chosen: Chosen | None) -> str:
    """Seconds on the clock and of all cores; and after how many students the cache has paid."""
    rows = []
    for label, name in (("teach", "teach"), ("build, dense", "build-dense"), ("build, top 3", "build-top3")):
        if name in results:
            rows.append([label, "1", *(duration(results[name][of]) for of in ("seconds", "cpu_seconds"))])
    text = []
    if chosen:
        of = sections(chosen)
        kinds = {
            "a student by ce": of["core"].runs["ce"],
            "by kd, from the cache": of["core"].runs["kd"],
            "by nkd, from the cache": of["core"].runs["nkd"],
            "by nkd, teacher in the loop": of["views"].runs["online"],
            "by bdkd, teacher learns": of["losses"].runs["bdkd, online"],
        }
        median = {}
        for label, runs in kinds.items():
            if done := [results[run.name] for run in runs if run.name in results]:
                median[label] = {of: statistics.median(job[of] for job in done) for of in ("seconds", "cpu_seconds")}
                rows.append([label, str(len(done)), *map(duration, median[label].values())])
        cached, online = (median.get(label) for label in list(kinds)[2:4])
        if cached and online and "build-dense" in results:
            saved = online["cpu_seconds"] - cached["cpu_seconds"]
            students = results["build-dense"]["cpu_seconds"] / saved
            text.append(f"By core-seconds the dense cache has paid for itself after {students:.2f} students.")
    for label, name in (("dense", "build-dense"), ("top 3", "build-top3")):
        if name in results:
            text.append(f"The {label} cache takes {size(results[name]['bytes'])}.")
    table = markdown(["", "runs", "median on the clock", "median of core-seconds"], rows)
    return f"{table}\n\n{' '.join(text)}" if rows else NOT_YET


def tables(results: Results) -> dict[str, str]:
    """Every generated part of the page, by its marker's name."""
    chosen = choose(results)
    of = sections(chosen or Chosen())
    return {
        "teacher": teacher_table(results),
        "tuning": tuning_table(results),
        "chosen": chosen_text(results),
        **{name: means_table(results, section) for name, section in of.items()},
        **{f"{name}-pairs": pairs_table(results, section) for name, section in of.items()},
        "imagenet": heads_table(results),
        "cost": cost_table(results, chosen),
    }


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with each part between its markers, <!-- NAME --> and <!-- /NAME -->; ValueError where one is missing."""
    for name, text in parts.items():
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2].lstrip()}", page, flags=re.S
        )
        if count != 1:
            raise ValueError(f"the page has {count} places for {name}, not one")
    return page


# Plots


def plot_views(results: Results, section: Section, axes: Axes) -> None:
    labels = [label for label in section.runs if label != "online"]
    points = [(int(label.split()[-1]), by_seed(results, section.runs[label], "top1")) for label in labels]
    points = [(v, found) for v, found in points if found]
    for seed in sorted({seed for _, found in points for seed in found}):
        mine = [(v, 100 * found[seed]) for v, found in points if seed in found]
        axes.plot(*zip(*mine, strict=True), color="tab:blue", alpha=0.3, linewidth=0.8)
    means = [(v, estimate([100 * x for x in found.values()])) for v, found in points]
    axes.errorbar(
        [v for v, _ in means], [e.mean for _, e in means], [e.half or 0 for _, e in means], color="tab:blue", marker="o",
        capsize=4, label="from the cache: mean, 95% interval, seeds",
    )  # fmt: skip
    if online := by_seed(results, section.runs["online"], "top1"):
        mean = estimate([100 * x for x in online.values()])
        axes.axhspan(mean.low, mean.high, color="tab:orange", alpha=0.25, label="teacher in the loop: 95% interval")
        axes.axhline(mean.mean, color="tab:orange")
    axes.set_xscale("log", base=2)
    axes.set_xticks([v for v, _ in means], [str(v) for v, _ in means])
    axes.set(xlabel=f"views in the cache ({EPOCHS} epochs)", ylabel="top-1 on the test images, %")
    axes.set_title("nkd by number of views")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def plot_pairs(results: Results, section: Section, panels: Sequence[Axes]) -> None:
    pairs = [pair for pair in section.pairs if differences(results, section.runs[pair[0]], section.runs[pair[1]], "top1")]
    places = list(range(len(pairs)))[::-1]
    for axes, (metric, heading, factor, _) in zip(panels, METRICS, strict=True):
        rows = [
            [factor * v for v in differences(results, section.runs[a], section.runs[b], metric)] for a, b in pairs
        ]
        for place, values in zip(places, rows, strict=True):
            found, many = estimate(values), len(values) > 2
            axes.errorbar(
                found.mean, place, xerr=found.half or 0, marker="o", color="tab:blue" if many else "tab:grey",
                markerfacecolor=None if many else "white", capsize=3,
            )  # fmt: skip
            axes.plot(values, [place] * len(values), "|", color="black", markersize=8)
        # Two seeds' intervals would hide all others.
        inside = [x for values in rows for x in ([*values] if len(values) < 3 else [*values, estimate(values).low, estimate(values).high])]
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
        axes.step([*edges, 1], [*(n / total for n, *_ in bins), 0], where="post", color="tab:orange", label="share of images")
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

    def save(name: str, rows: int, columns: int, size: tuple[float, float], draw: Callable[[Any], None], **shared: Any) -> None:
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


# All of it


def summary(results: Results) -> dict[str, Any]:
    """Means and paired differences as numbers, on the test images."""
    chosen = choose(results)
    if chosen is None:
        return {}
    out: dict[str, Any] = {}
    for name, section in sections(chosen).items():
        means = {
            label: {m: vars(estimate([*found.values()])) for m, *_ in MORE if (found := by_seed(results, runs, m))}
            for label, runs in section.runs.items()
        }
        pairs = {
            f"{a} - {b}": {
                m: vars(estimate(found))
                for m, *_ in METRICS
                if (found := differences(results, section.runs[a], section.runs[b], m))
            }
            for a, b in section.pairs
        }
        out[name] = {"means": {k: v for k, v in means.items() if v}, "pairs": {k: v for k, v in pairs.items() if v}}
    return out


def write_report(results: dict[str, Any], protocol: dict[str, Any], out: Path, docs: Path) -> None:
    """The results as JSON, a line a job; the plots in docs/study; the tables in docs/study.md."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results))
    head, found = json.dumps(protocol), json.dumps(summary(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{{"protocol": {head},\n"summary": {found},\n"jobs": {{\n{lines}\n}}}}\n')
    write_plots(results, docs / "study")
    page = docs / "study.md"
    page.write_text(filled(page.read_text(), tables(results)))
