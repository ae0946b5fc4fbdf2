"""Several crops a decode in training: images/s with `--crops-per-decode` 1, 2 and 4, from image files at 224 pixels.

    python bench/crops.py [--seconds 420] [--out FILE]

The files are JPEGs of 375x500, cut-outs of scikit-learn's photographs as views.py makes them; the cache has random
logits of 1,000 classes, stored as top 10. What is compared takes turns in one run, an epoch each, round by round until
the time is over, and ratios are what to look at: medians of the rounds' own. Parts:

pieces     processor time of what an image goes through in one thread: decoding, cutting, stacking, normalising,
           gathering its record, a step of the student
loading    images/s of CachedLoader alone with as many workers as cores, which is what a student on a GPU gets
training   images/s of two students: "hardly any" is a linear layer of every 16th pixel, and stands for one that
           computes on another device; "light" has 32 filters of 16x16 pixels. ce from torchvision's ImageFolder and
           DataLoader is the plain training; ce and nkd from the cache stand beside it
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent))
import views
from views import CORES, CPU, SHAPE, SIDE

from kdcache.cache.identity import Identity, ViewsIdentity
from kdcache.cache.records.encoding import tail_distribution
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.chunks import as_arrays, encode_as
from kdcache.pipeline.build.answers import view_parameters
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.split import describe_data
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import RENDERER, normalised, render
from kdcache.train.bench.bench import machine
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.order import gathered
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import Training
from kdcache.train.losses.options import make_loss

FILES, POLICY, VIEWS, BATCH, CLASSES, K = 2000, "rrc,flip", 8, 32, 1000, 10
CROPS = (1, 2, 4)


class PlainLoader:
    """torchvision's own way: a PIL image, a random crop, a flip; the same batches of uint8 for the trainer."""

    def __init__(self, folder: Path) -> None:
        change = v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        data = torchvision.datasets.ImageFolder(str(folder / "train"), change)
        self._loader = DataLoader(
            data, BATCH, shuffle=True, drop_last=True, num_workers=CORES, persistent_workers=True
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._loader)

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, None]]:
        for images, labels in self._loader:
            yield images.contiguous(memory_format=torch.channels_last), labels, None


def random_cache(path: Path, data: Dataset, evaluation: Dataset) -> Cache:
    """A cache of random logits for these files."""
    teacher = {
        "architecture": "none", "weights": "0" * 64, "mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": SIDE,
        "numeric": "float32",
    }  # fmt: skip
    shown = ViewsIdentity(policy=POLICY, seed=0, renderer=RENDERER, mixed=False)
    record = {
        "classes": CLASSES, "k": K, "temperatures": (1.0,), "precision": "uint8", "labels": 1, "tail_std": False,
    }  # fmt: skip
    identity = Identity.model_validate(
        {
            "teacher": teacher, "data": describe_data(data, False).model_dump(), "format": shown.format,
            "evaluation": describe_data(evaluation, False).model_dump(), "views": shown.model_dump(),
            "record": record, "class_map": None, "part": len(data),
        }
    )  # fmt: skip
    cache, generator = Cache.create(path, identity), torch.Generator().manual_seed(0)
    for store, split, count in ((cache.evaluation, evaluation, 1), (cache.train, data, VIEWS)):
        store.write_labels(split.labels.astype(np.uint16), {})
        store.write_sizes(split.sizes, {})
        for view in range(count):
            logits = 3 * torch.randn(len(split), CLASSES, generator=generator)
            drawn = view_parameters(split, identity, view, range(len(split)))
            records = encode_as(identity.record_of(store.split), logits, torch.from_numpy(split.labels))
            sums = tail_distribution(logits, records).numpy() if store.carries_tail_sums(view) else None
            store.write_shard(view, 0, as_arrays(records), drawn.digest(), {}, sums)
    cache.write_prior({})
    return cache


def hardly_any() -> nn.Module:
    return nn.Sequential(nn.MaxPool2d(1, 16), nn.Flatten(), nn.Linear(3 * (SIDE // 16) ** 2, CLASSES))


def light() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)
    )


STUDENTS = {"hardly any": hardly_any, "light": light}


def training(student: str, loss: str, data: Dataset, batches: int) -> Training:
    torch.manual_seed(0)
    model = Classifier(STUDENTS[student](), data.mean, data.std).to(memory_format=torch.channels_last)
    return Training(model, make_loss(loss, CLASSES), Recipe(epochs=10_000, lr=1e-3), batches)


def an_epoch(loader: Any, learner: Training | None) -> Callable[[], int]:
    """What loads an epoch, and learns it if there is a learner; it gives the number of images."""

    def work() -> int:
        count = 0
        for images, labels, records in loader.steps():
            count += len(images)
            if learner is not None:
                learner.learn(images, labels, records)
                learner.update()
        if learner is not None:
            learner.end_epoch()
        return count

    return work


def in_turns(cases: dict[str, Callable[[], int]], seconds: float) -> dict[str, list[float]]:
    """Images/s of each case, round by round until the time is over; the order changes from round to round."""
    for case in cases.values():
        case()
    found: dict[str, list[float]] = {name: [] for name in cases}
    order, until = list(cases), time.monotonic() + seconds
    while time.monotonic() < until or len(found[order[0]]) < 3:
        for name in order:
            started = time.perf_counter()
            count = cases[name]()
            found[name].append(count / (time.perf_counter() - started))
        order.reverse()
    return found


def summary(found: dict[str, list[float]], beside: str) -> dict[str, Any]:
    """Medians of images/s, and of the rounds' ratios to one of the cases."""
    return {
        "rounds": len(found[beside]),
        "images_per_second": {name: round(statistics.median(of)) for name, of in found.items()},
        f"over_{beside.replace(' ', '_')}": {
            name: round(statistics.median(a / b for a, b in zip(of, found[beside], strict=True)), 3)
            for name, of in found.items()
        },
    }


def loading(cache: Cache, data: Dataset, folder: Path, seconds: float) -> dict[str, Any]:
    cases = {f"{m} crops": an_epoch(CachedLoader(cache, data, BATCH, crops_per_decode=m), None) for m in CROPS}
    return {"workers": CORES, **summary(in_turns(cases, seconds), "1 crops")}


def trained(cache: Cache, data: Dataset, folder: Path, seconds: float) -> dict[str, Any]:
    result: dict[str, Any] = {"batch": BATCH}
    plain = PlainLoader(folder)
    loaders = {m: CachedLoader(cache, data, BATCH, crops_per_decode=m) for m in CROPS}
    for student in STUDENTS:
        cases = {}
        for loss, m in (("ce", 1), ("ce", 4), ("nkd", 1), ("nkd", 2), ("nkd", 4)):
            cases[f"{loss} {m}"] = an_epoch(loaders[m], training(student, loss, data, len(plain)))
        # Last, since worker processes that inherit a DataLoader complain of it when they end.
        cases["plain ce"] = an_epoch(plain, training(student, "ce", data, len(plain)))
        found = in_turns(cases, seconds / len(STUDENTS))
        of_nkd = summary({name: of for name, of in found.items() if name.startswith("nkd")}, "nkd 1")
        result[student] = {**summary(found, "plain ce"), "over_nkd_1": of_nkd["over_nkd_1"]}
    return result


def pieces(cache: Cache, data: Dataset, folder: Path, seconds: float) -> dict[str, Any]:
    """Milliseconds of processor time an image in one thread, the fastest of several passes."""
    torch.set_num_threads(1)
    drawn, decoded = draw(POLICY, 0, 0, range(len(data)), data.sizes), [data.decode(i) for i in range(BATCH)]

    def cut(i: int) -> Tensor:
        return render(decoded[i], drawn.boxes[i].tolist(), bool(drawn.flips[i]), (SIDE, SIDE)).permute(1, 2, 0)

    cuts = [cut(i) for i in range(BATCH)]
    images = torch.stack(cuts).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(of).view(1, 3, 1, 1) * 255 for of in (data.mean, data.std))
    records, batches = cache.read(0), [np.arange(BATCH)]
    ((labels, answers),) = gathered(records, batches)
    found = {
        "decoding": lambda: [data.decode(i) for i in range(BATCH)],
        "cutting": lambda: [cut(i) for i in range(BATCH)],
        "stacking": lambda: torch.stack(cuts),
        "normalising": lambda: normalised(images, mean, std),
        "gathering": lambda: list(gathered(records, batches)),
    }
    for student in STUDENTS:
        for loss in ("ce", "nkd"):
            learner = training(student, loss, data, 1)
            found[f"a step of {loss}, {student}, normalising with it"] = a_step(learner, images, labels, answers)
    result = {name: round(1e3 * fastest(work) / BATCH, 4) for name, work in found.items()}
    torch.set_num_threads(CORES)
    return {"milliseconds_an_image": result}


def a_step(learner: Training, *batch: Any) -> Callable[[], object]:
    def work() -> None:
        learner.learn(*batch)
        learner.update()
        learner.end_epoch()

    return work


def fastest(work: Callable[[], object]) -> float:
    """Seconds of processor time."""
    times = []
    for _ in range(12):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/crops.json")
    a = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {**machine(), "torchvision": torchvision.__version__, "device": str(CPU)},
        "command": "python bench/crops.py", "images": FILES, "height_and_width": SHAPE, "side": SIDE,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        os.environ["KDCACHE_HOME"] = str(Path(name) / "home")
        views.FILES = FILES
        folder = views.make_files(Path(name))
        data, evaluation = (open_data(f"imagefolder:{folder}", split) for split in ("train", "eval"))
        cache = random_cache(Path(name) / "cache", data, evaluation)
        for work, share in ((pieces, 0.0), (loading, 0.3), (trained, 0.7)):
            load = os.getloadavg()[0]
            result[work.__name__] = {**work(cache, data, folder, share * a.seconds), "load_before": round(load, 2)}
            print(work.__name__, json.dumps(result[work.__name__], indent=1), flush=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
