"""The tables of docs/study-views.md, from the results of study_again.py alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import study
import study_again as again
from study_protocol import EPOCHS, SMALL_STUDENT, STUDENT, TEACHER, TEACHER_EPOCHS
from study_report import (
    NOT_YET,
    Section,
    by_seed,
    differences,
    estimate,
    filled,
    markdown,
    means_table,
    numbers,
    pairs_table,
    plain,
    signed,
    teacher_table,
    write_json,
)

Results = Mapping[str, Mapping[str, Any]]
PLOTS = {
    "spread": "Top-1 by the number of views, random and spread",
    "strong": "Top-1 by views and loss",
}
KINDS = {again.STRONG[0]: "plain", again.STRONG[1]: "trivial", again.STRONG[2]: "mixed"}
BASE = again.NKD


def where(group: str, **has: Any) -> list[again.Student]:
    runs = again.GROUPS[group]
    return [run for run in runs if isinstance(run, again.Student) and all(getattr(run, k) == v for k, v in has.items())]


def sections() -> dict[str, Section]:
    first = {"cache": again.PLAIN, "online": False}
    core = {label: where("core", loss=loss, **first) for label, loss in again.LOSSES.items()}
    core["nkd, float32"] = where("core", cache=again.EXACT)
    core["nkd, online"] = where("core", online=True)
    learnt = [("kd", "ce"), ("nkd", "ce"), ("nkd", "kd"), ("nkd", "nkd, online"), ("nkd, float32", "nkd, online")]

    views = {f"V = {v}": where("views", views=v) for v in again.FEW} | {f"V = {EPOCHS}": core["nkd"]}
    online = {"online": core["nkd, online"]}

    spread = {
        f"{v} {cache.sequence}": where("spread", views=v, cache=cache)
        for v in again.VIEWS
        for cache in (again.PLAIN, again.SPREAD)
    }
    equal = [(f"{v} spread", f"{v} random") for v in again.VIEWS]
    doubled = [(f"{v} spread", f"{2 * v} random") for v in again.VIEWS[:-1]]

    strong = {
        f"{loss}, {kind}": where("strong", loss=spec, cache=again.Cache(augment))
        for augment, kind in KINDS.items()
        for loss, spec in again.LOSSES.items()
    }
    gains = [(f"{loss}, {kind}", f"ce, {kind}") for kind in KINDS.values() for loss in ("kd", "nkd")]
    by_views = [(f"{loss}, {kind}", f"{loss}, plain") for loss in again.LOSSES for kind in [*KINDS.values()][1:]]

    presets = {label_of(spec): where("presets", loss=spec) for spec in again.PRESETS}
    return {
        "core": Section(core, learnt),
        "views": Section(views | online, [(label, "online") for label in views]),
        "spread": Section(spread, equal + doubled),
        "strong": Section(strong, gains + by_views),
        "presets": Section(presets, [(label, label_of(BASE)) for label in presets if label != label_of(BASE)]),
    }


def label_of(spec: str) -> str:
    gamma, temperature = (part.split("=")[1] for part in spec.split(":")[1].split(","))
    return f"gamma {gamma}, T = {temperature}"


def thrives(results: Results) -> str:
    """By how much more a teacher helps in stronger views than in plain ones: differences of differences, by seed."""
    runs = sections()["strong"].runs
    rows = []
    for kind in [*KINDS.values()][1:]:
        for loss in ("kd", "nkd"):

            def gain(of: str, loss: str = loss) -> dict[int, float]:
                with_teacher, without = (by_seed(results, runs[f"{name}, {of}"], "top1") for name in (loss, "ce"))
                return {seed: with_teacher[seed] - without[seed] for seed in with_teacher.keys() & without.keys()}

            strong, weak = gain(kind), gain("plain")
            if both := sorted(strong.keys() & weak.keys()):
                found = [strong[seed] - weak[seed] for seed in both]
                rows.append([f"{loss} - ce, {kind} beside plain", str(len(both)), signed(found, 100, 2)])
    return markdown(["", "seeds", "top-1, points"], rows) if rows else NOT_YET


def beside_before(results: Results, before: Mapping[str, Any]) -> str:
    """The first study's differences beside today's."""
    core = sections()["core"]
    names = {"kd - ce": "core", "nkd - ce": "core", "nkd - kd": "core", "V = 20 - online": "views"}
    today = {"V = 20 - online": ("nkd", "nkd, online")}
    rows = []
    for name, of in names.items():
        a, b = today.get(name) or name.split(" - ")
        if values := differences(results, core.runs[a], core.runs[b], "top1"):
            old = before[of]["pairs"][name]["top1"]
            low, high = old["mean"] - old["half"], old["mean"] + old["half"]
            shown = f"{100 * old['mean']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
            rows.append([name, shown, signed(values, 100, 2)])
    return markdown(["top-1, points", "taught on the cache's views", "on views of its own"], rows) if rows else NOT_YET


def same_weights(results: Results) -> tuple[int, int]:
    """How many students from float32 records have the weights that the teacher in every step gives, and of how many."""
    runs = sections()["core"].runs
    cached, online = (
        {run.seed: results[run.name]["weights"] for run in runs[f"nkd, {how}"] if run.name in results}
        for how in ("float32", "online")
    )
    seeds = cached.keys() & online.keys()
    return sum(cached[seed] == online[seed] for seed in seeds), len(seeds)


def exact(results: Results) -> str:
    same, pairs = same_weights(results)
    return (
        "From float32 records a student ends with the very weights, bit by bit, that the teacher in every step gives, "
        f"in {same} of {pairs} seeds."
    )


def heads_table(results: Results) -> str:
    """Heads by classes and preset: top-1 and KL, and the paired difference to gamma 1.5 at T = 1."""
    rows = []
    for classes in again.CLASSES:
        mine = [run for run in again.GROUPS["heads"] if isinstance(run, again.Heads) and run.classes == classes]
        found = [results[run.name]["presets"] for run in mine if run.name in results]
        for spec in ("ce", *again.PRESETS) if found else ():
            top1 = [one[spec]["top1"] for one in found]
            kl = [one[spec]["kl"] for one in found]
            lost = [one[spec]["top1"] - one[BASE]["top1"] for one in found]
            label = spec if spec == "ce" else label_of(spec)
            beside = "-" if spec == BASE else signed(lost, 100, 2)
            rows.append([str(classes), label, plain(estimate(top1), 100, 2), beside, plain(estimate(kl), 1, 3)])
    heads = ["classes", "loss", "top-1, %", f"beside {label_of(BASE)}, points", "KL to the teacher"]
    return markdown(heads, rows) if rows else NOT_YET


def tables(results: Results, before: Mapping[str, Any]) -> dict[str, str]:
    of = sections()
    return {
        "teacher": teacher_table(results, again.PLAIN.name),
        "before": beside_before(results, before),
        **{name: means_table(results, section) for name, section in of.items()},
        **{f"{name}-pairs": pairs_table(results, section) for name, section in of.items()},
        "exact": exact(results),
        "thrives": thrives(results),
        "heads": heads_table(results),
    }


def write(results: dict[str, Any], out: Path, docs: Path) -> None:
    """The results as JSON, the page's tables and its plots."""
    before = json.loads(study.RESULTS.read_text())["summary"]
    protocol = {
        "teacher": TEACHER, "teacher_epochs": TEACHER_EPOCHS, "student": STUDENT, "small_student": SMALL_STUDENT,
        "epochs": EPOCHS, "lr": again.LR, "weight_decay": again.DECAY,
    }  # fmt: skip
    write_json(results, protocol, {name: numbers(results, section) for name, section in sections().items()}, out)
    page, parts = docs / "study-views.md", tables(results, before)
    for name, text in PLOTS.items():
        if parts[name] != NOT_YET:
            from study_again_plots import draw  # matplotlib is an extra

            draw(name, results, docs / "study")
            parts[name] = f"![{text}](study/{name}.png)\n\n{parts[name]}"
    page.write_text(filled(page.read_text(), parts))
