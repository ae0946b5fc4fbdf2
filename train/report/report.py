"""`kdcache report`: one page of HTML about caches, runs and sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kdcache.cache.errors import InputError, KdcacheError, NotFoundError
from kdcache.cache.files import is_folder, read_range, replace_file
from kdcache.cache.identity import SplitName
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.answers import teacher_top1
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process.progress import size
from kdcache.pipeline.stores import Stored, open_store
from kdcache.train.plan.resuming import exists
from kdcache.train.report.config import ReportConfig
from kdcache.train.report.facts.caches import Samples, cache_facts
from kdcache.train.report.facts.groups import runs_facts
from kdcache.train.report.facts.pictures import class_names, gallery, images_in, listed, open_images, told_of
from kdcache.train.report.facts.runs import Run, runs_in
from kdcache.train.report.page import MARK, page

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass
class Subjects:
    """What is reported on."""

    caches: list[Stored] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


def report(config: ReportConfig, say: Say) -> tuple[dict[str, Any], str]:
    """Write the page: facts for programs, and text for people.

    InputError or NotFoundError for what is no cache and no run, and for a place where no page can be written.
    """
    out, subjects = _place(config.out), _subjects(config)
    caches = [_cache(stored, config.data, say) for stored in subjects.caches]
    runs = _runs(subjects.runs, config, say) if subjects.runs else None
    content = page(caches, runs)
    replace_file(out, content)
    facts = {
        "path": str(out),
        "bytes": len(content),
        "caches": [_without_pictures(one) for one in caches],
        "runs": runs,
    }
    counted = [_counted(len(caches), "cache"), _counted(len(subjects.runs), "run")]
    return facts, f"{out}: {' and '.join(filter(None, counted))}, {size(len(content))}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}" if number else ""


def _place(out: str) -> Path:
    """Where to write the page; InputError where that is no file, or a file that is no report."""
    path = Path(out)
    if path.is_dir():
        raise InputError(f"--out {out} is a folder, not a file")
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}: the page is an HTML file, whose name ends in .html")
    if not path.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {path.parent}")
    if path.exists() and read_range(path, 0, len(MARK), short=True) != MARK:
        raise InputError(f"--out {out} is there already and is no report: give another name")
    return path


def _subjects(config: ReportConfig) -> Subjects:
    found = Subjects()
    for what in dict.fromkeys(config.what):
        path = Path(what)
        if is_folder(path) and not (path / "identity.json").exists():
            if not (runs := runs_in(path)):
                raise NotFoundError(
                    f"{what} holds neither a cache nor a run: give a run folder, a sweep's folder or a cache"
                )
            found.runs += [run for run in runs if run.path not in [one.path for one in found.runs]]
        elif path.suffix == ".safetensors":
            raise InputError(f"{what} is a file of weights: give the run's folder, {path.parent}")
        else:
            found.caches.append(open_store(what, config.registry))
    return found


# Caches


def _cache(stored: Stored, data: str | None, say: Say) -> dict[str, Any]:
    """All facts of a cache, with pictures where its images are at hand.

    Images that were named with --data have to be the cache's. Where nothing was named, and none are found, the facts
    say why.
    """
    say(f"reading cache {stored.key[:12]}")
    images, reason = _images(stored, data)
    names = class_names(stored, images)
    facts, samples = cache_facts(stored, names)
    facts |= {"names": names, "hardest": [], "ambiguous": [], "gallery": []}
    if reason:
        facts["missing"]["images"] = reason
    facts |= _listed(stored, samples, data, facts["missing"])
    if images is not None and "train" in samples:
        facts["gallery"] = (
            _shown(lambda: gallery(stored, samples["train"], images_in(stored, images)), facts["missing"]) or []
        )
    for what in ("evaluation", "training", "images"):
        if what in facts["missing"]:
            say(f"note: {facts['missing'][what]}")
    return facts


def _images(stored: Stored, data: str | None) -> tuple[Dataset | None, str | None]:
    try:
        return open_images(stored, data), None
    except KdcacheError as e:
        if data is not None:
            raise
        return None, str(e)


def _listed(
    stored: Stored, samples: dict[SplitName, Samples], data: str | None, missing: dict[str, str]
) -> dict[str, Any]:
    """The lists of samples; without pictures where they cannot be had."""
    split = told_of(stored)
    if split not in samples:
        return {}
    if "images" not in missing:
        found = _shown(
            lambda: listed(stored, samples[split], images_in(stored, open_images(stored, data, split))), missing
        )
        if found:
            return found
    return listed(stored, samples[split], None)


def _shown(pictures: Callable[[], T], missing: dict[str, str]) -> T | None:
    try:
        return pictures()
    except KdcacheError as e:
        missing["images"] = str(e)
        return None


def _without_pictures(facts: dict[str, Any]) -> dict[str, Any]:
    """A cache's facts for programs."""
    plain = {k: v for k, v in facts.items() if k not in ("gallery", "names")}
    for key in ("hardest", "ambiguous"):
        plain[key] = [{k: v for k, v in one.items() if k != "image"} for one in facts[key]]
    return plain


# Runs


def _runs(runs: Sequence[Run], config: ReportConfig, say: Say) -> dict[str, Any]:
    """All facts of runs, with their teacher's figures and steps an epoch where one cache tells them for all runs."""
    how = {"data": config.data, "registry": config.registry, "device": config.device, "workers": config.workers}
    facts = runs_facts(runs, config.judge, how, say)
    teacher, steps = None, None
    keys = {str(run.settings.get("cache")) for run in runs}
    place = runs[0].settings.get("cache_path")
    if len(keys) == 1 and isinstance(place, str) and exists(place):
        try:
            cache = open_store(place, config.registry)
            teacher = {"top1": teacher_top1(cache)} if isinstance(cache, Cache) else None
            steps = _steps(runs, cache.identity.data.samples)
        except KdcacheError as e:
            say(f"note: the runs' cache cannot be read: {e}")
    return {**facts, "teacher": teacher, "steps": steps}


def _steps(runs: Sequence[Run], samples: int) -> int | None:
    """How many updates an epoch has in every run; None where they differ, or images were held out."""
    found = set()
    for run in runs:
        batch, accumulate = (run.settings.get(name) for name in ("batch_size", "accumulate"))
        if not isinstance(batch, int) or not isinstance(accumulate, int) or run.settings.get("validation"):
            return None
        if batch < 1 or accumulate < 1:
            return None
        found.add(-(-(samples // batch) // accumulate))
    return found.pop() if len(found) == 1 else None
