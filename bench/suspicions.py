"""How often the probe stops honest teachers by mistake, and how often it finds classes that have changed places.

    python bench/suspicions.py --out bench/results/suspicions.json

Honest teachers, of all strengths: linear readers of noisy prototypes, with noise in their weights and favourites among
their classes, some of which are alike; and networks in the first 64 steps of learning scikit-learn's digits. Permuted
ones are readers with a part of their classes exchanged. A teacher near chance is refused as such and not counted.
"""

import argparse
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from kdcache.pipeline.build.suspicions import agreement, choose, moved_classes
from kdcache.train.bench.bench import machine

WIDTH = 32


def reader(rng: np.random.Generator, classes: int, alike: bool, noise: float, wrong: float, bias: float, each: int):
    """Labels and answers of a linear reader of `each` images a class."""
    centres = rng.normal(size=(classes, WIDTH))
    if alike:
        families = rng.integers(0, max(1, classes // 3), classes)
        centres = 0.35 * centres + rng.normal(size=(max(1, classes // 3), WIDTH))[families]
    weights = centres + wrong * rng.normal(size=centres.shape)
    labels = np.repeat(np.arange(classes), each)
    images = centres[labels] + noise * rng.normal(size=(len(labels), WIDTH))
    logits = images @ weights.T + bias * rng.normal(size=classes) - 0.5 * (weights**2).sum(1)
    return labels, logits.argmax(1)


def learners(seeds: int):
    """Labels and answers of networks that are just learning the digits."""
    images, digits = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16 - 0.5).float(), torch.from_numpy(digits)
    for seed, rate, hidden in itertools.product(range(seeds), (0.03, 0.3), (8, 64)):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        optimiser = torch.optim.SGD(network.parameters(), rate, momentum=0.9)
        for step in range(65):
            if step in (1, 2, 4, 8, 16, 32, 64):
                with torch.no_grad():
                    answers = network(x).argmax(1).numpy()
                for count in (128, 512):
                    chosen = choose(digits, len(digits), count)
                    yield digits[chosen], answers[chosen]
            some = torch.randint(0, len(x), (16,))
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(x[some]), y[some]).backward()
            optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, default=4, help="of each kind")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng, count = np.random.default_rng(0), Counter[str]()

    def tell(kind: str, labels: np.ndarray, answers: np.ndarray) -> None:
        if agreement(labels, answers).near_chance:
            count[f"{kind}: near chance"] += 1
            return
        count[f"{kind}: teachers"] += 1
        count[f"{kind}: stopped"] += moved_classes(labels, answers) is not None

    grid = itertools.product(
        (2, 10, 100), (False, True), (0.5, 1.5, 3.0), (0.0, 0.5, 1.0, 2.0), (0.0, 5.0, 15.0), (4, 16, 50)
    )
    for classes, *how in grid:
        for _ in range(args.teachers):
            tell("honest readers", *reader(rng, classes, *how))
    for labels, answers in learners(args.teachers):
        tell("honest learners", labels, answers)
    found: dict[str, dict[str, float]] = {}
    for (classes, moved), each, noise in itertools.product(((10, 2), (100, 4), (100, 31)), (4, 8, 16), (0.5, 1.0, 1.5)):
        right, stopped, teachers = 0.0, 0, 10 * args.teachers
        for _ in range(teachers):
            labels, answers = reader(rng, classes, True, noise, 0.2, 0.0, each)
            places, to = rng.choice(classes, moved, replace=False), np.arange(classes)
            to[places] = np.roll(places, 1)
            right += float((labels == answers).mean()) / teachers
            stopped += moved_classes(labels, to[answers]) is not None
        name = f"{moved} of {classes} classes, {each} images each, teacher right on {100 * right:.0f}%"
        found[name] = {"found": stopped / teachers}
        print(name, stopped / teachers, flush=True)
    result = {**machine(), "numpy": np.__version__, "honest": dict(sorted(count.items())), "permuted": found}
    print(json.dumps(result["honest"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
