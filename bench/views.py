"""What strong and mixed views cost: operations, the data path, files, a build, a training step and drawing a view.

    python bench/views.py --data imagefolder:PATH [--rounds 7] [--only PART ...] [--out FILE]

PATH holds real CIFAR-10 as cifar10.py takes it; its first 20,000 training images are used. What is compared takes turns
in one run, round by round, with as many threads as cores, and ratios are what to look at. Beside the wall clock's are
figures of processor time, of all threads and worker processes together, which say more on a busy machine. Parts:

operations   drawing and applying `trivial` and `randaugment(2,9)` alone, images/s at 32 pixels in batches of 256
memory       the whole data path of CachedLoader in memory: records gathered, images cut, changed, mixed, normalised
files        decoding, cutting to 224 pixels and changing JPEG files of 375x500, cut-outs of scikit-learn's photographs
build        a build of such files with --views-per-decode 4, mixed and not: decodes for 4 records, and images/s
step         a training step of nkd beside one of ce, both from the cache with the same mixed views
drawing      drawing one view of 1,281,167 samples: seconds, and the peak of NumPy's memory
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).parent))
from data import filled

from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.views.draws import words
from kdcache.pipeline.views.parameters import ViewParameters, draw
from kdcache.pipeline.views.policy import OPERATIONS, parse_policy
from kdcache.pipeline.views.render import Renderer
from kdcache.train.bench.bench import machine
from kdcache.train.loaders.cached import CachedLoader, partners_of
from kdcache.train.loaders.order import EpochOrder
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import Training, new_classifier
from kdcache.train.losses.options import make_loss

CPU, CORES = torch.device("cpu"), os.cpu_count() or 1
SAMPLES, BATCH, STEP_BATCH, STUDENT = 20_000, 256, 128, "resnet20"
MIXES, STRONG = "mixup(0.2),cutmix(1)", "randaugment(2,9),erase(0.25)"
IN_MEMORY = (
    "crop,flip", f"crop,flip,{MIXES}", f"crop,flip,erase(0.25),{MIXES}", f"crop,flip,trivial,{MIXES}",
    f"crop,flip,{STRONG},{MIXES}",
)  # fmt: skip
OF_FILES = ("rrc,flip", f"rrc,flip,{STRONG}", f"rrc,flip,{STRONG},{MIXES}")
FILES, FILES_BATCH, SIDE, SHAPE = 500, 32, 224, (375, 500)
BUILT_VIEWS, TEACHER = 4, "mobilenet_v3_small"
DRAWN, IMAGENET = 1_281_167, [(375, 500), (500, 375), (333, 500), (500, 500)]


class Took(NamedTuple):
    """Seconds of the wall clock, and of processor time."""

    wall: float
    work: float


def timed(work: Callable[[], object]) -> Took:
    """Time a piece of work; the processor time of its worker processes counts once they have ended."""
    before, started = _processor(), time.perf_counter()
    work()
    return Took(time.perf_counter() - started, _processor() - before)


def _processor() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_turns(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Took]]:
    """Times of each case in every round, after one to warm up; the order changes from round to round."""
    for case in cases.values():
        case()
    found: dict[str, list[Took]] = {name: [] for name in cases}
    order = list(cases)
    for _ in range(rounds):
        for name in order:
            found[name].append(timed(cases[name]))
        order.reverse()
    return found


def rates(found: dict[str, list[Took]], count: int) -> dict[str, dict[str, float]]:
    """Images/s: medians, the slowest and the fastest, and images a second of processor time."""
    return {
        name: {
            "median": count / statistics.median(t.wall for t in took),
            "slowest": count / max(t.wall for t in took),
            "fastest": count / min(t.wall for t in took),
            "a_processor_second": count / statistics.median(t.work for t in took),
        }
        for name, took in found.items()
    }


def ratios(found: dict[str, list[Took]]) -> dict[str, dict[str, float]]:
    """The time of each case over that of the first one: medians of the rounds' own ratios."""
    first = next(iter(found.values()))
    return {
        name: {
            "wall": statistics.median(a.wall / b.wall for a, b in zip(took, first, strict=True)),
            "processor": statistics.median(a.work / b.work for a, b in zip(took, first, strict=True)),
        }
        for name, took in list(found.items())[1:]
    }


def operations(data: Dataset, place: Path, rounds: int) -> dict[str, Any]:
    assert data.pixels is not None
    views = iter(range(10**9))  # every call has draws of its own

    def changing(name: str) -> Callable[[], object]:
        (operation,) = parse_policy(name).operations
        batches = data.pixels[:5120].split(BATCH)  # type: ignore[index]

        def work() -> None:
            drawn = operation.draw(words(0, operation.stream, next(views), range(5120), operation.words))
            for number, images in enumerate(batches):
                rows = slice(number * BATCH, (number + 1) * BATCH)
                some = {what: of[rows] for what, of in drawn.items()}
                operation.apply(images.clone().permute(0, 3, 1, 2), some)

        return work

    found = in_turns({name: changing(name) for name in ("trivial", "randaugment(2,9)")}, rounds)
    return {"images_per_second": rates(found, 5120)}


def memory(data: Dataset, place: Path, rounds: int) -> dict[str, Any]:
    loaders = {policy: CachedLoader(random_cache(place, data, policy), kept(data), BATCH) for policy in IN_MEMORY}
    epochs = iter(range(10**9))

    def epoch(loader: CachedLoader) -> None:
        loader.set_epoch(next(epochs))
        for _ in loader:
            pass

    cases = {policy: lambda loader=loader: epoch(loader) for policy, loader in loaders.items()}
    found = in_turns(cases, rounds)
    count = len(next(iter(loaders.values()))) * BATCH
    return {"images_per_second": rates(found, count), "time_over_the_first": ratios(found)}


def files(data: Dataset, place: Path, rounds: int) -> dict[str, Any]:
    photographs = open_data(f"imagefolder:{make_files(place)}", "train")
    views = iter(range(10**9))

    def rendering(policy: str, workers: int) -> Callable[[], object]:
        renderer, mixed = Renderer(photographs, SIDE, CPU, policy, workers), parse_policy(policy).mixed
        order = EpochOrder(FILES, FILES_BATCH, 0, 1, 0, mixed)

        def work() -> None:
            view = next(views)
            drawn = draw(policy, 0, view, range(FILES), photographs.sizes)
            for _ in renderer.batches(drawn, order.batches(view, partners_of(drawn))):
                pass

        return work

    count, result = FILES // FILES_BATCH * FILES_BATCH, {}
    # Worker processes live on, so that only without them is there a processor time of all the work. One thread has it
    # then, since threads that wait for busy cores use time too.
    for name, workers, threads in ((f"{CORES} worker processes", CORES, CORES), ("this process alone", 0, 1)):
        torch.set_num_threads(threads)
        found = in_turns({policy: rendering(policy, workers) for policy in OF_FILES}, max(2, rounds // 2))
        result[name] = {"images_per_second": rates(found, count), "time_over_the_first": ratios(found)}
    torch.set_num_threads(CORES)
    return {"images": FILES, "height_and_width": SHAPE, "side": SIDE, **result}


def builds(data: Dataset, place: Path, rounds: int) -> dict[str, Any]:
    """Decodes are counted where they happen, in whatever process, with the images that the teacher is tried out on."""
    folder, weights = make_files(place), place / "teacher.safetensors"
    torch.manual_seed(0)
    save_file(build_network(TEACHER, 10, SIDE).state_dict(), weights)
    counter, decode = multiprocessing.Value("q", 0), FileDataset.decode

    def counted(self: FileDataset, index: int) -> torch.Tensor:
        if self.split == "train":
            with counter.get_lock():
                counter.value += 1
        return decode(self, index)

    FileDataset.decode = counted  # type: ignore[method-assign]
    numbers, found, decodes = iter(range(10**9)), {}, {}

    def building(policy: str) -> Callable[[], object]:
        config = BuildConfig(
            TEACHER, str(weights), data=f"imagefolder:{folder}", augment=policy, views=BUILT_VIEWS, teacher_size=SIDE,
            teacher_mean=(0.5,) * 3, teacher_std=(0.25,) * 3, views_per_decode=BUILT_VIEWS, allow_low_accuracy=True,
        )  # fmt: skip

        def work() -> None:
            before = counter.value
            build(replace(config, out=str(place / f"built-{next(numbers)}")), lambda _: None)
            decodes[policy] = (counter.value - before) / FILES

        return work

    policies = "rrc,flip", f"rrc,flip,{MIXES}", OF_FILES[-1]
    try:
        found = in_turns({policy: building(policy) for policy in policies}, 2)
    finally:
        FileDataset.decode = decode  # type: ignore[method-assign]
    return {
        "teacher": TEACHER,
        "images": FILES,
        "views": BUILT_VIEWS,
        f"decodes_for_{BUILT_VIEWS}_records": decodes,
        "images_per_second": rates(found, FILES * BUILT_VIEWS),
        "time_over_the_first": ratios(found),
    }


def steps(data: Dataset, place: Path, rounds: int) -> dict[str, Any]:
    """Blocks of steps in turns; one student each, which learn the same number of steps."""
    each, policy = 4, IN_MEMORY[-1]
    cache = random_cache(place, data, policy)

    def learning(name: str) -> Callable[[], object]:
        loader = CachedLoader(cache, kept(data), STEP_BATCH)
        model = new_classifier(STUDENT, 10, 32, data, CPU, seed=0, whose="the records of")
        training = Training(model, make_loss(name, 10), Recipe(epochs=1000, lr=1e-3), len(loader))
        batches = endless(loader, training)

        def work() -> None:
            for _ in range(each):
                training.learn(*next(batches))
                training.update()

        return work

    found = in_turns({name: learning(name) for name in ("ce", "nkd")}, 4 * rounds)
    alone = [took.wall / each for took in found["ce"]]
    return {
        "student": STUDENT, "batch": STEP_BATCH, "policy": policy, "steps_in_turn": each, "turns": len(alone),
        "ce_seconds": statistics.median(alone), "nkd_over_ce": ratios(found)["nkd"],
    }  # fmt: skip


def endless(loader: CachedLoader, training: Training) -> Iterator[Any]:
    while True:
        yield from loader.steps()
        training.end_epoch()


def drawing(data: Dataset, place: Path, rounds: int) -> dict[str, Any]:
    sizes = np.resize(np.array(IMAGENET, np.int32), (DRAWN, 2))
    policies = "rrc,flip", OF_FILES[1], OF_FILES[2]
    cases = {policy: lambda policy=policy: draw(policy, 0, 1, range(DRAWN), sizes) for policy in policies}
    found = in_turns(cases, max(2, rounds // 2))
    peaks = {policy: peak(case) for policy, case in cases.items()}
    return {
        "samples": DRAWN,
        "seconds": {name: statistics.median(took.wall for took in of) for name, of in found.items()},
        "processor_seconds": {name: statistics.median(took.work for took in of) for name, of in found.items()},
        "mib": {name: {"result": result, "beside_it": most - result} for name, (result, most) in peaks.items()},
    }


def peak(case: Callable[[], ViewParameters]) -> tuple[float, float]:
    """MiB of the result, and of the peak while it was drawn."""
    tracemalloc.start()
    drawn = case()
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(drawn) == DRAWN
    return held / 2**20, most / 2**20


def kept(data: Dataset) -> ArrayDataset:
    """The first images in memory, under the name that random caches are made for."""
    assert data.pixels is not None
    return ArrayDataset(
        name="noise", split="train", labels=data.labels[:SAMPLES], class_names=tuple(data.class_names),
        sizes=data.sizes[:SAMPLES], mean=data.mean, std=data.std, pixels=data.pixels[:SAMPLES],
    )  # fmt: skip


def random_cache(place: Path, data: Dataset, policy: str) -> Cache:
    """A cache of random logits for the images in two views."""
    path = place / policy.translate(str.maketrans("(),.", "----"))
    return Cache(path) if path.exists() else filled(path, kept(data), policy=policy)


def make_files(place: Path) -> Path:
    """JPEG files of the usual size, the same ones every time, in ten classes; a tenth as many to evaluate on."""
    folder, rng = place / "files", np.random.default_rng(0)
    if folder.exists():
        return folder
    photographs = load_sample_images().images
    for split, count in (("train", FILES), ("val", FILES // 10)):
        for i in range(count):
            path = folder / split / f"class{i % 10}" / f"{i:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            top, left = (rng.integers(0, s - c + 1) for s, c in zip(photographs[0].shape, SHAPE, strict=False))
            Image.fromarray(photographs[i % 2][top:, left:][: SHAPE[0], : SHAPE[1]]).save(path, quality=90)
    return folder


PARTS = {"operations": operations, "memory": memory, "files": files, "build": builds, "step": steps, "drawing": drawing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/views.json")
    a = parser.parse_args()
    torch.set_num_threads(CORES)
    data = open_data(a.data, "train")
    about = {**machine(), "numpy": np.__version__, "threads": CORES, "operations": len(OPERATIONS)}
    result: dict[str, Any] = {"machine": about, "command": f"python bench/views.py --rounds {a.rounds}"}
    with tempfile.TemporaryDirectory() as name:
        os.environ["KDCACHE_HOME"] = str(Path(name) / "home")
        for part in a.only:
            load, started = os.getloadavg()[0], time.perf_counter()
            found = PARTS[part](data, Path(name), a.rounds)
            result[part] = {**found, "load_before": load, "seconds_in_all": time.perf_counter() - started}
            print(part, json.dumps(result[part], indent=1), flush=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
