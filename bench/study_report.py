"""What the study found: statistics and the tables of docs/study.md, from the results of the runs alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from study_head import DENSE, KS, TAILS
from study_protocol import (
    EPOCHS,
    MARGIN,
    ONLINE_BDKD,
    TOPK,
    TOPK_NKDS,
    VIEWS,
    Chosen,
    Results,
    Run,
    best,
    choose,
    group,
    loss_of,
    recipe_runs,
    weight_runs,
    with_tail,
)

from kdcache.pipeline.process.progress import duration, size

# Name in the results, heading, factor, digits.
METRICS = (("top1", "top-1, %", 100, 2), ("nll", "NLL", 1, 4), ("ece", "ECE", 1, 4))
MORE = (*METRICS, ("agreement", "agreement, %", 100, 2), ("kl", "KL", 1, 4))
EXACT = "float32"
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
    from scipy.stats import t as student_t  # slow

    deviation = statistics.stdev(values)
    half = float(student_t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(statistics.fmean(values), n, deviation, half)


class Seeded(Protocol):
    """A run of one seed, under its name among the results."""

    @property
    def name(self) -> str: ...

    @property
    def seed(self) -> int: ...


def by_seed(results: Results, runs: Sequence[Seeded], metric: str) -> dict[int, float]:
    """Of the runs that are done, on the test images."""
    return {run.seed: results[run.name]["test"][metric] for run in runs if run.name in results}


def differences(results: Results, runs: Sequence[Seeded], others: Sequence[Seeded], metric: str) -> list[float]:
    """Those of the seeds that both have, in the order of seeds."""
    a, b = by_seed(results, runs, metric), by_seed(results, others, metric)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


# What is compared


@dataclass(frozen=True)
class Section:
    """Runs by label, a run a seed; and which labels are compared pair by pair."""

    runs: Mapping[str, Sequence[Seeded]]
    pairs: Sequence[tuple[str, str]]


def sections(chosen: Chosen) -> dict[str, Section]:
    every = {name: group(name, chosen) for name in ("core", "views", "losses", "topk", "small")}
    every["views"] = every["views"] + group("more", chosen)

    def where(name: str, **has: Any) -> list[Run]:
        return [
            run for run in every[name] if isinstance(run, Run) and all(getattr(run, k) == v for k, v in has.items())
        ]

    named = {"ce": "ce", "kd": chosen.kd, "nkd": chosen.nkd}
    core = {label: where("core", loss=loss) for label, loss in named.items()}
    small = {label: where("small", loss=loss) for label, loss in named.items()}
    pairs = [("kd", "ce"), ("nkd", "ce"), ("nkd", "kd")]
    views = {f"V = {v}": where("views", views=v) for v in VIEWS}
    views[f"V = {EPOCHS}"] = core["nkd"] + where("views", views=EPOCHS, records="dense", online=False)
    of_exact = [(label, EXACT) for label in views]
    views[EXACT] = where("views", records="exact")
    of_online = [(label, "online") for label in views]
    views["online"] = where("views", online=True)
    others = dict.fromkeys(run.loss for run in where("losses", online=False))
    losses = core | {loss: where("losses", loss=loss, online=False) for loss in others}
    losses["bdkd, online"] = where("losses", loss=ONLINE_BDKD, online=True)
    topk, of_dense = {}, []
    for nkd in TOPK_NKDS:
        at = f"T = {loss_of(nkd).temperature:g}"
        topk[f"{at}, dense"] = where("topk", loss=nkd)
        for tail in TAILS:
            topk[f"{at}, {tail}"] = where("topk", loss=with_tail(nkd, tail))
            of_dense.append((f"{at}, {tail}", f"{at}, dense"))
    return {
        "core": Section(core, pairs),
        "views": Section(views, of_online + of_exact),
        "losses": Section(losses, [(label, "ce") for label in losses if label != "ce"]),
        "topk": Section(topk, of_dense),
        "small": Section(small, pairs),
    }


def head_values(results: Results, part: str = "kl") -> dict[str, list[float]]:
    """KL by head, or its part among the `others`, over seeds in their order."""
    found = [results[head.name][part] for head in group("imagenet", Chosen()) if head.name in results]
    return {name: [kl[name] for kl in found] for name in (found[0] if found else {})}


def over_dense(values: dict[str, list[float]], name: str) -> list[float]:
    """A head's differences to the one of dense records, seed by seed."""
    return [a - b for a, b in zip(values[name], values[DENSE], strict=True)]


# Tables


def plain(value: Estimate, factor: float, digits: int) -> str:
    spread = "" if value.deviation is None else f" ± {factor * value.deviation:.{digits}f}"
    return f"{factor * value.mean:.{digits}f}{spread}"


def signed(values: Sequence[float], factor: float, digits: int) -> str:
    """Mean and interval; of one or two values themselves, as two have an interval of 9 times their distance."""
    if len(values) < 3:
        return ", ".join(f"{factor * value:+.{digits}f}" for value in values)
    found = estimate(values)
    return f"{factor * found.mean:+.{digits}f} ({factor * found.low:+.{digits}f} to {factor * found.high:+.{digits}f})"


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
            rows.append([f"{a} - {b}", str(n), *(signed(values, f, d) for values, f, d in found)])
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
        f"`{chosen.nkd}` (a bare name has the settings of [Losses](losses.md) for CIFAR-100)."
    )


def teacher_table(results: Results, build: str = "build-dense") -> str:
    if build not in results:
        return NOT_YET
    parts = {"held out": "held_out", "test": "test"}
    rows = [
        [label, *(f"{f * results[build][part][m]:.{d}f}" for m, _, f, d in METRICS)] for label, part in parts.items()
    ]
    return markdown(["images", *(heading for _, heading, *_ in METRICS)], rows)


def heads_table(results: Results, part: str) -> str:
    found = head_values(results, part)
    if not found:
        return NOT_YET

    def cell(name: str) -> str:
        return f"{plain(estimate(found[name]), 1, 3)}; {signed(over_dense(found, name), 1, 3)}"

    rows = [[f"K = {k}", *(cell(f"{k} {tail}") for tail in TAILS)] for k in KS]
    whole, none = (plain(estimate(found[name]), 1, 3) for name in (DENSE, "ce"))
    text = f"Dense: {whole}; no teacher (`ce`): {none}; {len(found[DENSE])} divisions of the images."
    return markdown(["", *TAILS], rows) + f"\n\n{text}"


def verdict(results: Results, section: Section) -> str:
    """Which V have been shown to equal float32 records, and whether those equal the teacher in the loop."""
    words: dict[bool, list[str]] = {True: [], False: []}
    for a, b in section.pairs:
        if b == EXACT and len(values := differences(results, section.runs[a], section.runs[b], "top1")) > 2:
            found = estimate(values)
            words[-MARGIN < found.low and found.high < MARGIN].append(a)
    if not any(words.values()):
        return NOT_YET
    equal, other = (", ".join(words[key]) or "none" for key in (True, False))
    online = {run.seed: run.name for run in section.runs["online"]}
    pairs = [(run.name, online[run.seed]) for run in section.runs[EXACT] if run.seed in online]
    both = [(results[a], results[b]) for a, b in pairs if {a, b} <= results.keys()]
    same = sum(a["weights"] == b["weights"] for a, b in both)
    return (
        f"With {EXACT} records {same} of {len(both)} students end with the very weights, bit by bit, that the "
        "teacher in the loop gives.\n\n"
        f"Equal to {EXACT} within {100 * MARGIN:g} point: {equal}. Not shown to be: {other}."
    )


def mass_text(results: Results) -> str:
    if "build-top3" not in results:
        return NOT_YET
    parts = (f"{100 * float(mass):.1f}% at T = {float(t):g}" for t, mass in results["build-top3"]["mass"].items())
    return f"The teacher's top {TOPK} classes hold on average {', '.join(parts)} of its probability."


def cost_table(results: Results, chosen: Chosen | None) -> str:
    """Seconds on the clock and of all cores; and after how many students the cache has paid."""
    caches = {"dense": "build-dense", EXACT: "build-exact", "top 3": "build-top3"}
    stages = {"teach": "teach", **{f"build, {label}": name for label, name in caches.items()}}
    jobs = {label: [results[name]] for label, name in stages.items() if name in results}
    if chosen:
        of = sections(chosen)
        kinds = {**of["losses"].runs, "nkd, online": of["views"].runs["online"]}
        done = {label: [results[run.name] for run in runs if run.name in results] for label, runs in kinds.items()}
        jobs |= {label: found for label, found in done.items() if found}
    if not jobs:
        return NOT_YET

    def median(label: str, key: str) -> float:
        return statistics.median(job[key] for job in jobs[label])

    keys = ("seconds", "cpu_seconds", "training_seconds")
    rows = [
        [label, str(len(some)), *(duration(median(label, key)) if key in some[0] else "" for key in keys)]
        for label, some in jobs.items()
    ]
    text = []
    if {"nkd", "nkd, online", "build, dense"} <= jobs.keys():
        saved = median("nkd, online", "cpu_seconds") - median("nkd", "cpu_seconds")
        spent = median("build, dense", "cpu_seconds")
        paid = f"after {spent / saved:.2f} students" if saved > 0 else "never"
        text.append(f"By core-seconds the dense cache pays for itself {paid}.")
    text += [
        f"The {label} cache takes {size(results[name]['bytes'])}." for label, name in caches.items() if name in results
    ]
    machines = sorted({f"{job['processor']}, torch {job['torch']}" for some in jobs.values() for job in some})
    head = ["", "runs", "median on the clock", "of core-seconds", "of the training alone"]
    return f"{markdown(head, rows)}\n\n{' '.join(text)} Measured on {'; '.join(machines)}."


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
        "views-verdict": verdict(results, of["views"]),
        "mass": mass_text(results),
        "imagenet": heads_table(results, "kl"),
        "imagenet-others": heads_table(results, "others"),
        "cost": cost_table(results, chosen),
    }


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with each part between its marks, <!-- NAME --> and <!-- /NAME -->; ValueError where one is missing."""
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page has not one place for {name}")
        before, rest = page.split(begin)
        page = f"{before}{begin}{text}\n{end}{rest.split(end)[1]}"
    return page


def summary(results: Results) -> dict[str, Any]:
    """Means and paired differences as numbers, on the test images."""
    out: dict[str, Any] = {}
    for part in ("kl", "others"):
        if heads := head_values(results, part):
            out[f"imagenet-{part}"] = {name: vars(estimate(values)) for name, values in heads.items()}
    if (chosen := choose(results)) is None:
        return out
    return out | {name: numbers(results, section) for name, section in sections(chosen).items()}


def numbers(results: Results, section: Section) -> dict[str, Any]:
    """A section's means and paired differences, of what is done."""
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
    return {"means": {k: v for k, v in means.items() if v}, "pairs": {k: v for k, v in pairs.items() if v}}


def write_json(results: dict[str, Any], head: dict[str, Any], found: dict[str, Any], out: Path) -> None:
    """Protocol, summary and jobs, a line a job."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{{"protocol": {json.dumps(head)},\n"summary": {json.dumps(found)},\n"jobs": {{\n{lines}\n}}}}\n')


def write_report(results: dict[str, Any], protocol: dict[str, Any], out: Path, page: Path) -> None:
    """The results as JSON, and the page's tables."""
    write_json(results, protocol, summary(results), out)
    page.write_text(filled(page.read_text(), tables(results)))
