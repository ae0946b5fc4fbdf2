"""Teach, build and train on real CIFAR-10, and the cached loss beside the online one; writes JSON.

    python bench/cifar10.py --data imagefolder:PATH --work FOLDER

PATH holds train/CLASS/*.png and test/CLASS/*.png; the results in the repository are of the first 20,000 training
images and all 10,000 test images. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from kdcache.cache import open_cache
from kdcache.pipeline.build.build import BuildResult, build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier, load_teacher
from kdcache.pipeline.teachers.weights import read_weights, taught_file
from kdcache.train.bench.bench import machine
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import OnlineLoader
from kdcache.train.loop.optimisers import Recipe
from kdcache.train.loop.trainer import seeded
from kdcache.train.losses.options import make_loss
from kdcache.train.run import train
from kdcache.train.teach import teach

TEACHER, STUDENT, LOSSES, BATCH = "resnet56", "resnet20", ("ce", "kd", "nkd"), 128


def gradient(model: Classifier, loss: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.reshape(-1) for g in grads]).double()


def cached_beside_online(data: str, exact: Path, default: Path, steps: int, seed: int = 0) -> dict[str, Any]:
    """Along one online NKD run, at the same weights: the loss from records against that of the live teacher."""
    images = open_data(data, "train")
    device = torch.device("cpu")
    teacher = load_teacher(TEACHER, images, device)
    caches = {"float32 dense": open_cache(exact), "as stored by default": open_cache(default)}
    views = min(len(c.views) for c in caches.values())
    online = OnlineLoader(caches["float32 dense"], images, teacher, BATCH, seed=seed, views=views)
    cached = {name: CachedLoader(c, images, BATCH, seed=seed, views=views) for name, c in caches.items()}
    model = Classifier(seeded(seed, lambda: build_network(STUDENT, 10, 32)), images.mean, images.std)
    model.to(memory_format=torch.channels_last)
    loss = make_loss("nkd", 10)
    recipe = Recipe(epochs=-(-steps // len(online)), lr=0.1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    worst = {name: {"relative_error": 0.0, "cosine": 1.0} for name in caches}
    done = 0
    for epoch in range(recipe.epochs):
        for loader in (online, *cached.values()):
            loader.set_epoch(epoch)
        iterators = {name: loader.steps() for name, loader in cached.items()}
        for pixels, labels, records in online.steps():
            logits = model(pixels)
            value = loss(logits, labels, records)
            grad = gradient(model, value)
            for name, iterator in iterators.items():
                same, same_labels, stored = next(iterator)
                assert torch.equal(same, pixels) and torch.equal(same_labels, labels)
                other = loss(logits, labels, stored)
                error = float((other - value).detach().abs() / value.detach().abs())
                cosine = float(torch.nn.functional.cosine_similarity(gradient(model, other), grad, dim=0))
                worst[name]["relative_error"] = max(worst[name]["relative_error"], error)
                worst[name]["cosine"] = min(worst[name]["cosine"], cosine)
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(done, len(online))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            done += 1
            if done % 50 == 0:
                print(f"step {done}: {worst}", flush=True)
            if done == steps:
                return {"steps": done, "batch_size": BATCH, "worst": worst}
    raise AssertionError("the epochs are as many as the steps need")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300, help="of the comparison with the live teacher")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cifar10.json"))
    a = parser.parse_args()
    os.environ["KDCACHE_HOME"] = str(a.work / "home")

    images = open_data(a.data, "train")
    taught = taught_file(TEACHER, images)
    if not taught.exists():
        teach(TeachConfig(TEACHER, data=a.data, epochs=a.teacher_epochs, batch_size=BATCH))
    built = stage(a.work / "build.json", BuildConfig(TEACHER, data=a.data, views=a.views))
    exact = stage(a.work / "exact.json", BuildConfig(TEACHER, data=a.data, views=2, precision="float32"))
    runs = {}
    for loss in LOSSES:
        out = a.work / "runs" / loss
        if not (out / "summary.json").exists():
            train(
                TrainConfig(
                    loss, cache=built["key"], data=a.data, student=STUDENT, epochs=a.epochs, batch_size=BATCH,
                    out=str(out), resume=(out / "config.json").exists(),
                )
            )  # fmt: skip
        runs[loss] = json.loads((out / "summary.json").read_text())
        runs[loss].pop("run")
    compared = cached_beside_online(a.data, Path(exact["path"]), Path(built["path"]), a.steps)
    result = {
        "machine": machine(),
        "command": "python bench/cifar10.py "
        f"--teacher-epochs {a.teacher_epochs} --epochs {a.epochs} --views {a.views} --steps {a.steps}",
        "data": {"training_images": len(images), "evaluation_images": len(open_data(a.data, "eval"))},
        "seeds": [0],
        "teacher": {"name": TEACHER, "epochs": a.teacher_epochs, **read_weights(taught)[1]["metrics"]},
        "student": STUDENT,
        "epochs": a.epochs,
        "build": {k: v for k, v in built.items() if k != "path"},
        "runs": runs,
        "cached_beside_online": compared,
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def stage(file: Path, config: BuildConfig) -> dict[str, Any]:
    """A build's figures from the run that computed it all."""
    if not file.exists():
        result: BuildResult = build(config)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(vars(result), default=str))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    main()
