"""`kdcache bench`: what a teacher costs in every step, in a build, and not at all, on this machine.

What is compared takes turns in one run, so that a noisy machine is noisy to all alike; figures are medians with
quartiles, ratios those of each round's pairs. The teacher is untrained and a part of the data stands for all of them:
time depends on neither.
"""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcache import __version__
from kdcache.cache.errors import InputError
from kdcache.cache.home import home_at
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.answers import teacher_renderer, view_parameters
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import VIEWS_PER_DECODE, BuildConfig
from kdcache.pipeline.build.source import Source, describe_data, open_source
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.defaults import Defaults, defaults_for
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.process.progress import Progress, duration
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.pixels import pixels_of_data
from kdcache.pipeline.teachers.teacher import Classifier, Teacher, file_classifier, try_out
from kdcache.train.bench.config import BenchConfig
from kdcache.train.bench.layouts import noise_cache, reading_cases
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import OnlineLoader
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import Loader, Training, fit, seeded
from kdcache.train.losses import CE, Loss
from kdcache.train.losses.options import make_loss, options_of
from kdcache.train.losses.prepare import prepared, require_served

TEACHER, FILES_TEACHER = "resnet56", "resnet34"
READ_RECORDS, FKD_IMAGES, READ_BATCH = 65_536, 200, 1024
_RATE = 1e-3  # small, so that no loss grows: time does not depend on it
# For about how many seconds what is compared goes on, and at least how often, unless told.
_STEPS, _EPOCHS, _BUILDS, _READINGS = (30.0, 10), (20.0, 3), (20.0, 3), (8.0, 3)


def bench(config: BenchConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All figures, with hardware, versions and settings; `table` shows them.

    Its caches leave nothing in KDCACHE_HOME; data are opened as ever, which may download them there.
    """
    device = pick_device(config.device)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as name:
        folder = Path(name)
        source, whole = _source(config, folder, device)
        with home_at(folder / "home"):
            found = _Bench(config, source, whole, folder, device, say).run()
    return {"machine": machine(), "threads": torch.get_num_threads(), "command": _command(config), **found,
            "seconds": time.monotonic() - started}  # fmt: skip


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return {
        "processor": next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor()),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "kdcache": __version__,
        "python": platform.python_version(),
    }


def _command(config: BenchConfig) -> str:
    words = ["kdcache", "bench"]
    for f in fields(config):
        if (value := getattr(config, f.name)) != f.default:
            words += [f"--{f.name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)


def _source(config: BenchConfig, folder: Path, device: torch.device) -> tuple[Source, int]:
    """An untrained teacher and a part of the data, in whole batches, as a build has them; N of the whole data."""
    data = open_data(config.data, "train")
    defaults = defaults_for(data)
    batch = config.batch_size or defaults.train_batch
    steps = 8 if device.type == "cpu" else 64
    samples = min(config.samples or steps * batch, len(data)) // batch * batch
    if samples < 2 * batch:
        asked = f" and --samples {config.samples}" if config.samples else ""
        raise InputError(
            f"at least two batches are needed, and {config.data} has {len(data)} samples{asked} for batches of "
            f"{batch}: lower --batch-size"
        )
    name = config.teacher or (FILES_TEACHER if not data.in_memory else TEACHER)
    weights = folder / "teacher.safetensors"
    _untrained(name, data, weights)
    found = open_source(
        BuildConfig(name, str(weights), data=config.data, device=config.device, amp=config.amp, workers=config.workers)
    )
    chosen = np.arange(samples) * len(data) // samples
    train, labels = found.train.subset(chosen), found.train_labels[chosen]
    teacher, built = found.teacher, _build_batch(config, defaults, samples, found.teacher)
    few = np.arange(min(len(found.evaluation), built))
    evaluation = found.evaluation.subset(few)
    identity = found.identity.model_copy(
        update={"data": describe_data(train, False), "evaluation": describe_data(evaluation, False)}
    )
    if config.compile:
        teacher = teacher.compile(built)
    found = replace(
        found, train=train, evaluation=evaluation, train_labels=labels, evaluation_labels=found.evaluation_labels[few],
        teacher=teacher, identity=identity,
    )  # fmt: skip
    return found, len(data)


def _build_batch(config: BenchConfig, defaults: Defaults, samples: int, teacher: Teacher) -> int:
    """The default, unless it would leave a batch that is filled up."""
    batch = config.batch_size or defaults.batch_for(teacher.device.type, teacher.input_size, samples)
    return batch if samples % batch == 0 else defaults.train_batch


def _untrained(name: str, data: Dataset, weights: Path) -> None:
    """File a teacher with new weights, and with batch norms that have seen pixels, so that logits have a usual size."""
    size = pixels_of_data(data).size
    network = seeded(0, lambda: build_network(name, len(data.class_names), size))
    model = Classifier(network, data.mean, data.std)
    try_out(model, name, size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what is seen
    with torch.no_grad():
        model.train()(torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8))
    notes = {"input_size": size, "mean": data.mean, "std": data.std, "class_names": data.class_names}
    file_classifier(weights, model, notes)


class _Bench:
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
        self.whole, self.samples = whole, len(source.train)
        self.defaults, record = source.defaults, source.identity.record
        self.batch = config.batch_size or self.defaults.train_batch
        self.build_batch = _build_batch(config, self.defaults, self.samples, source.teacher)
        self.size = config.image_size or source.train.image_size or source.teacher.input_size
        self.loss = make_loss(config.loss, record.classes)
        require_served(self.loss, record)
        self.student = config.student or self.defaults.student
        network = seeded(0, lambda: build_network(self.student, record.classes, self.size))
        self.model = Classifier(network, source.train.mean, source.train.std).to(device)
        self.model.to(memory_format=torch.channels_last)
        if (answers := try_out(self.model, self.student, self.size)) != record.classes:
            raise InputError(f"{self.student} answers for {answers} classes, the teacher for {record.classes}")
        self.recipe = Recipe(epochs=1, lr=_RATE, amp=config.amp, compile=config.compile)

    def run(self) -> dict[str, Any]:
        setup = {
            "teacher": self.source.identity.teacher.architecture, "student": self.student, "data": self.config.data,
            "samples": self.samples, "of_samples": self.whole, "loss": self.loss.name,
            "loss_options": options_of(self.loss), "image_size": self.size,
            "teacher_image_size": self.source.teacher.input_size, "classes": self.source.teacher.classes,
            "stored_classes": self.source.identity.record.k or self.source.teacher.classes,
            "batch_size": self.batch, "build_batch_size": self.build_batch, "device": str(self.device),
            "amp": self.config.amp, "compile": self.config.compile, "workers": self.config.workers,
        }  # fmt: skip
        self.say(
            f"{setup['teacher']} -> {self.student} on {self.config.data} ({self.samples:,} of {self.whole:,} samples), "
            f"batches of {self.batch} on {self.device}"
        )
        building = self._building()
        cache = Cache(self.folder / "cache")
        loss = prepared(self.loss, cache, self.model, self.size, False, self.say)
        stepping = self._stepping(cache, loss)
        epochs = self._epochs(cache, loss)
        reading = self._reading(cache)
        slower = [max(pair) for pair in zip(building["bare teacher"], building["images alone"], strict=True)]
        bound = [(m + t) / m for m, t in zip(stepping["model alone"], stepping["teacher forward"], strict=True)]
        saved = _ratios(stepping["online"], stepping["cached"])
        ratios = {
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
        step_seconds = {name: _summary(taken) for name, taken in stepping.items()}
        return {
            "setup": setup,
            "step_seconds": step_seconds,
            "epoch_seconds": {name: _summary(taken) for name, taken in epochs.items()},
            "epoch_steps": self.samples // self.batch,
            "build_images_per_second": {name: _summary([1 / t for t in taken]) for name, taken in building.items()},
            "reading_records_per_second": {name: _summary([1 / t for t in taken]) for name, taken in reading.items()},
            "reading_records": READ_RECORDS,
            "ratios": {name: _summary(values) for name, values in ratios.items()},
            "break_even": self._break_even(
                statistics.median(building["build"]),
                step_seconds["online"]["median"] - step_seconds["cached"]["median"],
            ),
        }

    def _building(self) -> dict[str, list[float]]:
        """Seconds an image: the build's own loop, which adds views each time; the bare teacher; the images alone.

        Of images in memory it is one view, of files as many as a build cuts from each decode.
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
            # From where it has tried the teacher out: a whole build does that once.
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
            "bare teacher": lambda: self._timed(answer) / (self.samples * more),
            "images alone": lambda: self._timed(render) / (self.samples * more),
        }
        return self._in_turns("build", cases, *_BUILDS)

    def _stepping(self, cache: Cache, loss: Loss) -> dict[str, list[float]]:
        """Seconds a step by loss and teacher, and what a step is made of."""
        teacher = self.source.teacher
        learn = self._learner(loss)

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
            "ce": self._steps(self._loader(cache), self._learner(CE())),
            "cached": self._steps(self._loader(cache), learn),
            "online": self._steps(online, learn),
            "data alone": self._steps(self._loader(cache), lambda batch: None),
            "model alone": self._repeated(lambda: learn(resident)),
            "teacher forward": self._repeated(lambda: teacher.logits(seen)),
        }
        return self._in_turns("steps", cases, *_STEPS)

    def _learner(self, loss: Loss) -> Callable[[Any], None]:
        """The trainer's step, of a loader's batch."""
        training = Training(self.model, loss, self.recipe, batches=1)

        def learn(batch: Any) -> None:
            training.learn(*batch)
            training.update()
            training.end_epoch()

        return learn

    def _epochs(self, cache: Cache, loss: Loss) -> dict[str, list[float]]:
        """Seconds of the trainer's whole epoch, evaluation left out, the next view's slab read ahead."""

        def epoch(of: Loss) -> Callable[[], float]:
            loader = _Onward(self._loader(cache))
            return lambda: float(
                fit(self.model, of, loader, self.recipe, lambda _: {}, say=lambda _: None)[0]["seconds"]
            )

        return self._in_turns("epochs", {"ce": epoch(CE()), "cached": epoch(loss)}, *_EPOCHS)

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
        return self._in_turns("reading", {n: self._read(*case) for n, case in cases.items()}, *_READINGS)

    def _read(self, work: Callable[[], object], records: int) -> Callable[[], float]:
        return lambda: self._timed(work) / records

    def _loader(self, cache: Cache) -> CachedLoader:
        return CachedLoader(
            cache, self.source.train, self.batch, device=self.device, image_size=self.size, workers=self.config.workers
        )

    def _steps(self, loader: Loader, work: Callable[[Any], None]) -> Callable[[], float]:
        """Seconds a step: of an epoch after its first where worker processes decode, else of steps without end."""
        if not self.source.train.in_memory:
            onward = _Onward(loader)

            def run() -> float:
                onward.set_epoch(0)
                batches = onward.steps()
                work(next(batches))  # the workers have started

                def rest() -> None:
                    for batch in batches:
                        work(batch)

                return self._timed(rest) / (len(loader) - 1)

            return run
        batches = _endless(loader)
        return self._repeated(lambda: work(next(batches)))

    def _repeated(self, work: Callable[[], object]) -> Callable[[], float]:
        """Seconds of one, from several where the device works behind the program's back."""
        times = 1 if self.device.type == "cpu" else 20

        def several() -> None:
            for _ in range(times):
                work()

        return lambda: self._timed(several) / times

    def _timed(self, work: Callable[[], object]) -> float:
        self._synchronise()
        started = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - started

    def _synchronise(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _in_turns(
        self, title: str, cases: Mapping[str, Callable[[], float]], seconds: float, least: int
    ) -> dict[str, list[float]]:
        """What each case gives in every round, after one to warm up; the order changes from round to round."""
        started = time.perf_counter()
        for case in cases.values():
            case()
        once = time.perf_counter() - started
        rounds = self.config.rounds or min(200, max(least, round(seconds / once)))
        found: dict[str, list[float]] = {name: [] for name in cases}
        order = list(cases)
        with Progress(title, rounds, "rounds") as progress:
            for _ in range(rounds):
                for name in order:
                    found[name].append(cases[name]())
                order.reverse()
                progress.advance(1)
        return found

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


class _Onward:
    """A loader whose epochs go on, view after view, whatever epoch the trainer counts."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._epoch = loader, 0

    def set_epoch(self, epoch: int) -> None:
        self._loader.set_epoch(self._epoch)
        self._epoch += 1

    def __len__(self) -> int:
        return len(self._loader)

    def steps(self, start: int = 0) -> Iterator[Any]:
        return self._loader.steps(start)


def _endless(loader: Loader) -> Iterator[Any]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader.steps()
        epoch += 1


def _ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def _summary(values: list[float]) -> dict[str, Any]:
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartiles": [lower, upper], "rounds": len(values)}


def _number(value: float) -> str:
    return f"{value:,.{3 if value < 10 else 1 if value < 1000 else 0}f}"


def table(found: Mapping[str, Any]) -> str:
    """The figures of `bench` for the eye."""
    setup, about, even = found["setup"], found["machine"], found["break_even"]
    loss = setup["loss"]
    numeric = setup["amp"] or "float32"
    lines = [
        f"{setup['teacher']} -> {setup['student']} on {setup['data']} ({setup['samples']:,} of "
        f"{setup['of_samples']:,} samples), {setup['image_size']} pixels, batches of {setup['batch_size']}",
        f"{about['gpu'] if setup['device'] != 'cpu' else about['processor']}, {about['cores']} cores, "
        f"{found['threads']} threads, {numeric}{', compiled' if setup['compile'] else ''}; torch {about['torch']}, "
        f"kdcache {about['kdcache']}, in {duration(found['seconds'])}",
    ]

    def section(title: str, unit: str, rows: dict[str, str], figures: Mapping[str, Any], factor: float = 1.0) -> None:
        lines.append("")
        lines.append(f"{title:44}{unit:>12}   {'quartiles':22}{'rounds':>6}")
        for name, text in rows.items():
            f = figures[name]
            middle, low, high = (_number(factor * value) for value in (f["median"], *f["quartiles"]))
            lines.append(f"{text:44}{middle:>12}   {low + ' to ' + high:22}{f['rounds']:6}")

    steps = {
        "ce": "ce from the cache", "cached": f"{loss} from the cache", "online": f"{loss} with the live teacher",
        "data alone": "  data alone", "model alone": f"  model alone, with {loss}",
        "teacher forward": "  teacher's forward pass alone",
    }  # fmt: skip
    section("a training step", "ms", steps, found["step_seconds"], 1000)
    epochs = {"ce": "ce from the cache", "cached": f"{loss} from the cache"}
    section(f"a whole epoch of {found['epoch_steps']} steps", "s", epochs, found["epoch_seconds"])
    built = {name: name for name in found["build_images_per_second"]}
    section(f"a build, batches of {setup['build_batch_size']}", "images/s", built, found["build_images_per_second"])
    read = {
        "slab": "a view's slab",
        "first epoch": "the slab, and from it shuffled batches",
        "shuffled epoch": "  the same in memory used before",
        "one seek a record": "one seek a record (TinyViT)",
        "one file an image": "one file an image (FKD)",
    }
    title = f"reading {found['reading_records']:,} records of {setup['stored_classes']} classes"
    section(title, "records/s", read, found["reading_records_per_second"])
    ratios = {
        "cached_over_ce_step": f"{loss} over ce, a step",
        "cached_over_ce_epoch": f"{loss} over ce, a whole epoch",
        "online_over_cached": "live teacher over cached, a step",
        "student_and_teacher_forward_over_student": "  (student + teacher's forward) / student",
        "online_over_cached_of_that": "  how much of that is reached",
        "cached_over_model_alone": "cached step over the model alone",
        "build_over_bare_teacher": "build over the bare teacher, images/s",
        "build_over_slower_of_bare_teacher_and_images": "  over the slower of that and images alone",
        "shuffled_over_one_seek_a_record": "shuffled reading over one seek a record",
        "shuffled_over_one_file_an_image": "shuffled reading over one file an image",
    }
    section("ratios", "", ratios, found["ratios"])
    cost, saved = duration(even["build_seconds"]), duration(abs(even["seconds_saved_a_student"]))
    paid = (
        f"saves {saved}: paid for after {even['students']:.2f} students"
        if even["students"] is not None
        else f"loses {saved}: never paid for"
    )
    lines.append("")
    lines.append(
        f"break-even: {even['views']} views of {even['samples']:,} samples take {cost} to build; a student of "
        f"{even['epochs']} epochs of {even['steps_an_epoch']:,} steps {paid}"
    )
    return "\n".join(lines)
