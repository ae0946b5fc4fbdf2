"""Measures steps, epochs, builds and reading, of one teacher and student on one part of the data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.answers import teacher_renderer, view_parameters
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import VIEWS_PER_DECODE, BuildConfig
from kdcache.pipeline.build.source import Source
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.teachers.networks import built_for
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train.bench.config import BenchConfig
from kdcache.train.bench.layouts import noise_cache, reading_cases
from kdcache.train.bench.subject import build_batch_of
from kdcache.train.bench.timing import Clock, Onward, endless
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import OnlineLoader
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import Loader, Training, fit, new_classifier
from kdcache.train.losses import CE, Loss
from kdcache.train.losses.options import make_loss, options_of
from kdcache.train.losses.prepare import prepared, require_served

READ_RECORDS, FKD_IMAGES, READ_BATCH = 65_536, 200, 1024
_RATE = 1e-3  # small, so that no loss grows: time does not depend on it
# How many seconds a comparison takes, about, and how many rounds at least, unless the settings say.
_STEPS, _EPOCHS, _BUILDS, _READINGS = (30.0, 10), (20.0, 3), (20.0, 3), (8.0, 3)


class Bench:
    """The parts of one run, which share a cache, a student and its optimiser."""

    def __init__(
        self,
        config: BenchConfig,
        source: Source,
        whole: int,
        folder: Path,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.source, self.folder, self.device, self.say = config, source, folder, device, say
        self._clock = Clock(device, config.rounds)
        self.whole, self.samples = whole, len(source.train)
        self.defaults, record = source.defaults, source.identity.record
        self.batch = config.batch_size or self.defaults.train_batch
        self.build_batch = build_batch_of(config, self.defaults, self.samples, source.teacher)
        self.loss = make_loss(config.loss, record.classes)
        require_served(self.loss, record)
        self.student = config.student or self.defaults.student
        own = config.image_size or built_for(self.student)
        self.size = own or source.train.image_size or source.teacher.input_size
        self.model = new_classifier(
            self.student, record.classes, self.size, source.train, device, seed=0, whose="the teacher for"
        )
        self.recipe = Recipe(epochs=1, lr=_RATE, amp=config.amp, compile=config.compile)

    def run(self) -> dict[str, Any]:
        """All figures, and the settings that they hold for."""
        setup = self._setup()
        self.say(
            f"{setup['teacher']} -> {self.student} on {self.config.data} ({self.samples:,} of {self.whole:,} samples), "
            f"batches of {self.batch} on {self.device}"
        )
        building = self.building()
        cache = Cache(self.folder / "cache")
        loss = prepared(self.loss, cache, self.model, self.size, False, self.say)
        stepping, epochs, reading = self._stepping(cache, loss), self._epochs(cache, loss), self._reading(cache)
        steps = {name: _summary(taken) for name, taken in stepping.items()}
        ratios = _all_ratios(building, stepping, epochs, reading)
        saved = steps["online"]["median"] - steps["cached"]["median"]
        return {
            "setup": setup,
            "step_seconds": steps,
            "epoch_seconds": {name: _summary(taken) for name, taken in epochs.items()},
            "epoch_steps": self.samples // self.batch,
            "build_images_per_second": {name: _summary([1 / t for t in taken]) for name, taken in building.items()},
            "reading_records_per_second": {name: _summary([1 / t for t in taken]) for name, taken in reading.items()},
            "reading_records": READ_RECORDS,
            "ratios": {name: _summary(values) for name, values in ratios.items()},
            "break_even": self._break_even(statistics.median(building["build"]), saved),
        }

    def _setup(self) -> dict[str, Any]:
        return {
            "teacher": self.source.identity.teacher.architecture, "student": self.student, "data": self.config.data,
            "samples": self.samples, "of_samples": self.whole, "loss": self.loss.name,
            "loss_options": options_of(self.loss), "image_size": self.size,
            "teacher_image_size": self.source.teacher.input_size, "classes": self.source.teacher.classes,
            "stored_classes": self.source.identity.record.k or self.source.teacher.classes,
            "batch_size": self.batch, "build_batch_size": self.build_batch, "device": str(self.device),
            "amp": self.config.amp, "compile": self.config.compile, "workers": self.config.workers,
        }  # fmt: skip

    def building(self) -> dict[str, list[float]]:
        """Seconds an image: the build's own loop, which adds views each time; the bare teacher; the images alone.

        Images in memory are cut to one view; files to as many views as a build cuts from each decode.
        """
        source, batch = self.source, self.build_batch
        config = BuildConfig(
            source.identity.teacher.network, data=self.config.data, batch_size=batch, allow_low_accuracy=True,
            workers=self.config.workers, out=str(self.folder / "cache"), compile=False,
        )  # fmt: skip
        rows, views = range(self.samples), 0
        more = 1 if source.train.in_memory else VIEWS_PER_DECODE
        renderer = teacher_renderer(source.train, source, self.config.workers)
        parameters = [view_parameters(source.train, source.identity, view, rows) for view in range(more)]
        batches = [np.arange(i, i + batch) for i in range(0, self.samples, batch)]
        resident = next(renderer.batches(parameters[0], batches[:1])).clone()

        def add_view() -> float:
            nonlocal views
            views += more
            told: list[tuple[float, str]] = []
            build(replace(config, views=views), lambda text: told.append((time.perf_counter(), text)), source)
            # Timed from after the teacher was tried out, which a whole build does only once.
            start = next(at for at, text in told if text.startswith("to compute"))
            return (told[-1][0] - start) / (self.samples * more)

        def answer() -> None:
            for _ in batches * more:
                source.teacher.logits(resident)

        def render() -> None:
            for _ in renderer.views(parameters, [(batch, range(more)) for batch in batches]):
                pass

        cases = {
            "build": add_view,
            "bare teacher": lambda: self._clock.timed(answer) / (self.samples * more),
            "images alone": lambda: self._clock.timed(render) / (self.samples * more),
        }
        return self._clock.in_turns("build", cases, *_BUILDS)

    def _stepping(self, cache: Cache, loss: Loss) -> dict[str, list[float]]:
        """Seconds a step by loss and teacher, and what a step is made of."""
        teacher = self.source.teacher
        learn = _learner(self.model, self.recipe, loss)

        loader = self._loader(cache)
        online = OnlineLoader(
            cache, self.source.train, teacher, self.batch, image_size=self.size, workers=self.config.workers
        )
        loader.set_epoch(0)
        *_, resident = loader.steps()
        shape = (self.batch, 3, teacher.input_size, teacher.input_size)
        seen = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        seen = seen.contiguous(memory_format=torch.channels_last)
        self.model.train()
        cases = {
            "ce": self._steps(self._loader(cache), _learner(self.model, self.recipe, CE())),
            "cached": self._steps(self._loader(cache), learn),
            "online": self._steps(online, learn),
            "data alone": self._steps(self._loader(cache), lambda batch: None),
            "model alone": self._clock.repeated(lambda: learn(resident)),
            "teacher forward": self._clock.repeated(lambda: teacher.logits(seen)),
        }
        return self._clock.in_turns("steps", cases, *_STEPS)

    def _epochs(self, cache: Cache, loss: Loss) -> dict[str, list[float]]:
        """Seconds of the trainer's whole epoch, evaluation left out, the next view's slab read ahead."""

        def epoch(of: Loss) -> Callable[[], float]:
            loader = Onward(self._loader(cache))
            return lambda: float(
                fit(self.model, of, loader, self.recipe, lambda _: {}, say=lambda _: None)[0]["seconds"]
            )

        return self._clock.in_turns("epochs", {"ce": epoch(CE()), "cached": epoch(loss)}, *_EPOCHS)

    def _reading(self, cache: Cache) -> dict[str, list[float]]:
        """Seconds a record: READ_RECORDS of the kind that the cache holds, beside other layouts of the same."""
        identity, records = cache.identity, cache.read(0)
        logits = records.logits() if identity.record.dense else records.dense(1.0).clamp(min=1e-12).log()
        data = identity.data.model_copy(update={"samples": READ_RECORDS, "files": False})
        identity = identity.model_copy(
            update={"data": data, "evaluation": data.model_copy(update={"split": "eval", "samples": 1})}
        )
        with Progress("records to read", READ_RECORDS, "records") as progress:
            large = noise_cache(self.folder / "large", identity, logits, progress.advance)
        cases = reading_cases(large, self.folder / "layouts", READ_BATCH, READ_RECORDS, FKD_IMAGES)
        return self._clock.in_turns("reading", {n: self._read(*case) for n, case in cases.items()}, *_READINGS)

    def _read(self, work: Callable[[], object], records: int) -> Callable[[], float]:
        return lambda: self._clock.timed(work) / records

    def _loader(self, cache: Cache) -> CachedLoader:
        return CachedLoader(
            cache, self.source.train, self.batch, device=self.device, image_size=self.size, workers=self.config.workers
        )

    def _steps(self, loader: Loader, work: Callable[[Any], None]) -> Callable[[], float]:
        """Seconds a step: of an epoch after its first where worker processes decode, else of steps without end."""
        if not self.source.train.in_memory:
            onward = Onward(loader)

            def run() -> float:
                onward.set_epoch(0)
                batches = onward.steps()
                work(next(batches))  # the workers have started

                def rest() -> None:
                    for batch in batches:
                        work(batch)

                return self._clock.timed(rest) / (len(loader) - 1)

            return run
        batches = endless(loader)
        return self._clock.repeated(lambda: work(next(batches)))

    def _break_even(self, build: float, saved: float) -> dict[str, Any]:
        """After how many students V views of all N samples are paid for: build seconds over what a student saves.

        That is epochs x steps x (online - cached step), None where nothing is saved.
        """
        views = self.config.views or self.defaults.views
        epochs = self.config.epochs or self.defaults.epochs
        steps = epochs * (self.whole // self.batch)
        cost, gain = build * views * self.whole, steps * saved
        return {
            "views": views, "samples": self.whole, "epochs": epochs, "steps_an_epoch": self.whole // self.batch,
            "build_seconds": cost, "seconds_saved_a_student": gain, "students": cost / gain if gain > 0 else None,
        }  # fmt: skip


def _learner(model: Classifier, recipe: Recipe, loss: Loss) -> Callable[[Any], None]:
    """The trainer's step, of a loader's batch."""
    training = Training(model, loss, recipe, batches=1)

    def learn(batch: Any) -> None:
        training.learn(*batch)
        training.update()
        training.end_epoch()

    return learn


def _all_ratios(
    building: dict[str, list[float]],
    stepping: dict[str, list[float]],
    epochs: dict[str, list[float]],
    reading: dict[str, list[float]],
) -> dict[str, list[float]]:
    """The ratio of each round's pair, by its name."""
    slower = [max(pair) for pair in zip(building["bare teacher"], building["images alone"], strict=True)]
    bound = [(m + t) / m for m, t in zip(stepping["model alone"], stepping["teacher forward"], strict=True)]
    saved = _ratios(stepping["online"], stepping["cached"])
    return {
        "cached_over_ce_step": _ratios(stepping["cached"], stepping["ce"]),
        "cached_over_ce_epoch": _ratios(epochs["cached"], epochs["ce"]),
        "online_over_cached": saved,
        "student_and_teacher_forward_over_student": bound,
        "online_over_cached_of_that": _ratios(saved, bound),
        "cached_over_model_alone": _ratios(stepping["cached"], stepping["model alone"]),
        "build_over_bare_teacher": _ratios(building["bare teacher"], building["build"]),
        "build_over_slower_of_bare_teacher_and_images": _ratios(slower, building["build"]),
        "shuffled_over_one_seek_a_record": _ratios(reading["one seek a record"], reading["shuffled epoch"]),
        "shuffled_over_one_file_an_image": _ratios(reading["one file an image"], reading["shuffled epoch"]),
    }


def _ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def _summary(values: list[float]) -> dict[str, Any]:
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartiles": [lower, upper], "rounds": len(values)}
