"""Images/s of every operation on pixels, beside torchvision's transforms of the same kind; writes JSON.

    python bench/operations.py [--rounds 7] [--threads N] [--out FILE]

Random uint8 pixels at 32 and at 224, channels_last, with the operations' default arguments: drawing and applying, in
batches. Beside them torchvision's v2 transforms of the same parameters, in three ways: for tensors one by one, which
is what compares, since each image gets a draw of its own; for PIL images one by one, which is how most people have
them; and for a whole batch with one single draw. Mixing is compared with a batch alone, as torchvision has no other.

mixup, which torchvision has for floats alone, gets those there.

All take turns, round by round; what happens with a probability is a mean over all rounds. Beside the wall clock's there
are images a second of processor time, of all threads together, which say more on a busy machine. `over_torchvision` is
a ratio of these, image by image.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from kdcache.pipeline.views.draws import words
from kdcache.pipeline.views.operations.kinds.mix import mixed
from kdcache.pipeline.views.policy import OPERATIONS
from kdcache.train.bench.bench import machine

BATCHES = {32: 1024, 224: 64}  # images a batch by their side
ALONE = {32: 256, 224: 32}  # images that are transformed one by one
OURS, TENSORS, PIL, BATCH = (
    "kdcache",
    "torchvision, tensors one by one",
    "torchvision, PIL",
    "torchvision, a batch at once",
)
Work = tuple[int, Callable[[], Any]]  # a number of images, and what changes them


def counterparts(side: int) -> dict[str, Callable[..., Any]]:
    """torchvision's transform of each operation's default arguments."""
    blur = v2.GaussianBlur(2 * (side // 20) + 1, (0.1 * side / 224, 2.0 * side / 224))
    one_of = [v2.RandomGrayscale(1), v2.RandomSolarize(128, 1), blur]
    return {
        "color": v2.ColorJitter(0.3, 0.3, 0.3, 0.0),
        "gray": v2.RandomGrayscale(0.2),
        "solarize": v2.RandomSolarize(128, 0.2),
        "blur": v2.RandomApply([blur], 0.5),
        "three": v2.RandomChoice(one_of),
        "trivial": v2.TrivialAugmentWide(),
        "randaugment": v2.RandAugment(2, 9),
        "erase": v2.RandomErasing(0.25),
        "mixup": v2.MixUp(alpha=0.8, num_classes=10),
        "cutmix": v2.CutMix(alpha=1.0, num_classes=10),
    }


def works(name: str, side: int) -> dict[str, Work]:
    """What is measured for an operation at a size."""
    operation, other, count = OPERATIONS[name](), counterparts(side)[name], BATCHES[side]
    noise = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=noise)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(count) % 10
    partners = images.flip(0)
    views = iter(range(10**9))  # every call has draws of its own

    def ours() -> Any:
        drawn = operation.draw(words(0, operation.stream, next(views), range(count), operation.words))
        return mixed(images, partners, drawn) if operation.stage == "mix" else operation.apply(images, drawn)

    if operation.stage == "mix":
        floats = images.float()
        return {OURS: (count, ours), BATCH: (count, lambda: other(floats, labels))}
    few = [image.contiguous() for image in images[: ALONE[side]]]
    found: dict[str, Work] = {
        OURS: (count, ours),
        TENSORS: (len(few), lambda: [other(image) for image in few]),
        BATCH: (count, lambda: other(images)),
    }
    if name != "erase":  # which torchvision has for tensors alone
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in few]
        found[PIL] = (len(few), lambda: [other(picture) for picture in pictures])
    return found


def measure(name: str, side: int, rounds: int) -> dict[str, Any]:
    """Images/s of every way, and the ratio to torchvision's of the same work."""
    todo = works(name, side)
    clocks = {"images_per_second": time.perf_counter, "images_per_processor_second": time.process_time}
    seconds = {clock: dict.fromkeys(todo, 0.0) for clock in clocks}
    for number in range(rounds + 1):
        for way, (_, call) in todo.items():
            before = {clock: now() for clock, now in clocks.items()}
            call()
            if number:  # the first one warms up
                for clock, now in clocks.items():
                    seconds[clock][way] += now() - before[clock]
    rates = {
        clock: {way: todo[way][0] * rounds / took for way, took in ways.items()} for clock, ways in seconds.items()
    }
    of_processor = rates["images_per_processor_second"]
    beside = of_processor.get(TENSORS, of_processor[BATCH])
    return {**rates, "over_torchvision": of_processor[OURS] / beside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/operations.json")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    result: dict[str, Any] = {
        "machine": machine() | {"numpy": np.__version__, "torchvision": torchvision.__version__},
        "load": list(os.getloadavg()),
        "command": f"python bench/operations.py --rounds {a.rounds} --threads {a.threads}",
        "threads": a.threads,
        "batches": BATCHES,
        "sides": {},
    }
    for side in BATCHES:
        result["sides"][side] = {}
        for name, kind in OPERATIONS.items():
            if kind.stage == "geometry":  # which the renderer applies: bench/data.py
                continue
            found = result["sides"][side][name] = measure(name, side, a.rounds)
            rates = ", ".join(f"{way} {rate:,.0f}" for way, rate in found["images_per_processor_second"].items())
            print(f"{name} at {side}: {rates} images a processor second ({found['over_torchvision']:.1f})", flush=True)
    result["load_afterwards"] = list(os.getloadavg())
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
