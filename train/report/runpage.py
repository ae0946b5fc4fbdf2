"""What the page shows of runs, made of their facts: texts, rows and charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcache.train.report import words
from kdcache.train.report.cachepage import View, chart, confusions, figure, per_class
from kdcache.train.report.charts import SERIES, Pen, Series
from kdcache.train.report.words import percent

_DRAWN = 40  # lines of single runs in a chart at most; of more runs, only the means of groups are drawn
_PARTS = 6  # groups whose loss parts are shown
_CURVES = (
    ("validation_top1", "Top-1 on the validation images", "top-1, %", 100),
    ("top1", "Top-1 on the evaluation images", "top-1, %", 100),
    ("nll", "NLL on the evaluation images", "NLL, nats", 1),
    ("loss", "Training loss", "loss", 1),
    ("ece", "Calibration error", "ECE", 1),
    ("agreement", "Agreement with the teacher", "agreement, %", 100),
    ("kl", "KL to the teacher", "KL, nats", 1),
)
_MARK = "loss_"  # what the names of a loss's parts begin with in a line of metrics


def runs_view(facts: dict[str, Any], pen: Pen) -> View:
    """All that the template of runs needs."""
    groups = [one["group"] for one in facts["groups"]]
    drawn = _drawn(facts["runs"], groups)
    curves = [one for spec in _CURVES if (one := _curve(facts, drawn, *spec, pen))]
    return {
        "title": _title(facts),
        "tiles": _tiles(facts),
        "verdict": words.of_runs(facts),
        "forest": _forest(facts),
        "means": _means(facts),
        "differences": _differences(facts),
        "legend": [*enumerate(groups)] if curves and len(groups) > 1 else [],
        "drawn": _how_drawn(facts, groups),
        "curves": curves,
        "parts": _parts(facts, groups, pen),
        "notes": _notes(facts["judged"]),
        "answers": _answers([one for one in facts["judged"] if "missing" not in one], pen),
        "settings": {**facts["settings"], "common": sorted(facts["settings"]["common"].items())},
        "heads": [one["title"] for one in facts["figures"]],
        "all": [{**run, "cells": _cells(run["figures"], facts["figures"])} for run in facts["runs"]],
    }


def _title(facts: dict[str, Any]) -> str:
    count = len(facts["runs"])
    if count == 1:
        return f"The run {facts['runs'][0]['group']}"
    return f"{count} runs" + (f" in {len(facts['groups'])} groups" if 1 < len(facts["groups"]) < count else "")


def _value(of: dict[str, Any] | None, by: dict[str, Any], key: str = "mean") -> str:
    if of is None or of[key] is None:
        return "–"
    return figure(of[key], by["factor"], by["digits"])


def _plus_minus(of: dict[str, Any] | None, by: dict[str, Any]) -> str:
    text = _value(of, by)
    return f"{text} ± {_value(of, by, 'deviation')}" if of and of["deviation"] is not None else text


def _tiles(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    by, runs = facts["by"], facts["runs"]
    finished = sum(run["state"].startswith("finished") for run in runs)
    count = ("runs", f"{finished} of {len(runs)}", "are finished")
    if by is None:
        return [count]
    best = facts["groups"][0]
    of = best["figures"][by["key"]]
    found = [(f"best {by['title']}", _value(of, by), best["group"])]
    if of["deviation"] is not None:
        found.append(("its spread", f"± {_value(of, by, 'deviation')}", f"standard deviation of {of['n']} seeds"))
    if facts["differences"] and (one := facts["differences"][0]["figures"].get(by["key"])):
        apart = f"{by['factor'] * one['estimate']['mean']:+.{by['digits']}f}"
        found.append(("above the second", apart, facts["differences"][0]["other"]))
    for key in ("nll", "agreement"):
        other = next((f for f in facts["figures"] if f["key"] == key), None)
        if other and key in best["figures"]:
            found.append((f"its {other['title']}", _value(best["figures"][key], other), best["group"]))
    return [*found, count]


def _forest(facts: dict[str, Any]) -> View | None:
    """Each group's mean, interval and single runs on one scale, in percent of its width."""
    by = facts["by"]
    groups = [one for one in facts["groups"] if by and by["key"] in one["figures"]]
    if not groups or not by or len(facts["runs"]) < 2:
        return None
    found = [one["figures"][by["key"]] for one in groups]
    every = [v for of in found for v in (*of["values"], of["low"], of["high"]) if v is not None]
    low, high = min(every), max(every)
    span = (high - low) or 1e-9
    low, high = low - 0.04 * span, high + 0.04 * span

    def place(value: float | None) -> float | None:
        return None if value is None else 100 * (value - low) / (high - low)

    rows = []
    for one, of in zip(groups, found, strict=True):
        interval = "–" if of["low"] is None else f"{_value(of, by, 'low')} to {_value(of, by, 'high')}"
        rows.append(
            {
                "group": one["group"], "n": of["n"], "mean": place(of["mean"]), "low": place(of["low"]),
                "high": place(of["high"]), "dots": [place(v) for v in of["values"]], "text": _plus_minus(of, by),
                "interval": interval,
            }
        )  # fmt: skip
    caption = (
        f"{by['title']} of the last epoch, the best first. A dot is a run, the line across is the mean, and the band "
        "is the 95% t-interval of the mean (for three seeds or more)."
    )
    ends = [figure(v, by["factor"], by["digits"]) for v in (low, high)]
    return {"rows": rows, "caption": caption, "low": ends[0], "high": ends[1]}


def _means(facts: dict[str, Any]) -> View | None:
    figures, groups = facts["figures"], facts["groups"]
    if not figures:
        return None
    best: dict[str, float] = {}
    for one in figures:
        means = [group["figures"][one["key"]]["mean"] for group in groups if one["key"] in group["figures"]]
        if one["up"] is not None and len(means) > 1:
            best[one["key"]] = max(means) if one["up"] else min(means)
    rows = []
    for group in groups:
        cells = []
        for one in figures:
            of = group["figures"].get(one["key"])
            cells.append((_plus_minus(of, one), of is not None and best.get(one["key"]) == of["mean"]))
        rows.append({"group": group["group"], "n": group["runs"], "cells": cells})
    return {"heads": [one["title"] for one in figures], "rows": rows}


def _differences(facts: dict[str, Any]) -> View | None:
    figures = [one for one in facts["figures"] if one["up"] is not None]
    rows = []
    for pair in facts["differences"]:
        counts = [of["estimate"]["n"] for of in pair["figures"].values()]
        cells = [_signed(pair["figures"].get(one["key"]), one) for one in figures]
        rows.append({"other": pair["other"], "n": max(counts, default=0), "cells": cells})
    heads = [one["title"].replace(", %", ", points") for one in figures]
    return {"first": facts["differences"][0]["first"], "heads": heads, "rows": rows} if rows else None


def _signed(of: dict[str, Any] | None, by: dict[str, Any]) -> tuple[str, str]:
    """A difference and its interval."""
    if of is None:
        return "–", ""

    def text(value: float) -> str:
        return f"{by['factor'] * value:+.{by['digits']}f}"

    estimate = of["estimate"]
    if estimate["low"] is None:
        return ", ".join(map(text, of["values"])), ""
    return text(estimate["mean"]), f"{text(estimate['low'])} to {text(estimate['high'])}"


# Curves


def _drawn(runs: Sequence[dict[str, Any]], groups: Sequence[str]) -> list[tuple[int, bool, list[dict[str, Any]]]]:
    """What is drawn: colour, whether it is one of many, and lines of metrics; a run each, or a group's mean each."""
    if len(runs) <= _DRAWN:
        thin = len(runs) > len(groups)
        return [(groups.index(run["group"]), thin, run["lines"]) for run in runs]
    return [
        (at, False, _mean_lines([run["lines"] for run in runs if run["group"] == group]))
        for at, group in enumerate(groups[:_DRAWN])
    ]


def _how_drawn(facts: dict[str, Any], groups: Sequence[str]) -> str:
    if len(facts["runs"]) > _DRAWN:
        more = f" of the first {_DRAWN} groups" if len(groups) > _DRAWN else ""
        return f"The means over the seeds are drawn{more}, because there are more than {_DRAWN} runs."
    return "Each line is a run." if len(facts["runs"]) > len(groups) else ""


def _mean_lines(lines: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The means of several runs' figures, epoch by epoch, over the runs that have them."""
    by_epoch: dict[int, dict[str, list[float]]] = {}
    for run in lines:
        for line in run:
            for key, value in line.items():
                by_epoch.setdefault(int(line["epoch"]), {}).setdefault(key, []).append(value)
    return [
        {key: sum(values) / len(values) for key, values in of.items()} | {"epoch": epoch}
        for epoch, of in sorted(by_epoch.items())
    ]


def _points(lines: Sequence[dict[str, Any]], key: str, factor: float) -> list[tuple[float, float]]:
    return [(line["epoch"], factor * line[key]) for line in lines if key in line and "epoch" in line]


def _curve(
    facts: dict[str, Any],
    drawn: Sequence[tuple[int, bool, list[dict[str, Any]]]],
    key: str,
    title: str,
    y: str,
    factor: float,
    pen: Pen,
) -> View | None:
    """A figure by epoch, and by step where all runs have as many steps an epoch; None where no run has the figure."""
    found = [(colour, thin, _points(lines, key, factor)) for colour, thin, lines in drawn]
    series = [Series(points, colour, thin) for colour, thin, points in found if points]
    if not series:
        return None
    teacher = facts["teacher"].get(key) if facts["teacher"] else None
    legend = [(None, f"the teacher: {factor * teacher:.{2 if factor == 100 else 4}f}")] if teacher is not None else []
    level = None if teacher is None else factor * teacher
    svg = pen.lines(series, "epoch", y, level, facts["steps"])
    ends = ", ".join(f"{one.points[-1][1]:.4g}" for one in series[:12])
    return chart(svg, title, "", f"A curve by epoch, which ends at {ends}", legend)


def _parts(facts: dict[str, Any], groups: Sequence[str], pen: Pen) -> list[View]:
    """A chart for each group with the parts of its loss by epoch, where there is more than one part."""
    found = []
    for group in groups[:_PARTS]:
        lines = _mean_lines([run["lines"] for run in facts["runs"] if run["group"] == group])
        names = list(dict.fromkeys(key for line in lines for key in line if key.startswith(_MARK)))
        series = [Series(_points(lines, name, 1), at) for at, name in enumerate(names)]
        if len(names) > 1:
            svg = pen.lines(series, "epoch", "loss", None, facts["steps"])
            legend = [(at, name.removeprefix(_MARK)) for at, name in enumerate(names)]
            ends = ", ".join(f"{name.removeprefix(_MARK)} ends at {lines[-1].get(name, 0):.4g}" for name in names)
            found.append(chart(svg, group, "", ends, legend))
    return found


# Answers


def _name(one: dict[str, Any]) -> str:
    return f"{one['group']}, seed {one['seed']}"


def _notes(judged: Sequence[dict[str, Any]]) -> list[str]:
    found = [
        f"The weights of {_name(one)} were not judged again: {one['missing']}" for one in judged if "missing" in one
    ]
    return found if judged else ["No weights were judged again, so there is nothing to tell by class or by confidence."]


def _answers(judged: Sequence[dict[str, Any]], pen: Pen) -> View | None:
    """What the weights that were judged again answer: by confidence, by class, and beside the teacher."""
    if not judged:
        return None
    charts, scaling, agreement, by_class = [], [], [], []
    for one in judged:
        found = one["analysis"]
        if of := found["calibration"]:
            before, after = of["before"], of["after"]
            cells = [f"{of['temperature']:.3f}"]
            cells += [f"{b[key]:.4f}" for key in ("nll", "ece") for b in (before, after)]
            scaling.append((_name(one), cells))
        for where in ("evaluation", "training"):
            if near := found[where]:
                five = "–" if near["top5"] is None else percent(near["top5"], 2)
                images = "evaluation" if where == "evaluation" else "training view"
                agreement.append((_name(one), [images, f"{near['images']:,}", percent(near["top1"], 2), five]))
        if found["per_class"]:
            names = found["per_class"]["names"]
            confused = confusions(found["confusions"], names)
            by_class.append({"name": _name(one), "per_class": per_class(found["per_class"]), "confusions": confused})
    legend = [(at % SERIES, _name(one)) for at, one in enumerate(judged)]
    dots = "A larger dot has more images."
    pictures = (
        (
            "Can their confidence be believed?",
            "accuracy, %",
            "Accuracy by confidence, before temperature scaling.",
            _bins,
        ),
        ("And after temperature scaling?", "accuracy, %", "Accuracy by confidence, after it.", _scaled_bins),
        ("When do they agree with the teacher?", "agreement, %", "Agreement by the student's confidence.", _near_bins),
    )
    for title, y, about, bins_of in pictures:
        bins = [bins_of(one["analysis"]) for one in judged]
        if any(bins):
            svg = pen.reliability(bins, "confidence, %", y)
            charts.append(chart(svg, title, f"{about} {dots}", _bins_text(bins, judged), legend))
    about = f"The last weights of {_count(len(judged))}, each the best of its group, judged again."
    return {"about": about, "charts": charts, "scaling": scaling, "agreement": agreement, "by_class": by_class}


def _count(number: int) -> str:
    return "one run" if number == 1 else f"{number} runs"


def _bins(analysis: dict[str, Any]) -> list[dict[str, Any]]:
    return list(analysis["calibration"]["before"]["bins"]) if analysis["calibration"] else []


def _scaled_bins(analysis: dict[str, Any]) -> list[dict[str, Any]]:
    return list(analysis["calibration"]["after"]["bins"]) if analysis["calibration"] else []


def _near_bins(analysis: dict[str, Any]) -> list[dict[str, Any]]:
    return list(analysis["evaluation"]["bins"]) if analysis["evaluation"] else []


def _bins_text(bins: Sequence[Sequence[dict[str, Any]]], judged: Sequence[dict[str, Any]]) -> str:
    return "; ".join(
        f"{_name(one)}: "
        + ", ".join(f"{percent(b['accuracy'], 0)} at {percent(b['confidence'], 0)}" for b in of if b["images"])
        for of, one in zip(bins, judged, strict=True)
    )


def _cells(figures: dict[str, float], shown: Sequence[dict[str, Any]]) -> list[str]:
    return [figure(figures.get(one["key"]), one["factor"], one["digits"]) for one in shown]
