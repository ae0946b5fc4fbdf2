"""What is to be told of several runs: how groups of them compare, how they learnt, and what the best of them answer.

Runs that differ only in their seed, and in where things lie, are one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdcache.cache.errors import KdcacheError
from kdcache.train.evaluate import examine_run
from kdcache.train.loop.runfolder import FREE
from kdcache.train.report.facts.compared import difference, estimate
from kdcache.train.report.facts.runs import Run

LOGGED = 300  # epochs at most in a curve; of more, every so many-th is taken, and the last one
_ALIKE = FREE | {"seed"}  # settings in which runs of one group may differ


@dataclass(frozen=True)
class Figure:
    """A figure by which runs are compared. up: whether more is better; None where neither is."""

    key: str
    title: str
    factor: float
    digits: int
    up: bool | None


FIGURES = (
    Figure("validation_top1", "validation top-1, %", 100, 2, True),
    Figure("top1", "top-1, %", 100, 2, True),
    Figure("nll", "NLL", 1, 4, False),
    Figure("ece", "ECE", 1, 4, False),
    Figure("agreement", "agreement, %", 100, 2, True),
    Figure("kl", "KL to the teacher", 1, 4, False),
    Figure("seconds_an_epoch", "seconds an epoch", 1, 1, None),
)
Groups = Mapping[str, Sequence[Run]]


def runs_facts(runs: Sequence[Run], judged: int, how: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """All facts of some runs.

    judged: the weights of so many of the best runs, each of another group, are judged again. how: what `examine_run`
    is told besides: the data, the registry, the device and the workers.
    """
    labels = labels_of([run.settings for run in runs])
    groups: dict[str, list[Run]] = {}
    for run, label in zip(runs, labels, strict=True):
        groups.setdefault(label, []).append(run)
    shown = [figure for figure in FIGURES if any(figure.key in run.figures for run in runs)]
    by = next((figure for figure in shown if figure.up is not None), None)
    ranked = _ranked(groups, by)
    several = by is not None and len([label for label in ranked if _values(groups[label], by)]) > 1
    return {
        "figures": [asdict(figure) for figure in shown],
        "by": by and asdict(by),
        "groups": [_means(label, groups[label], shown) for label in ranked],
        "differences": _differences(groups, ranked, shown) if several else [],
        "runs": [_told(run, label) for run, label in zip(runs, labels, strict=True)],
        "settings": _settings(runs, labels, ranked),
        "judged": [_judged(label, _best(groups[label], by), how, say) for label in ranked[:judged]] if by else [],
    }


# Groups


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that tell groups of runs apart: the loss's options by the loss's name, without places and seed."""
    found = {k: v for k, v in settings.items() if k not in _ALIKE and k != "loss_options"}
    options = settings.get("loss_options")
    if isinstance(options, dict):
        found |= {f"{settings.get('loss')}: {k}": v for k, v in options.items()}
    return found


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the settings in which some runs differ; an option of a loss only among runs with that loss."""
    flats = [flat(one) for one in settings]
    names = dict.fromkeys(name for one in flats for name in one)

    def values(name: str) -> set[str]:
        return {str(one.get(name)) for one in flats if name in one or ": " not in name}

    return sorted((name for name in names if len(values(name)) > 1), key=lambda name: (name != "loss", name))


def labels_of(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to call the group of each run: its loss and the settings in which it differs from others."""
    names = [name for name in differing(settings) if name != "loss"]
    found = []
    for one in map(flat, settings):
        parts = [f"{name.split(': ')[-1]} {_short(name, one[name])}" for name in names if name in one]
        found.append(", ".join([str(one.get("loss", "a run")), *parts]))
    return found


def _short(name: str, value: Any) -> str:
    return str(value)[:12] if name == "cache" else str(value)


def _values(runs: Sequence[Run], figure: Figure) -> dict[int, float]:
    """The figure of each run that has it, by seed; of runs with one seed, the last."""
    return {run.seed: run.figures[figure.key] for run in runs if figure.key in run.figures}


def _ranked(groups: Groups, by: Figure | None) -> list[str]:
    """The groups by their mean figure, the best first, and then those that have none."""

    def key(label: str) -> tuple[bool, float]:
        values = list(_values(groups[label], by).values()) if by else []
        if not values or by is None:
            return True, 0.0
        mean = estimate(values).mean
        return False, -mean if by.up else mean

    return sorted(groups, key=key)


def _best(runs: Sequence[Run], by: Figure) -> Run:
    having = [run for run in runs if by.key in run.figures] or list(runs)
    sign = 1 if by.up else -1
    return max(having, key=lambda run: sign * run.figures.get(by.key, 0.0))


def _means(label: str, runs: Sequence[Run], shown: Sequence[Figure]) -> dict[str, Any]:
    """Each figure's mean over the group's seeds, with its spread and interval."""
    found = {figure.key: list(_values(runs, figure).values()) for figure in shown}
    return {
        "group": label,
        "runs": len(runs),
        "failed": sum(run.failed is not None for run in runs),
        "figures": {key: {**asdict(estimate(values)), "values": values} for key, values in found.items() if values},
    }


def _differences(groups: Groups, ranked: Sequence[str], shown: Sequence[Figure]) -> list[dict[str, Any]]:
    """What the first group has more than each other one, over the seeds that both have."""
    first, found = ranked[0], []
    for other in ranked[1:]:
        figures = {}
        for figure in shown:
            one = difference(_values(groups[first], figure), _values(groups[other], figure))
            if one is not None and figure.up is not None:
                figures[figure.key] = asdict(one)
        found.append({"first": first, "other": other, "figures": figures})
    return found


def _settings(runs: Sequence[Run], labels: Sequence[str], ranked: Sequence[str]) -> dict[str, Any]:
    """The settings that all runs have in common, and of those that differ the value of each group."""
    names = differing([run.settings for run in runs])
    first = {label: flat(run.settings) for run, label in zip(reversed(runs), reversed(labels), strict=True)}
    common = {k: v for k, v in flat(runs[0].settings).items() if k not in names}
    # An option of a loss that not all runs have is not common to all.
    common = {k: v for k, v in common.items() if all(k in flat(run.settings) for run in runs)}
    return {
        "differing": [{"name": name, "values": [first[label].get(name) for label in ranked]} for name in names],
        "groups": list(ranked),
        "common": common,
    }


# Runs


def _told(run: Run, label: str) -> dict[str, Any]:
    return {
        "path": str(run.path),
        "group": label,
        "seed": run.seed,
        "state": run.state,
        "figures": run.figures,
        "lines": thinned(run.lines),
    }


def thinned(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most some 300 of the lines, with the last one."""
    step = -(-len(lines) // LOGGED) or 1
    found = list(lines[step - 1 :: step])
    return found if not lines or (found and found[-1] is lines[-1]) else [*found, lines[-1]]


def _judged(label: str, run: Run, how: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """What a run's last weights answer, or why that is not known."""
    about = {"group": label, "path": str(run.path), "seed": run.seed}
    try:
        found = examine_run(str(run.path), say=say, **how)
    except KdcacheError as e:
        return {**about, "missing": str(e)}
    return {**about, **found.facts()}
