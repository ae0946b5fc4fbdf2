"""What a page says first of a cache and of runs: a few sentences, made from the facts by fixed rules.

Each is (tone, text), where the tone is `good`, `plain` or `warn`. A text may hold foreign names; the page escapes it.
"""

from __future__ import annotations

from typing import Any

Sentence = tuple[str, str]
_LOW = 0.5  # of the probability: with less of it stored, a loss mostly learns from the modelled tail
_FLAT = 0.02  # of the greatest entropy: below, answers are almost as hard as labels
_SURE = 0.02  # between confidence and accuracy


def percent(rate: float, digits: int = 1) -> str:
    """A rate in 0..1 for people."""
    return f"{100 * rate:.{digits}f}%"


def of_cache(facts: dict[str, Any]) -> list[Sentence]:
    """Whether the teacher is good, whether what is stored is enough, and whether all of it is there."""
    return [*_teacher(facts), *_stored(facts), *_state(facts)]


def _teacher(facts: dict[str, Any]) -> list[Sentence]:
    found: list[Sentence] = []
    held, trained = facts["evaluation"], facts["training"]
    if held and "top1" in held:
        chance = 1 / facts["identity"]["record"]["classes"]
        weak = held["top1"] < 2 * chance
        text = f"The teacher is right on {percent(held['top1'])} of {held['images']:,} evaluation images"
        if trained and "top1" in trained:
            text += f", and on {percent(trained['top1'])} of the training views"
        found.append(("warn" if weak else "plain", text + (", which is near chance." if weak else ".")))
        apart = held["confidence"] - held["top1"]
        if abs(apart) > _SURE:
            how = "surer than it is right" if apart > 0 else "less sure than it could be"
            found.append(
                ("warn", f"It is {how}: its mean confidence is {percent(held['confidence'])} (ECE {held['ece']:.3f}).")
            )
        else:
            found.append(("good", f"Its confidence can be believed: the ECE is {held['ece']:.3f}."))
    if trained and trained["entropy"]["mean"] < _FLAT * trained["entropy"]["most"]:
        found.append(
            (
                "plain",
                "On training views its answers are almost as hard as labels (mean entropy "
                f"{trained['entropy']['mean']:.3f} nats): a higher temperature shows more of what it knows.",
            )
        )
    return found


def _stored(facts: dict[str, Any]) -> list[Sentence]:
    record = facts["identity"]["record"]
    if record["k"] is None:
        return [("good", f"All {record['classes']:,} classes are stored: nothing of the teacher's answers is lost.")]
    if not facts["mass"]:
        return []
    parts = [f"{percent(of['head'])} at T = {t}" for t, of in facts["mass"].items()]
    text = f"The {record['k']} stored of {record['classes']:,} classes hold {', '.join(parts)} of its probability"
    low = [t for t, of in facts["mass"].items() if of["head"] < _LOW]
    if not low:
        return [("good", f"{text}; the rest is a modelled tail.")]
    advice = f"at T = {', '.join(low)} a loss learns mostly from the modelled tail: take a lower temperature, or build"
    return [("warn", f"{text}. {advice[0].upper()}{advice[1:]} with a larger --topk.")]


def _state(facts: dict[str, Any]) -> list[Sentence]:
    views, under_way = len(facts["views"]), len(facts["under_way"])
    if not views:
        return [("warn", "No view is complete yet: the same kdcache build command goes on with it.")]
    if under_way:
        return [("warn", f"{views} views are complete, and {under_way} under way: kdcache build goes on with them.")]
    return []


def of_runs(facts: dict[str, Any]) -> list[Sentence]:
    """Which group of runs is best, by how much, and whether the seeds can tell."""
    groups, by = facts["groups"], facts["by"]
    if by is None:
        return [("warn", "No run has been evaluated yet.")]
    best = groups[0]["figures"][by["key"]]
    title = by["title"].removesuffix(", %")
    mean = f"{by['factor'] * best['mean']:.{by['digits']}f}{'%' if by['factor'] == 100 else ''}"
    seeds = f" on average of {best['n']} seeds" if best["n"] > 1 else ""
    if len(groups) == 1 or not facts["differences"]:
        return [("plain", f"{groups[0]['group']} reaches {title} {mean}{seeds}.")]
    second = facts["differences"][0]
    one = second["figures"].get(by["key"])
    if one is not None and one["estimate"]["mean"] == 0:
        return [("warn", f"{groups[0]['group']} and {second['other']} are equally good by {title}: {mean}{seeds}.")]
    found: list[Sentence] = [("good", f"{groups[0]['group']} is best by {title}: {mean}{seeds}.")]
    if one is None:
        return [*found, ("warn", f"It has no seed in common with {second['other']}, so the two cannot be paired.")]
    apart, low, high = (
        None if one["estimate"][k] is None else by["factor"] * one["estimate"][k] for k in ("mean", "low", "high")
    )
    text = f"It is {abs(apart or 0):.{by['digits']}f} {'points ' if by['factor'] == 100 else ''}"
    text += f"{'above' if (apart or 0) >= 0 else 'below'} {second['other']}"
    if low is None or high is None:
        return [
            *found,
            ("warn", f"{text}; with fewer than three seeds in common nobody can say whether that is chance."),
        ]
    text += f", seed by seed (95% interval {low:+.{by['digits']}f} to {high:+.{by['digits']}f})"
    if low <= 0 <= high:
        return [*found, ("warn", f"{text}: {one['estimate']['n']} seeds do not tell the two apart.")]
    return [*found, ("good", f"{text}.")]
