"""The parts of bench/gpu.py but for the students against the clock: the machine, the tests, steps, builds."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from files import make_folder
from pixels import images

from kdcache.cache.home import home_at
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.ffcv.pack import pack_ffcv
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.teachers import pixels as teacher_pixels
from kdcache.train.bench import measure
from kdcache.train.bench.bench import bench, machine
from kdcache.train.bench.config import BenchConfig
from kdcache.train.bench.measure import Bench
from kdcache.train.bench.subject import make_source
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.ffcv import FFCVLoader
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import Loader, Training, new_classifier
from kdcache.train.losses.options import make_loss

ROOT = Path(__file__).resolve().parents[1]
_FILES = 2048
_READ, _READ_DRY = (8192, 64), (2048, 4)  # records and images that `kdcache bench` reads; in a dry run
_VERSIONS = ("torch", "torchvision", "triton", "numpy", "zarr", "timm", "ffcv")


class LeftOutError(Exception):
    """A part that this machine cannot have, and why."""


class PartError(Exception):
    """A part that failed, with what it found nevertheless."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Setting:
    """Where and how large. work: a folder for what parts leave to each other. cifar: CIFAR-10 as in --data, or None."""

    work: Path
    device: str
    dry: bool
    cifar: str | None = None

    def described(self) -> dict[str, Any]:
        """What results have to have in common to stand in one file."""
        return {"device": self.device, "dry": self.dry, "pixels": self.pixels}

    @property
    def pixels(self) -> str:
        return "noise" if self.cifar is None else "CIFAR-10"

    @property
    def small(self) -> str:
        """The 32-pixel images, as in --data."""
        return self.cifar or ("gpu_parts:few" if self.dry else "pixels:noise")


def few(split: str) -> tuple[np.ndarray, np.ndarray]:
    """For --data, in a dry run."""
    return images(96 if split == "train" else 32)


def about(setting: Setting) -> dict[str, Any]:
    """Hardware and versions. InputError where there is no GPU."""
    pick_device(setting.device)
    found = {**machine(), "threads": torch.get_num_threads(), "cuda": torch.version.cuda, "versions": {}}
    for name in _VERSIONS:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    if setting.device != "cpu":
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        found["cudnn"] = torch.backends.cudnn.version()
    return found


class _Counting:
    """A plugin of pytest that keeps what came of each test."""

    def __init__(self) -> None:
        self.passed, self.skipped = 0, 0
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(getattr(report.longrepr, "reprcrash", report.longrepr))[:300]
        self.passed += report.when == "call" and report.passed
        self.skipped += report.skipped

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-300:]


def tests(setting: Setting) -> dict[str, Any]:
    """The tests of tests/gpu on a real device, and the operations' tests that want one. PartError if any fails."""
    import pytest

    os.environ["KDCACHE_GPU_TESTS"] = setting.device
    os.chdir(ROOT)
    usual = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    for harmless in (
        "This process (pid=",  # of forks where threads are, in Python 3.12 and later
        "Module already imported so cannot be rewritten",
        "Please use the new API settings to control TF32",  # of some versions of torch, whose old settings are meant
    ):
        usual += ["-W", f"ignore:{harmless}"]
    runs = [["tests/gpu/test_cuda.py"], ["tests/pipeline/views/operations", "-k", "gpu"]]
    if setting.dry:  # these are slow on a CPU
        runs = [["tests/gpu/test_cuda.py", "-k", "float32 or not (steps or overwrites)"]]
    counting = _Counting()
    for chosen in runs:
        pytest.main([*usual, *chosen], plugins=[counting])
    found = {"passed": counting.passed, "skipped": counting.skipped, "failed": counting.failed}
    if counting.failed or not counting.passed:
        raise PartError(f"{len(counting.failed)} tests failed, {counting.passed} passed", found)
    return found


def steps_in_memory(setting: Setting) -> dict[str, Any]:
    """resnet56 -> resnet20 at 32 pixels: with the live teacher, from the cache, and plain ce."""
    if setting.dry:
        return _steps(setting, BenchConfig("resnet8", "resnet8", data=setting.small, batch_size=16, samples=32))
    return _steps(setting, BenchConfig("resnet56", "resnet20", data=setting.small, batch_size=256, amp="bf16"))


def steps_from_files(setting: Setting) -> dict[str, Any]:
    """resnet34 -> resnet18 on 224-pixel JPEG files."""
    return _steps(setting, _of_files(setting, "resnet34"), rounds=3)


def _of_files(setting: Setting, teacher: str, amp: Any = "bf16", compiled: bool = False) -> BenchConfig:
    """A teacher of files; in a dry run it is a small one, of small images."""
    folder = setting.work / "images"
    if not (folder / "whole").exists():
        if setting.dry:
            make_folder(folder, 24, (40, 64))
        else:
            make_folder(folder, _FILES)
        (folder / "whole").touch()
    data = f"imagefolder:{folder}"
    if setting.dry:
        teacher_pixels.IMAGENET_SIZE = 32  # in this part's process
        return BenchConfig("resnet8", "resnet8", data=data, batch_size=8, image_size=32, samples=16, workers=0)
    return BenchConfig(teacher, "resnet18", data=data, batch_size=128, samples=_FILES, amp=amp, compile=compiled)


def _steps(setting: Setting, config: BenchConfig, rounds: int = 5) -> dict[str, Any]:
    """What `kdcache bench` finds, and images/s."""
    measure.READ_RECORDS, measure.FKD_IMAGES = _READ_DRY if setting.dry else _READ
    config = BenchConfig(**{**vars(config), "device": setting.device, "rounds": 2 if setting.dry else rounds})
    found = bench(config)
    batch = found["setup"]["batch_size"]
    rates = {name: batch / taken["median"] for name, taken in found["step_seconds"].items()}
    return {"images_per_second": rates, "command": found.pop("command"), **found}


def steps_from_ffcv(setting: Setting) -> dict[str, Any]:
    """The same networks and files from one .beton by FFCV's loader, beside the cache's own loader: images/s."""
    try:
        import ffcv  # noqa: F401
    except ImportError as e:
        raise LeftOutError(f"FFCV cannot be imported here ({' '.join(str(e).split())[:200]})") from e
    config = BenchConfig(**{**vars(_of_files(setting, "resnet34")), "device": setting.device})
    device = pick_device(setting.device)
    place = setting.work / "ffcv"
    source, _ = make_source(config, setting.work, device)
    asked = BuildConfig(config.teacher or "", data=config.data, views=1, allow_low_accuracy=True, out=str(place),
                        workers=config.workers, compile=False)  # fmt: skip
    built = build(asked, source=source)
    cache = Cache(built.path)
    file = FFCVFile(pack_ffcv(cache, source.train, setting.work / "images.beton"))
    size = config.image_size or source.teacher.input_size
    batch, workers = config.batch_size or 1, config.workers
    loaders: dict[str, Loader] = {
        "ffcv": FFCVLoader(file, batch, device=device, image_size=size, allow_renderer=True),
        "files": CachedLoader(cache, source.train, batch, device=device, image_size=size, workers=workers),
    }
    classes = cache.identity.record.classes
    model = new_classifier(config.student or "", classes, size, source.train, device, 0, "the teacher for")
    rates: dict[str, float] = {}
    for name, loader in loaders.items():
        for loss in ("ce", "nkd"):
            training = Training(model, make_loss(loss, classes), Recipe(1, 1e-3, amp=config.amp), len(loader))
            seconds = [_epoch(training, loader, device) for _ in range(2 if setting.dry else 4)][1:]
            rates[f"{loss} from {name}"] = (len(loader) - 1) * batch / statistics.median(seconds)
    return {"images_per_second": rates, "batch_size": batch, "image_size": size, "amp": config.amp}


def _epoch(training: Training, loader: Loader, device: torch.device) -> float:
    """Seconds of an epoch's steps after the first, in which workers start."""
    loader.set_epoch(0)
    training.model.train()
    began = 0.0
    for i, batch in enumerate(loader.steps()):
        training.learn(*batch)
        training.update()
        if not i:
            waited(device)
            began = time.perf_counter()
    waited(device)
    training.end_epoch()
    return time.perf_counter() - began


def waited(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def building(setting: Setting, teacher: str, amp: str | None) -> dict[str, Any]:
    """Images/s of a build from files beside the bare compiled teacher, whose weights are random, and images alone."""
    config = _of_files(setting, teacher, amp, compiled=True)
    config = BenchConfig(
        **{**vars(config), "device": setting.device, "rounds": 2 if setting.dry else 3, "compile": not setting.dry}
    )
    device, place = pick_device(setting.device), setting.work / f"build-{teacher}"
    place.mkdir(exist_ok=True)
    say: Callable[[str], None] = print
    source, whole = make_source(config, place, device)
    with home_at(place / "home"):
        rates = Bench(config, source, whole, place, device, say).building()
    images_a_second = {name: 1 / statistics.median(taken) for name, taken in rates.items()}
    ratios = [bare / built for bare, built in zip(rates["bare teacher"], rates["build"], strict=True)]
    slower = min(images_a_second["bare teacher"], images_a_second["images alone"])
    return {
        "teacher": source.identity.teacher.architecture, "numeric": source.identity.teacher.numeric,
        "compiled": config.compile, "images_per_second": images_a_second,
        "build_over_bare_teacher": statistics.median(ratios),
        "build_over_slower_of_bare_teacher_and_images": images_a_second["build"] / slower,
    }  # fmt: skip
