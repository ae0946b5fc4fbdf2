"""Tries a planned build out: a part of the training images, in the views and batches that the build will have.

Shapes: M images, v views of them, C the teacher's classes, L labels a record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.pipeline.build import suspicions
from kdcache.pipeline.build.answers import answers, labels_in, teacher_renderer, view_parameters
from kdcache.pipeline.build.plan import BuildPlan
from kdcache.pipeline.build.source import Source
from kdcache.pipeline.data.split import describe_data
from kdcache.pipeline.process.progress import Progress
from kdcache.train.forecast.config import ForecastConfig

# How the time is divided: plain images, views, the bare teacher, the images alone.
_PLAIN, _VIEWS, _BARE, _IMAGES = 0.2, 0.55, 0.1, 0.15
_RUN = 32  # neighbours that are probed together: in a cache too, neighbours are of one class and compress together
_LOOKS = 0.25  # seconds between two looks at the clock, for which a GPU has to be waited for
_USUAL = 2000  # images
_KEPT = 2**24  # logits that are kept, at most: 64 MiB


@dataclass(frozen=True, eq=False)
class Probe:
    """What was found out about a build.

    logits: float32 [v, M, C] of views 0 to v - 1; labels: int64 [v, M, L], as records hold them. plain: how many
    images the teacher answered without augmentation; top1: its accuracy (0..1) on them, None without labels; chance:
    what answers at random would reach. notes: what looks odd about the answers, in words.
    rates, in images a second: build: of views, as a build answers them; evaluation: of plain images; teacher: the
    teacher alone; images: the views' pixels alone.
    """

    logits: Tensor
    labels: Tensor
    plain: int
    top1: float | None
    chance: float | None
    notes: list[str]
    rates: dict[str, float]
    seconds: float


class _Clock:
    """Counts images and the seconds that they take on a device, from the end of the first batches on.

    Those start worker processes and choose kernels, which a whole build does once.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        self._begun = self._looked = time.perf_counter()
        self._start: float | None = None
        self.images = 0
        self.elapsed = 0.0

    def warm(self) -> None:
        """What follows is counted."""
        self._wait()
        self._start = self._looked = time.perf_counter()

    def count(self, images: int) -> bool:
        """So many more images are under way; whether there is time for others."""
        if self._start is None:
            return True
        self.images += images
        if time.perf_counter() - self._looked < _LOOKS:
            return True
        self.stop()
        return self._looked - self._begun < self._seconds

    def stop(self) -> None:
        """Wait for what is under way."""
        assert self._start is not None
        self._wait()
        self._looked = time.perf_counter()
        self.elapsed = self._looked - self._start

    def rate(self) -> float:
        """Images a second."""
        return self.images / max(self.elapsed, 1e-9)

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def try_out(plan: BuildPlan, config: ForecastConfig, say: Callable[[str], None]) -> Probe:
    """Probe a build for about as long as is asked for.

    InputError where the teacher's answers give away that the cache would be wrong, as in a build (suspicions.py).
    """
    started = time.perf_counter()
    say(f"trying the teacher out, for about {config.seconds:g} s")
    plain = _Plain(plan, config).run()
    source = _part(plan, config.samples or _affordable(plan, plain.rate * config.seconds * _VIEWS))
    logits, labels, resident, build = _views(plan, source, config.seconds * _VIEWS)
    device, teacher = plan.source.teacher.device, plan.source.teacher
    bare = _timed(device, config.seconds * _BARE, ((len(resident), teacher.logits(resident)) for _ in repeat(None)))
    pixels = _timed(device, config.seconds * _IMAGES, _pixels(plan, source))
    rates = {"build": build, "evaluation": plain.rate, "teacher": bare, "images": pixels}
    return Probe(
        logits, labels, plain.images, plain.top1, plain.chance, plain.notes, rates, time.perf_counter() - started
    )


def _affordable(plan: BuildPlan, answers: float) -> int:
    """How many images can be tried in so many answers, in all views that are cut together; 2,000 at least."""
    most = _KEPT // plan.source.teacher.classes
    return max(_USUAL, min(int(answers), most) // plan.views_together)


def _part(plan: BuildPlan, most: int) -> Source:
    """The plan's source with whole batches of its training images, drawn in runs of neighbours."""
    source, samples = plan.source, len(plan.source.train)
    count = max(1, min(most, samples) // plan.batch) * plan.batch
    runs = -(-samples // _RUN)
    drawn = np.argsort(np.random.Philox(key=11).random_raw(runs), kind="stable")
    places = (drawn[:, None] * _RUN + np.arange(_RUN)).reshape(-1)
    chosen = np.sort(places[places < samples][:count])
    train = source.train.subset(chosen)
    identity = source.identity.model_copy(update={"data": describe_data(train, False)})
    return replace(source, train=train, train_labels=source.train_labels[chosen], identity=identity)


class _Plain:
    """What the teacher says to single images without augmentation, as a build asks it before it begins.

    rate: images a second. The other fields are as in Probe.
    """

    def __init__(self, plan: BuildPlan, config: ForecastConfig) -> None:
        self._plan, self._seconds = plan, config.seconds * _PLAIN
        images, most = len(plan.source.train), config.samples or _USUAL
        self._trial = suspicions.choose_trial(
            plan.source, lambda classes: max(min(suspicions.count_of(classes, images), most), 3 * plan.batch)
        )
        self.rate, self.images, self.notes = 0.0, 0, list[str]()
        self.top1: float | None = None
        self.chance: float | None = None

    def run(self) -> _Plain:
        source, teacher = self._plan.source, self._plan.source.teacher
        renderer = teacher_renderer(source.train, source, self._plan.workers)
        rendered = self._trial.rendered(source, renderer, self._plan.batch)
        clock, answered = _Clock(teacher.device, self._seconds), []
        with closing(_generator(rendered)) as images:
            first = next(images)
            suspicions.require_steady(teacher.logits, teacher.model, first, self._plan.identity.teacher.numeric)
            answered.append(teacher.logits(first).clone())
            clock.warm()
            for pixels in images:
                answered.append(teacher.logits(pixels).clone())
                if not clock.count(len(pixels)):
                    break
            clock.stop()
        renderer.close()
        # Data of one batch have nothing but that to be timed by.
        self.rate = clock.rate() if clock.images else 0.0
        self._examine(torch.cat([logits.cpu() for logits in answered]))
        return self

    def _examine(self, logits: Tensor) -> None:
        self.images = len(logits)
        samples, labels, names = (
            self._trial.samples[: self.images],
            self._trial.labels[: self.images],
            self._trial.names,
        )
        self.notes = suspicions.examine(logits, samples, labels, names, self._plan.allow_low_accuracy)
        if names:
            answered = suspicions.mapped_answers(logits, np.array(sorted(names), np.int64))
            found = suspicions.agreement(labels, answered)
            self.top1, self.chance = found.accuracy, found.expected


def _views(plan: BuildPlan, source: Source, seconds: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Logits and labels as in Probe, one batch of pixels as the teacher gets it, and the images a second."""
    rows, data, batch = range(len(source.train)), source.train, plan.batch
    renderer = teacher_renderer(data, source, plan.workers)
    clock, kept = _Clock(source.teacher.device, seconds), max(1, _KEPT // (len(rows) * source.teacher.classes))
    logits: dict[int, list[Tensor]] = {}
    labels: dict[int, Tensor] = {}
    more, first = True, 0
    with Progress("probe", len(rows) * plan.views, "records") as progress:
        while more and first < plan.views:
            numbers = range(first, min(first + plan.views_together, plan.views))
            drawn = [view_parameters(data, source.identity, view, rows) for view in numbers]
            starts = [0] * len(drawn)
            found = answers(source, renderer, source.train_labels, drawn, starts, rows, batch)
            with closing(_generator(found)) as stream:
                for number, answer in enumerate(stream, first * len(rows) // batch):
                    if first + answer.place < kept:
                        logits.setdefault(first + answer.place, []).append(answer.logits.clone())
                    progress.advance(len(answer.rows))
                    if number == len(drawn) - 1:
                        clock.warm()
                    elif not (more := clock.count(len(answer.rows))):
                        break
            for view, parameters in zip(numbers, drawn, strict=True):
                labels[view] = torch.from_numpy(labels_in(source.train_labels, parameters, rows))
            first = numbers.stop
    clock.stop()
    renderer.close()
    # A view that was cut off is left out where others are whole; otherwise all are as long as the shortest of them.
    lengths = {view: sum(map(len, some)) for view, some in logits.items()}
    views = sorted(view for view in lengths if lengths[view] == len(rows)) or sorted(lengths)
    shortest = min(lengths[view] for view in views)
    stacked = torch.stack([torch.cat(logits[view])[:shortest].cpu() for view in views])
    resident = next(renderer.batches(view_parameters(data, source.identity, 0, rows), [np.arange(batch)])).clone()
    renderer.close()
    with torch.inference_mode(False):
        return stacked.clone(), torch.stack([labels[v][:shortest] for v in views]), resident, clock.rate()


def _pixels(plan: BuildPlan, source: Source) -> Iterator[tuple[int, Any]]:
    """The images and the pixels of each batch of the views, without end."""
    data, rows, batch = source.train, range(len(source.train)), plan.batch
    renderer = teacher_renderer(data, source, plan.workers)
    drawn = [view_parameters(data, source.identity, view, rows) for view in range(plan.views_together)]
    batches: list[tuple[NDArray[np.int64], range]] = [
        (np.arange(i, i + batch), range(len(drawn))) for i in range(0, len(rows), batch)
    ]
    while True:
        for _, _, images in renderer.views(drawn, batches):
            yield len(images), images


def _timed(device: torch.device, seconds: float, work: Iterable[tuple[int, Any]]) -> float:
    """Images a second of work that goes on for as long as it is asked for."""
    clock = _Clock(device, seconds)
    with closing(_generator(work)) as stream:
        next(stream)
        clock.warm()
        for images, _ in stream:
            if not clock.count(images):
                break
    return clock.rate()


def _generator(of: Iterable[Any]) -> Any:
    yield from of
