"""Teach, build and train on real CIFAR-10, and the cached loss beside the online one; writes JSON.

    python bench/cifar10.py --data imagefolder:PATH --work FOLDER
    python bench/cifar10.py --data imagefolder:PATH --work FOLDER --mixed

PATH holds train/CLASS/*.png and test/CLASS/*.png; the results in the repository are of the first 20,000 training
images and all 10,000 test images. Stopped at any moment, the same command goes on.

With --mixed, views are strong and mixed, the networks are small, and the data are the first 10,000 training and 2,000
test images. Three losses are compared along one run, of which kd takes no labels (alpha=0), and no student is trained
from default records. Instead a whole run from float32 records is compared with one that has the teacher in every step
and a new view in every epoch: every weight and every metric.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

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
from kdcache.train.losses.base import Loss
from kdcache.train.losses.options import make_loss
from kdcache.train.run import train
from kdcache.train.teach import teach

LOSSES, BATCH = ("ce", "kd", "nkd"), 128


@dataclass(frozen=True)
class Setting:
    """What the figures are of, and how much of it. compared: the losses; the student learns by the first one."""

    teacher: str
    student: str
    policy: str
    compared: tuple[str, ...]
    teacher_epochs: int
    epochs: int
    views: int
    exact_views: int  # of the cache with float32 dense records
    out: str


PLAIN = Setting("resnet56", "resnet20", "crop,flip", ("nkd",), 60, 60, 16, 2, "cifar10.json")
MIXED = Setting(
    "resnet20", "resnet8", "crop,flip,randaugment(2,9),erase(0.25),mixup(0.2),cutmix(1)", ("nkd", "kd:alpha=0", "ce"),
    4, 2, 4, 4, "cifar10_mixed.json",
)  # fmt: skip


def gradient(model: Classifier, logits: torch.Tensor, of_logits: torch.Tensor) -> torch.Tensor:
    """The loss's gradient by the weights, from that by the logits."""
    grads = torch.autograd.grad(logits, list(model.parameters()), of_logits, retain_graph=True)
    return torch.cat([g.reshape(-1) for g in grads]).double()


def cached_beside_online(
    data: str, setting: Setting, exact: Path, default: Path, steps: int, seed: int = 0
) -> dict[str, Any]:
    """Along one online run, at the same weights: losses from records against those of the live teacher."""
    images = open_data(data, "train")
    teacher = load_teacher(setting.teacher, images, torch.device("cpu"))
    caches = {"float32 dense": open_cache(exact), "as stored by default": open_cache(default)}
    views = min(len(c.views) for c in caches.values())
    online = OnlineLoader(caches["float32 dense"], images, teacher, BATCH, seed=seed, views=views)
    cached = {name: CachedLoader(c, images, BATCH, seed=seed, views=views) for name, c in caches.items()}
    model = Classifier(seeded(seed, lambda: build_network(setting.student, 10, 32)), images.mean, images.std)
    model.to(memory_format=torch.channels_last)
    losses = {name: make_loss(name, 10) for name in setting.compared}
    recipe = Recipe(epochs=-(-steps // len(online)), lr=0.1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    worst = {name: {loss: {"relative_error": 0.0, "cosine": 1.0} for loss in losses} for name in caches}
    done = 0
    for epoch in range(recipe.epochs):
        for loader in (online, *cached.values()):
            loader.set_epoch(epoch)
        for live, *stored in zip(online.steps(), *(loader.steps() for loader in cached.values()), strict=True):
            logits = model(live[0])
            assert all(torch.equal(live[i], other[i]) for other in stored for i in (0, 1))
            for loss in losses:
                pairs = {name: worst[name][loss] for name in cached}
                compare(model, logits, losses[loss], live, list(zip(pairs.values(), stored, strict=True)))
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(done, len(online))
            optimiser.zero_grad()
            losses[setting.compared[0]](logits, *live[1:]).backward()
            optimiser.step()
            done += 1
            if done % 50 == 0:
                print(f"step {done}: {worst}", flush=True)
            if done == steps:
                found = {name: of[setting.compared[0]] if len(losses) == 1 else of for name, of in worst.items()}
                return {"steps": done, "batch_size": BATCH, "worst": found}
    raise AssertionError("the epochs are as many as the steps need")


def compare(
    model: Classifier,
    logits: torch.Tensor,
    loss: Loss,
    live: tuple[torch.Tensor, ...],
    stored: Sequence[tuple[dict[str, float], tuple[torch.Tensor, ...]]],
) -> None:
    """Note in each `worst` how far the loss from stored records, and its gradient, are from the live teacher's."""
    value = loss(logits, *live[1:])
    (of_logits,) = torch.autograd.grad(value, logits, retain_graph=True)
    grad = None
    for worst, batch in stored:
        other = loss(logits, *batch[1:])
        (of_other,) = torch.autograd.grad(other, logits, retain_graph=True)
        error = float((other - value).detach().abs() / value.detach().abs())
        worst["relative_error"] = max(worst["relative_error"], error)
        if not torch.equal(of_other, of_logits):  # else the weights' are equal too
            grad = gradient(model, logits, of_logits) if grad is None else grad
            cosine = float(torch.nn.functional.cosine_similarity(gradient(model, logits, of_other), grad, dim=0))
            worst["cosine"] = min(worst["cosine"], cosine)


def run_beside_online(data: str, setting: Setting, key: str, work: Path) -> dict[str, Any]:
    """A whole run from float32 records beside one with the teacher there: whether they are the same, and accuracies."""
    folders = {online: work / "runs" / ("online" if online else "cached") for online in (False, True)}
    found, metrics, weights = {}, {}, {}
    for online, out in folders.items():
        if not (out / "summary.json").exists():
            train(
                TrainConfig(
                    setting.compared[0], cache=key, data=data, student=setting.student, epochs=setting.epochs,
                    batch_size=BATCH, online=online, fresh_views=online, out=str(out),
                    resume=(out / "config.json").exists(),
                )
            )  # fmt: skip
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        metrics[online] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        weights[online] = load_file(out / "last.safetensors")
        found["online" if online else "cached"] = json.loads((out / "summary.json").read_text())["top1"]
    same = [torch.equal(weights[False][name], of) for name, of in weights[True].items()]
    return {
        "epochs": setting.epochs,
        "tensors": len(same),
        "tensors_equal": sum(same),
        "metrics_equal": metrics[False] == metrics[True],
        "top1": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--teacher-epochs", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--views", type=int)
    parser.add_argument("--steps", type=int, default=300, help="of the comparison with the live teacher")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    setting = MIXED if a.mixed else PLAIN
    given = {name: getattr(a, name) for name in ("teacher_epochs", "epochs", "views") if getattr(a, name)}
    setting = replace(setting, **given)
    os.environ["KDCACHE_HOME"] = str(a.work / "home")
    load, started = os.getloadavg()[0], time.perf_counter()

    images = open_data(a.data, "train")
    taught = taught_file(setting.teacher, images)
    if not taught.exists():
        teach(TeachConfig(setting.teacher, data=a.data, epochs=setting.teacher_epochs, batch_size=BATCH))
    config = BuildConfig(setting.teacher, data=a.data, augment=setting.policy, views=setting.views)
    built = stage(a.work / "build.json", config)
    exact = stage(a.work / "exact.json", replace(config, views=setting.exact_views, precision="float32"))
    if a.mixed:
        trained = {"run_beside_online": run_beside_online(a.data, setting, exact["key"], a.work)}
    else:
        trained = {"runs": runs(a.data, setting, built["key"], a.work)}
    compared = cached_beside_online(a.data, setting, Path(exact["path"]), Path(built["path"]), a.steps)
    result = {
        "machine": {**machine(), "threads": torch.get_num_threads(), "load": load},
        "command": f"python bench/cifar10.py {'--mixed ' if a.mixed else ''}--teacher-epochs {setting.teacher_epochs} "
        f"--epochs {setting.epochs} --views {setting.views} --steps {a.steps}",
        "data": {"training_images": len(images), "evaluation_images": len(open_data(a.data, "eval"))},
        "seeds": [0],
        "teacher": {"name": setting.teacher, "epochs": setting.teacher_epochs, **read_weights(taught)[1]["metrics"]},
        "student": setting.student,
        "policy": setting.policy,
        "epochs": setting.epochs,
        "build": {k: v for k, v in built.items() if k != "path"},
        **trained,
        "cached_beside_online": compared,
        "seconds": time.perf_counter() - started,
    }
    out = a.out or Path(__file__).parent / "results" / setting.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def runs(data: str, setting: Setting, key: str, work: Path) -> dict[str, Any]:
    """Students by each loss from default records: their summaries."""
    found = {}
    for loss in LOSSES:
        out = work / "runs" / loss
        if not (out / "summary.json").exists():
            train(
                TrainConfig(
                    loss, cache=key, data=data, student=setting.student, epochs=setting.epochs, batch_size=BATCH,
                    out=str(out), resume=(out / "config.json").exists(),
                )
            )  # fmt: skip
        found[loss] = json.loads((out / "summary.json").read_text())
        found[loss].pop("run")
    return found


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
