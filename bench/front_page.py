"""What the README shows: its table and sentences, its plot and its picture, from the results of the second study.

    python bench/front_page.py            # from bench/results/study_again.json; the plot needs the extra `report`

The table and the sentences stand between marks in README.md. The plot and the picture of the two stages are SVG, each
for light and for dark pages. The picture for light pages is drawn by hand; the dark one is the same in other colours.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_again import LONG, PLAIN, Student
from study_again_report import Results, same_weights, sections
from study_protocol import EPOCHS
from study_report import Estimate, Section, by_seed, differences, estimate, filled, markdown, plain
from study_report import signed as with_interval

from kdcache.pipeline.process.progress import duration, size

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "study_again.json"
README = ROOT / "README.md"
PICTURES = ROOT / "docs" / "front"
# Of the picture and the plot: on a light page and on a dark one.
COLOURS = {
    "text": ("#1f2328", "#e6edf3"),
    "quiet": ("#59636e", "#9198a1"),
    "line": ("#818b98", "#656c76"),
    "box": ("#f6f8fa", "#151b23"),
    "teacher": ("#fbe3c8", "#5a3a12"),
    "student": ("#d8e9fd", "#123a63"),
    "cache": ("#d9f2df", "#14432a"),
    "teacher's line": ("#bc4c00", "#f0883e"),
    "cache's line": ("#1a7f37", "#3fb950"),
}
STUDENTS = range(7)  # how many the plot of costs goes up to


def of_core(section: Section) -> dict[str, list[Student]]:
    """The rows of the table: runs by what they are called there."""
    return {
        "ce: labels alone, no teacher": section.runs["ce"],
        "kd, from the cache": section.runs["kd"],
        "nkd, from the cache": section.runs["nkd"],
        "nkd, the teacher in every step": section.runs["nkd, online"],
    }


def cost(results: Results, runs: Sequence[Student]) -> float:
    """The median of a run's core-seconds, with its start and its evaluations."""
    return statistics.median(results[run.name]["cpu_seconds"] for run in runs if run.name in results)


def table(results: Results, core: Section) -> str:
    rows = []
    for label, runs in of_core(core).items():
        top1, nll, ece = ([*by_seed(results, runs, metric).values()] for metric in ("top1", "nll", "ece"))
        figures = plain(estimate(top1), 100, 2), f"{statistics.fmean(nll):.3f}", f"{statistics.fmean(ece):.3f}"
        rows.append([label, *figures, duration(cost(results, runs))])
    teacher = results[PLAIN.name]["test"]
    figures = [f"{100 * teacher['top1']:.2f}", f"{teacher['nll']:.3f}", f"{teacher['ece']:.3f}"]
    rows.append(["*the teacher, a resnet56*", *figures, ""])
    return markdown(["resnet20 trained with", "top-1, %", "NLL", "ECE", "core time a student"], rows)


def sentences(results: Results, core: Section) -> str:
    """What the table does not say by itself: differences seed by seed, what float16 changes, and what a cache costs."""
    runs = core.runs
    gain = differences(results, runs["nkd"], runs["ce"], "top1")
    rounding = differences(results, runs["nkd"], runs["nkd, online"], "top1")
    same, pairs = same_weights(results)
    saved = cost(results, runs["nkd, online"]) - cost(results, runs["nkd"])
    paid = results[PLAIN.name]["cpu_seconds"] / saved
    found = [
        f"**The teacher helps.** Seed by seed, nkd gains {with_interval(gain, 100, 2)} points of top-1 over ce (95% "
        f"interval, {len(gain)} seeds).",
        "**The cache is the teacher.** From float32 records a student ends with the very weights, bit by bit, that the "
        f"teacher in every step gives, in {same} of {pairs} seeds. From float16 records, the default, top-1 "
        f"differs by {with_interval(rounding, 100, 2)} points ({len(rounding)} seeds).",
        f"**It is small, and soon paid for.** {LONG} views take {size(results[PLAIN.name]['bytes'])}, and building "
        f"them takes the core time that {paid:.1f} students save. These students read {EPOCHS} of them.",
    ]
    return "\n".join(textwrap.fill(f"- {text}", 120, subsequent_indent="  ") for text in found)


def parts(results: Results) -> dict[str, str]:
    """Every generated part of the README, by its marker's name."""
    core = sections()["core"]
    return {"results": table(results, core), "findings": sentences(results, core)}


def plotted(results: Results) -> dict[str, Any]:
    """The figures of the plot.

    views: top-1 in percent by number of views, as [mean, half of the 95% interval]; ce and online the same. minutes:
    what N students take of one core from the cache, which is built first, and with the teacher in every step.
    """
    core, views = sections()["core"].runs, sections()["views"].runs

    def top1(runs: Sequence[Student]) -> list[float]:
        found: Estimate = estimate([100 * value for value in by_seed(results, runs, "top1").values()])
        return [round(found.mean, 3), round(found.half or 0, 3)]

    build, cached = results[PLAIN.name]["cpu_seconds"] / 60, cost(results, core["nkd"]) / 60
    online = cost(results, views["online"]) / 60
    return {
        "views": {label.split()[-1]: top1(runs) for label, runs in views.items() if label.startswith("V = ")},
        "ce": top1(core["ce"]),
        "online": top1(views["online"]),
        "minutes": {
            "cached": [round(build + n * cached, 3) for n in STUDENTS],
            "online": [round(n * online, 3) for n in STUDENTS],
        },
    }


def plot(figures: dict[str, Any], file: Path, dark: bool) -> None:
    """Write the plot as SVG: top-1 by number of views, and core time by number of students.

    Text stays text; nothing in it depends on the time or on chance, so that equal figures give equal files. The figures
    stand in the file's description.
    """
    from matplotlib import pyplot

    of = {name: both[dark] for name, both in COLOURS.items()}
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "kdcache", "font.family": "sans-serif", "font.size": 10,
        "text.color": of["text"], "axes.labelcolor": of["text"], "axes.edgecolor": of["line"],
        "xtick.color": of["quiet"], "ytick.color": of["quiet"],
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with pyplot.rc_context(settings):
        canvas, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.1), constrained_layout=True)
        found = {int(v): pair for v, pair in figures["views"].items()}
        for name, label, colour in (
            ("ce", "ce, no teacher", of["quiet"]),
            ("online", "teacher in every step", of["teacher's line"]),
        ):
            mean, half = figures[name]
            left.axhline(mean, color=colour, linestyle="--", linewidth=1.2, label=label)
            left.axhspan(mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
        means, halves = zip(*found.values(), strict=True)
        left.errorbar([*found], means, halves, marker="o", capsize=3, color=of["cache's line"], label="from the cache")
        left.set_xscale("log", base=2)
        left.set_xticks([*found], map(str, found))
        left.minorticks_off()
        left.set(xlabel=f"views in the cache, for {EPOCHS} epochs", ylabel="top-1, %", title="Few views are enough")
        left.legend(frameon=False, fontsize=9, loc="lower right")
        minutes = figures["minutes"]
        right.plot(STUDENTS, minutes["online"], "--o", color=of["teacher's line"], markersize=4, linewidth=1.2)
        right.plot(STUDENTS, minutes["cached"], "-o", color=of["cache's line"], markersize=4)
        for name, label, colour, above in (
            ("online", "teacher in every step", of["teacher's line"], 2.0),
            ("cached", "from the cache", of["cache's line"], -4.5),
        ):
            side = "right" if above > 0 else "left"
            right.annotate(label, (4.1, minutes[name][4] + above), color=colour, fontsize=9, ha=side)
        right.set(xlabel="students", ylabel="minutes of one core", title="The teacher is paid for once", ylim=(0, None))
        for axes in (left, right):
            axes.title.set_fontsize(11)
            axes.patch.set_alpha(0)
            axes.grid(alpha=0.2, color=of["line"])
        about = {"Date": None, "Creator": None, "Title": "kdcache", "Description": json.dumps(figures)}
        canvas.savefig(file, format="svg", transparent=True, metadata=about)
        pyplot.close(canvas)


def darkened(picture: str) -> str:
    """A picture in the dark page's colours; ValueError where it has a colour that is none of ours."""
    to = dict(COLOURS.values())
    if others := set(re.findall(r"#[0-9a-fA-F]{3,8}\b", picture)) - to.keys():
        raise ValueError(f"the picture has colours that have no dark ones: {', '.join(sorted(others))}")
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: to[found[0]], picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    results = json.loads(RESULTS.read_text())["jobs"]
    README.write_text(filled(README.read_text(), parts(results)))
    (PICTURES / "stages-dark.svg").write_text(darkened((PICTURES / "stages-light.svg").read_text()))
    figures = plotted(results)
    for dark in (False, True):
        plot(figures, PICTURES / f"results-{'dark' if dark else 'light'}.svg", dark)


if __name__ == "__main__":
    main()
