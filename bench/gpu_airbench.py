"""Students against the clock, for bench/gpu.py: seconds to 94% and 96% on CIFAR-10 with a cached teacher and without.

After the idea of airbench (github.com/KellerJordan/cifar10-airbench): pixels on the GPU, channels_last, half precision,
a compiled ResNet-9, Nesterov SGD, and no epoch more than needed. The network is a plain ResNet-9 (David Page, "How to
train your ResNet"), without airbench's whitening, test-time augmentation or Muon, which torch has for matrices alone.
The loop is one's own: a CachedLoader's steps, and a loss of the table. Teacher and students see crops and flips; the
students' are those of the cache, with and without the teacher.

The time to an accuracy is that of the shortest of a few runs, each of so many epochs with a learning rate that ends at
0, that reaches it. Compiling and evaluating are not counted; reading the cache is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_parts import Setting, waited
from torch import Tensor, nn

from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.process.device import pick_device
from kdcache.pipeline.teachers.teacher import Classifier, file_classifier
from kdcache.pipeline.views.render import Renderer
from kdcache.train.evaluation.metrics import metrics, predict
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.live import PlainLoader
from kdcache.train.loop.trainer import Loader
from kdcache.train.losses.base import Loss
from kdcache.train.losses.options import make_loss

POLICY, BATCH, CLASSES, TARGETS = "crop,flip", 512, 10, (0.94, 0.96)
TEACHER_EPOCHS, VIEWS, EPOCHS = 16, 8, (8, 16, 30)
_PEAK, _WARM = 0.4, 0.2  # the learning rate of a batch of 512, and the part of the run in which it rises
_WIDE, _NARROW, _DRY = 128, 64, 4  # channels of the first layer: the teacher's, a student's, in a dry run


def _layer(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
    layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), nn.GELU())


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.both = nn.Sequential(_layer(channels, channels), _layer(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.both(x)
        return out


class ResNet9(nn.Module):
    """Logits [B, 10] of images [B, 3, 32, 32]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _layer(3, width),
            _layer(width, 2 * width, pool=True), _Residual(2 * width),
            _layer(2 * width, 4 * width, pool=True),
            _layer(4 * width, 8 * width, pool=True), _Residual(8 * width),
        )  # fmt: skip
        self.head = nn.Linear(8 * width, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.adaptive_max_pool2d(self.features(x), 1).flatten(1)) / 8
        return out


def wide() -> nn.Module:
    """The teacher's network, for --teacher gpu_airbench:wide."""
    return ResNet9(_WIDE)


def tiny() -> nn.Module:
    """The teacher's network in a dry run."""
    return ResNet9(_DRY)


def learn(model: Classifier, forward: Any, loss: Loss, loader: Loader, epochs: int, device: torch.device) -> float:
    """Train from new weights on; seconds."""
    half = torch.bfloat16
    optimiser = torch.optim.SGD(model.parameters(), 1.0, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
    total = epochs * len(loader)

    def rate(step: int) -> float:
        peak = _PEAK * BATCH / 512
        return peak * min((step + 1) / (_WARM * total), (total - step) / ((1 - _WARM) * total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    model.train()
    waited(device)
    began = time.perf_counter()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels, records in loader.steps():
            with torch.autocast(device.type, half):
                logits = forward(images)
            loss(logits, labels, records).backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
    waited(device)
    return time.perf_counter() - began


def top1(model: Classifier, data: Dataset, device: torch.device) -> float:
    labels = torch.from_numpy(data.labels[:, 0])
    return metrics(predict(model, data, Renderer(data, None, device, workers=0), torch.bfloat16), labels)["top1"]


def _classifier(network: nn.Module, data: Dataset, device: torch.device) -> Classifier:
    return Classifier(network, data.mean, data.std).to(device).to(memory_format=torch.channels_last)


def _forward(model: Classifier, setting: Setting) -> Any:
    return model if setting.dry else torch.compile(model)


def teach_and_build(setting: Setting) -> dict[str, Any]:
    """A wide ResNet-9, and a cache of its answers, which lie in the work folder from then on."""
    device, place = pick_device(setting.device), setting.work / "fast"
    place.mkdir(exist_ok=True)
    data, held_out = (open_data(setting.small, split) for split in ("train", "eval"))
    epochs, views, batch = (1, 2, 32) if setting.dry else (TEACHER_EPOCHS, VIEWS, BATCH)
    torch.manual_seed(0)
    model = _classifier(tiny() if setting.dry else wide(), data, device)
    loader = PlainLoader(data, POLICY, batch, 32, seed=0, device=device, workers=0)
    seconds = learn(
        model, _forward(model, setting), make_loss("ce:label_smoothing=0.2", CLASSES), loader, epochs, device
    )
    weights = place / "teacher.safetensors"
    notes = {"input_size": 32, "mean": data.mean, "std": data.std, "class_names": data.class_names}
    file_classifier(weights, model, notes)
    found = top1(model, held_out, device)
    name = "gpu_airbench:tiny" if setting.dry else "gpu_airbench:wide"
    config = BuildConfig(name, str(weights), data=setting.small, augment=POLICY, views=views, amp="bf16",
                         device=setting.device, allow_low_accuracy=True, out=str(place / "cache"))  # fmt: skip
    built = build(config)
    return {
        "pixels": setting.pixels, "top1": found, "epochs": epochs, "seconds_with_compiling": seconds, "views": views,
        "build_seconds": built.seconds, "build_images_per_second": built.teacher_images / built.seconds,
        "cache_bytes": built.bytes,
    }  # fmt: skip


def students(setting: Setting, loss: str) -> dict[str, Any]:
    """Runs of several lengths by a loss: seconds, accuracy, and the seconds to each target."""
    device, batch = pick_device(setting.device), 32 if setting.dry else BATCH
    cache = Cache(cache_of(setting))
    data, held_out = (open_data(setting.small, split) for split in ("train", "eval"))
    chosen = make_loss(loss, CLASSES)
    model = _classifier(ResNet9(_DRY if setting.dry else _NARROW), data, device)
    forward = _forward(model, setting)
    runs: list[dict[str, Any]] = []
    for epochs in (0, *((1,) if setting.dry else EPOCHS)):
        torch.manual_seed(1)
        renew(model)
        loader = CachedLoader(cache, data, batch, device=device, workers=0)
        if not epochs:
            learn(model, forward, chosen, loader, 1, device)  # compiles
            continue
        seconds = learn(model, forward, chosen, loader, epochs, device)
        runs.append({"epochs": epochs, "seconds": seconds, "top1": top1(model, held_out, device)})
        print(runs[-1], flush=True)
    samples = len(data) // batch * batch
    return {
        "pixels": setting.pixels, "loss": loss, "runs": runs,
        "seconds_to": {f"{target:.0%}": seconds_to(runs, target) for target in TARGETS},
        "images_per_second": samples * runs[-1]["epochs"] / runs[-1]["seconds"],
    }  # fmt: skip


def cache_of(setting: Setting) -> Path:
    found = setting.work / "fast" / "cache"
    if not (found / "identity.json").exists():
        raise FileNotFoundError(f"there is no cache in {found}: the part `fast teacher` builds it")
    return found


def renew(model: nn.Module) -> None:
    """New weights in the same tensors, so that nothing is compiled again."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()


def seconds_to(runs: Sequence[dict[str, Any]] | Iterable[dict[str, Any]], target: float) -> float | None:
    """Seconds of the shortest run that reaches the accuracy; None if none does."""
    return min((run["seconds"] for run in runs if run["top1"] >= target), default=None)
