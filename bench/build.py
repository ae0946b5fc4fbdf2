"""Building beside the bare teacher on as many images, and two processes beside one. Writes JSON.

    python bench/build.py [--out FILE]

32x32 noise in memory, for times do not depend on the pixels. A whole build (its probe, start and end included; of
`kdcache bench`, the loop alone) and the bare teacher on rendered batches take turns of a second; then the same build by
one process of one thread and by two such under torchrun, whose start is not counted. Medians; some 11 minutes on 2
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pixels import images
from safetensors.torch import save_file

from kdcache.pipeline.build.answers import teacher_renderer, view_parameters
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Teacher
from kdcache.train.bench.bench import machine

BATCH, ROUNDS, TOGETHER_ROUNDS = 128, 3, 5
TURN, RESIDENT = 8, 40  # batches
# Samples, classes, stored classes (None: all) and views.
ALONE = {"resnet20": (20480, 100, 20, 2), "resnet56": (10240, 10, None, 2)}
TOGETHER = ("resnet20", 640, 10, 16)


def noise(samples: int, classes: int, split: str) -> tuple[Any, Any]:
    return images(samples if split == "train" else samples // 10, classes)


def of_resnet20(split: str) -> tuple[Any, Any]:
    """Datasets by module:function."""
    return noise(*ALONE["resnet20"][:2], split)


def of_resnet56(split: str) -> tuple[Any, Any]:
    return noise(*ALONE["resnet56"][:2], split)


def of_both(split: str) -> tuple[Any, Any]:
    return noise(*TOGETHER[1:3], split)


def weights(work: Path, network: str, classes: int) -> Path:
    torch.manual_seed(0)
    save_file(build_network(network, classes, 32).state_dict(), work / f"{network}-{classes}.safetensors")
    return work / f"{network}-{classes}.safetensors"


class TakingTurns(Teacher):
    """A build's teacher which, after every few batches, answers as many resident ones for nobody: the bare teacher.

    Seconds apart, this machine is 20% faster or slower; so the two are to be compared within a second.
    """

    resident: list[torch.Tensor]
    calls: int
    bare: float

    def start(self, resident: list[torch.Tensor]) -> None:
        vars(self).update(resident=resident, calls=0, bare=0.0)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        found = super().logits(images)
        vars(self)["calls"] += 1
        if self.calls % TURN == 0:
            started = time.perf_counter()
            for i in range(self.calls - TURN, self.calls):
                super().logits(self.resident[i % len(self.resident)])
            vars(self)["bare"] += time.perf_counter() - started
        return found


def beside_the_bare_teacher(work: Path, network: str) -> dict[str, Any]:
    _, classes, k, views = ALONE[network]
    config = BuildConfig(
        network, str(weights(work, network, classes)), data=f"build:of_{network}", views=views, topk=k,
        batch_size=BATCH, allow_low_accuracy=True, device="cpu",
    )  # fmt: skip
    source = open_source(config)
    parameters = view_parameters(source.train, source.identity, 0, range(RESIDENT * BATCH))
    index = np.split(np.arange(RESIDENT * BATCH), RESIDENT)
    pixels = list(teacher_renderer(source.train, source).batches(parameters, index))
    teacher = TakingTurns(**{field.name: getattr(source.teacher, field.name) for field in fields(Teacher)})
    rates: dict[str, list[float]] = {"build": [], "bare": []}
    for turn in range(ROUNDS + 1):
        teacher.start(pixels)
        built = build(
            replace(config, out=str(work / f"{network}-{turn}")), lambda line: None, replace(source, teacher=teacher)
        )
        if turn:  # the first warms up
            rates["build"].append(built.teacher_images / (built.seconds - teacher.bare))
            rates["bare"].append(teacher.calls // TURN * TURN * BATCH / teacher.bare)
    ratios = [a / b for a, b in zip(rates["build"], rates["bare"], strict=True)]
    return {
        "images": built.teacher_images,
        "threads": torch.get_num_threads(),
        "images_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "build_over_bare": statistics.median(ratios),
        "of_each_round": ratios,
    }


def by_two_processes(work: Path) -> dict[str, Any]:
    network, _, classes, views = TOGETHER
    path = weights(work, network, classes)
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in launchers}
    for turn in range(TOGETHER_ROUNDS):
        for name, launcher in launchers.items():
            line = (
                f"-m kdcache.cli build --teacher {network} --weights {path} --data build:of_both --views {views} "
                f"--batch-size {BATCH} --device cpu --allow-low-accuracy --json --out {work / f'{name}-{turn}'}"
            )
            done = subprocess.run(
                [*launcher, *line.split()], check=True, capture_output=True, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
            seconds[name].append(json.loads(done.stdout)["seconds"])
    ratios = [a / b for a, b in zip(seconds["one"], seconds["two"], strict=True)]
    return {
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "times_faster": statistics.median(ratios),
        "of_each_round": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/build.json")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["KDCACHE_HOME"] = str(work / "home")
        result = {
            "machine": machine(),
            "command": "python bench/build.py",
            "batch": BATCH,
            "rounds": ROUNDS,
            "rounds_of_two_processes": TOGETHER_ROUNDS,
            "beside_the_bare_teacher": {network: beside_the_bare_teacher(work, network) for network in ALONE},
            "two_processes_of_one_thread": by_two_processes(work),
        }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
