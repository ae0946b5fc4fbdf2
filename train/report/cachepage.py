"""What the page shows of a cache, made of its facts: texts, rows and charts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from kdcache.pipeline.info import ranges
from kdcache.pipeline.process.progress import size
from kdcache.train.report import words
from kdcache.train.report.charts import Pen
from kdcache.train.report.words import percent

_LISTED = 30  # classes with a bar each; of more, those at both ends
_ENDS = 9
_IN_TABLE = 20  # classes of a confusion matrix that is a table; a larger one is a picture
_PAIRS = 10
_BLUE = (59, 130, 246)  # which can be seen on light and on dark paper
View = dict[str, Any]


def cache_view(facts: dict[str, Any], anchor: str, pen: Pen) -> View:
    """All that the template of a cache needs."""
    identity, held, trained = facts["identity"], facts["evaluation"], facts["training"]
    missing, labelled = facts["missing"], held is not None and "top1" in held
    return {
        "facts": facts,
        "names": facts["names"],
        "anchor": anchor,
        "title": title(facts),
        "tiles": _tiles(facts),
        "verdict": words.of_cache(facts),
        "notes": {
            "teacher": [*_why_not(facts), *(missing[k] for k in ("evaluation", "training") if k in missing)],
            "images": [f"Images are not shown: {missing['images']}"] if "images" in missing else [],
            "stored": [missing["mass"]] if "mass" in missing else [],
            "about": [f"Who built it cannot be read: {missing['built']}"] if "built" in missing else [],
        },
        "figures": _figures(held, trained),
        "sampled": _sampled(trained),
        "reliability": _reliability(held, trained, pen),
        "entropy": _entropy(held, trained, pen),
        "per_class": per_class(held["per_class"]) if labelled else None,
        "confusions": confusions(held["confusions"], facts["names"]) if labelled else None,
        "stored": _stored(identity["record"]),
        "mass": [(t, of["head"], of["tail"]) for t, of in facts["mass"].items()],
        "ranks": _ranks(facts, pen),
        "gallery": [_shown(one, facts["names"]) for one in facts["gallery"]],
        "lists": _lists(facts),
        "about": _about(facts),
        "built": [_built(one) for one in facts["built"]],
        "identity": [(name, value) for name, value in _flat(identity) if value is not None],
    }


def title(facts: dict[str, Any]) -> str:
    """What to call a cache: its teacher or teachers, and the data."""
    identity = facts["identity"]
    who = f"{len(facts['members'])} teachers" if facts["members"] else identity["teacher"]["architecture"]
    return f"{who} on {identity['data']['name']}"


def _tiles(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    held, record = facts["evaluation"], facts["identity"]["record"]
    found = []
    if held and "top1" in held:
        found += [
            ("teacher's top-1", percent(held["top1"]), f"of {held['images']:,} evaluation images"),
            ("calibration error", f"{held['ece']:.3f}", f"ECE; NLL {held['nll']:.3f}"),
        ]
    if record["k"] is None:
        found.append(("stored", "all classes", f"{record['classes']:,}, {record['precision']}"))
    else:
        t, of = next(iter(facts["mass"].items()), (None, None))
        about = f"top {record['k']} of {record['classes']:,}, {record['precision']}"
        found.append(
            ("stored", percent(of["head"]) if of else f"top {record['k']}", f"at T = {t}: {about}" if of else about)
        )
    records = len(facts["views"]) * facts["samples"]
    under_way = f", {len(facts['under_way'])} under way" if facts["under_way"] else ""
    found.append(("views", f"{len(facts['views'])}", f"of {facts['samples']:,} samples{under_way}"))
    each = f"{facts['bytes'] / records:.1f} bytes a record" if records else "no record yet"
    found.append(("size", size(facts["bytes"]), f"{each}, {facts['store']}"))
    return found


def _why_not(facts: dict[str, Any]) -> list[str]:
    """Why accuracy is not told, where the records cannot say it."""
    record = facts["identity"]["record"]
    found = []
    if not record["labels"]:
        found.append("The cache was built without labels, so nothing can be said of accuracy.")
    if "target_gap" in record.get("lacks", ()):
        found.append("The cache was imported without the teacher's answers for the labels: accuracy is not told.")
    if facts["identity"]["views"].get("mixed"):
        found.append(
            "Training views are mixed of two images each, which have no one right answer: accuracy is told of the "
            "evaluation images alone."
        )
    if facts["temperature"] != 1:
        found.append(
            f"Temperature 1 is not stored: probabilities, NLL and ECE are at temperature {facts['temperature']:g}."
        )
    return found


def _figures(held: View | None, trained: View | None) -> View | None:
    rows = []
    keys = (("top1", 100, 2), ("top5", 100, 2), ("nll", 1, 4), ("ece", 1, 4), ("confidence", 100, 2))
    for name, of in (("evaluation images", held), ("training views", trained)):
        if of:
            cells = [f"{of['images']:,}", *(figure(of.get(key), factor, digits) for key, factor, digits in keys)]
            rows.append((name, [*cells, f"{of['entropy']['mean']:.4f}"]))
    for one in trained["of_views"] if trained and len(trained["of_views"]) > 1 else ():
        rows.append((f"view {one['view']}", ["", figure(one["top1"], 100, 2), "", "", "", "", f"{one['entropy']:.4f}"]))
    heads = ["answers", "top-1, %", "top-5, %", "NLL", "ECE", "mean confidence, %", "entropy, nats"]
    return {"heads": heads, "rows": rows} if rows else None


def figure(value: float | None, factor: float, digits: int) -> str:
    """A figure as it is shown, or a dash where there is none."""
    return "–" if value is None else f"{factor * value:.{digits}f}"


def _sampled(trained: View | None) -> str:
    """Which of the training records were read, where not all are of interest or could be."""
    if trained is None:
        return ""
    *first, last = map(str, [one["view"] for one in trained["of_views"]])
    which = f"Of the training views, {', '.join(first)} and {last} were read" if first else f"View {last} was read"
    if trained["parts"] < trained["of_parts"]:
        parts = f"{trained['parts']} of {trained['of_parts']} parts of each, drawn with seed {trained['seed']}"
        return f"{which}, {parts} ({percent(trained['share'])} of the samples)."
    return f"{which}, with all samples."


def chart(svg: str, title: str, about: str, alt: str, legend: Sequence[tuple[int | None, str]] = ()) -> View:
    """A chart with what stands around it. legend: colours by their place, None for the dashed line, and texts."""
    return {"svg": svg, "title": title, "about": about, "alt": alt, "legend": list(legend)}


def _named(held: View | None, trained: View | None, key: str) -> list[tuple[str, Any]]:
    both = (("evaluation images", held), ("training views", trained))
    return [(name, of[key]) for name, of in both if of is not None and key in of]


def _reliability(held: View | None, trained: View | None, pen: Pen) -> View | None:
    if not (found := _named(held, trained, "bins")):
        return None
    svg = pen.reliability([bins for _, bins in found], "confidence, %", "accuracy, %")
    about = (
        "Accuracy by confidence, in fifteen bins. A larger dot has more images; on the dashed line the two are equal."
    )
    alt = "; ".join(
        f"{name}: "
        + ", ".join(f"{percent(b['accuracy'], 0)} at {percent(b['confidence'], 0)}" for b in bins if b["images"])
        for name, bins in found
    )
    return chart(svg, "Can its confidence be believed?", about, alt, [(at, name) for at, (name, _) in enumerate(found)])


def _entropy(held: View | None, trained: View | None, pen: Pen) -> View | None:
    if not (found := _named(held, trained, "entropy")):
        return None
    counts = [of["counts"] for _, of in found]
    edges = np.linspace(0, found[0][1]["most"], len(counts[0]) + 1).tolist()
    shares = [[100 * c / max(1, sum(of)) for c in of] for of in counts]
    alt = "; ".join(f"{name}: {of['mean']:.3f} nats on average" for name, of in found)
    about = f"From 0, one class alone, to {found[0][1]['most']:.2f} nats, all classes alike."
    svg = pen.steps(shares, edges, "entropy, nats", "answers, %")
    return chart(svg, "How soft are its answers?", about, alt, [(at, name) for at, (name, _) in enumerate(found)])


def _ranks(facts: dict[str, Any], pen: Pen) -> View | None:
    found = [(name, of) for name, of in _named(facts["evaluation"], facts["training"], "ranks") if len(of) > 1]
    if not found:
        return None
    svg = pen.steps_up([[100 * p for p in of] for _, of in found], "most probable classes", "mass, %")
    at = [k for k in (1, 2, 5, 10, 20, 50) if k <= len(found[0][1])]
    alt = "; ".join(f"{name}: " + ", ".join(f"{percent(of[k - 1])} in {k}" for k in at) for name, of in found)
    at_t = f"at temperature {facts['temperature']:g}"
    about = f"The mean probability of so many classes together, {at_t}: what --topk would keep."
    return chart(svg, "How many classes matter?", about, alt, [(c, name) for c, (name, _) in enumerate(found)])


def per_class(found: dict[str, Any]) -> View:
    """Bars of the accuracy by class, the worst first; of very many classes those at both ends."""
    known = [
        (name, rate, f"{percent(rate)} of {images:,}")
        for name, rate, images in zip(found["names"], found["accuracy"], found["images"], strict=True)
        if rate is not None
    ]
    known.sort(key=lambda row: row[1])
    if len(known) <= _LISTED:
        return {"rows": known, "note": ""}
    low, high = known[len(known) // 4][1], known[3 * len(known) // 4][1]
    half = f"half of all have {percent(low)} to {percent(high)}"
    note = f"The {_ENDS} worst and the {_ENDS} best of {len(known):,} classes; {half}."
    return {"rows": [*known[:_ENDS], *known[-_ENDS:]], "note": note}


def confusions(found: dict[str, Any], names: Sequence[str]) -> View:
    """A confusion matrix as a table or a picture, and the largest confusions."""
    matrix = found["matrix"]
    view: View = {"rows": [], "names": names, "image": None}
    if matrix is not None and len(matrix) <= _IN_TABLE:
        for label, counts in enumerate(matrix):
            total = max(1, sum(counts))
            cells = [{"count": n, "share": n / total, "right": label == answer} for answer, n in enumerate(counts)]
            view["rows"].append({"name": names[label], "cells": cells})
    elif matrix is not None:
        view["image"] = _matrix_picture(np.array(matrix, np.float64))
    view["largest"] = [
        (names[one["label"]], names[one["prediction"]], one["images"]) for one in found["largest"][:_PAIRS]
    ]
    return view


def _matrix_picture(matrix: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    """A pixel a pair of classes, the less transparent the larger its share of the label's images."""
    shares = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = _BLUE
    pixels[..., 3] = np.sqrt(shares) * 255
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _stored(record: dict[str, Any]) -> str:
    if record["k"] is None:
        every = f"all {record['classes']:,} classes, in {record['precision']}"
        return f"Each record holds the answers for {every}. There is no tail."
    temperatures = ", ".join(f"{t:g}" for t in record["temperatures"])
    return (
        f"Each record holds the {record['k']} most probable of {record['classes']:,} classes and the label, in "
        f"{record['precision']}, and the mass of all others at temperatures {temperatures}."
    )


def _shown(one: dict[str, Any], names: Sequence[str]) -> View:
    """A sample of the gallery."""
    label = label_text(one["labels"], names)
    cells = []
    for cell in one["views"]:
        mixed, labels = "", one["labels"]
        if found := cell["mixed"]:
            theirs = label_text(found["labels"], names)
            mixed = (
                f"{percent(found['own'], 0)}, and {percent(found['theirs'], 0)} of sample {found['partner']} ({theirs})"
            )
            labels = [*labels, *found["labels"]]
        alt = f"Sample {one['sample']} in view {cell['view']}"
        cells.append({**cell, "mixed": mixed, "labels": labels, "alt": alt})
    share = one["easier"]
    head = (
        "An easy one"
        if share <= 0.1
        else "One in the middle"
        if share <= 0.5
        else "A hard one"
        if share <= 0.9
        else "A very hard one"
    )
    return {
        **one,
        "head": head,
        "label": label,
        "cells": cells,
        "small": _is_small(one),
        "alt": f"Sample {one['sample']}: {label}",
    }


def _is_small(one: dict[str, Any]) -> bool:
    return (one["image"] or "").startswith("data:image/png")


def label_text(labels: Sequence[int], names: Sequence[str]) -> str:
    """The names of a sample's labels."""
    return ", ".join(names[c] for c in labels) or "none"


def _lists(facts: dict[str, Any]) -> list[tuple[str, str, list[View]]]:
    """The hardest and the most ambiguous samples, each with what the teacher answers on average."""
    names, found = facts["names"], []
    mixed = facts["identity"]["views"].get("mixed")
    which = "of the evaluation images" if mixed else "of the training images"
    seen = "" if mixed else ", on average of the views that were read"
    heads = {
        "hardest": (
            f"The hardest {which}",
            f"The label has the least probability{seen}. Wrong labels are found here.",
        ),
        "ambiguous": (
            f"The most ambiguous {which}",
            f"The teacher is least sure: its answers have the greatest entropy{seen}.",
        ),
    }
    for key, (head, about) in heads.items():
        rows = []
        for one in facts[key]:
            label = label_text(one["labels"], names)
            value = f"NLL {one['nll']:.2f}" if key == "hardest" else f"entropy {one['entropy']:.2f}"
            text = f"sample {one['sample']}, label {label}, {value}"
            rows.append(
                {**one, "text": text, "small": _is_small(one), "alt": f"Sample {one['sample']}, labelled {label}"}
            )
        if rows:
            found.append((head, about, rows))
    return found


def _about(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What people ask of a cache, in their words."""
    i = facts["identity"]
    teacher, data, views = i["teacher"], i["data"], i["views"]
    found = [
        ("key", facts["key"]),
        ("data", f"{data['name']}: {data['samples']:,} training and {i['evaluation']['samples']:,} evaluation images"),
    ]
    if facts["members"]:
        for one in facts["members"]:
            here = "" if one["here"] else ", not under KDCACHE_HOME"
            found.append(("member", f"{one['key'][:12]} with weight {one['weight']:g}{here}"))
    else:
        found.append(("teacher", f"{teacher['architecture']}, {teacher['input_size']} pixels, {teacher['numeric']}"))
        found.append(("teacher's weights", teacher["weights"]))
    sequence = ", spread evenly" if views.get("sequence") else ""
    found.append(("view policy", f"{views['policy']}, seed {views['seed']}{sequence}"))
    state = ranges(facts["views"]) if facts["views"] else "none"
    found.append(
        ("complete views", state + (f"; under way: {ranges(facts['under_way'])}" if facts["under_way"] else ""))
    )
    if lacks := i["record"].get("lacks"):
        words_of = {"evaluation": "the evaluation split's answers", "target_gap": "the answers for the labels"}
        found.append(("lacks", ", ".join(words_of[one] for one in lacks)))
    found.append(("on disk", f"{size(facts['bytes'])} as {facts['store']}"))
    return found


def _built(one: dict[str, Any]) -> View:
    rest = {k: v for k, v in one.items() if k not in ("views", "first", "last", "command")}
    return {
        "views": ranges(one["views"]).removeprefix("views ").removeprefix("view "),
        "first": one["first"],
        "last": one["last"],
        "command": one.get("command", "not known"),
        "rest": ", ".join(f"{name} {value}" for name, value in rest.items()),
    }


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for name, of in value.items() for pair in _flat(of, f"{prefix}.{name}" if prefix else name)]
