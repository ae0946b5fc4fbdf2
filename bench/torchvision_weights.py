"""Every weights entry of every torchvision classifier, as a teacher: its logits are torchvision's. Writes JSON.

    python bench/torchvision_weights.py [--only resnet]     (an hour on a core; it goes on where it was)

The published files are not needed: for each entry a file of random values is written where torch.hub keeps downloads
(in a folder of its own), by the name, the keys and the shapes of the published one. Then the entry is a teacher by its
name, which answers an image that torchvision's own network gets through its own transforms, and by its file, which
must give the same identity (and so the same tensors). `difference` is the largest between the logits, as a part of
`spread`, the largest between torchvision's logits for two images.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.transforms.v2 import functional as tv

from kdcache.cache.files import replace_file
from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.pipeline.teachers.teacher import load_teacher
from kdcache.train.bench.bench import machine

RESULT = Path(__file__).parent / "results" / "torchvision_weights.json"
# Files from before torch 0.4.1, whose batch norms did not count batches.
_UNCOUNTED = re.compile(r"^(resnet(18|34|50|101|152) IMAGENET1K_V1|densenet\d+ .*|vgg\d+_bn .*)$")


def entries() -> list[tuple[str, WeightsEnum]]:
    """Each network's name and weights that have a classifier, the quick ones first."""
    names = models.list_models(module=models)
    found = [(name, entry) for name in names for entry in models.get_model_weights(name) if entry.meta["categories"]]
    return sorted(found, key=lambda one: one[1].meta["_ops"] + one[1].meta["num_params"] / 1e7)


def name_for_kdcache(name: str) -> str:
    return "torchvision/vgg13" if name == "vgg13" else name  # the plain one is the CIFAR network


def published(name: str, entry: WeightsEnum) -> OrderedDict[str, Tensor]:
    """Random values by the keys that the published file has.

    Those are today's, but for the files that torchvision's loading code translates: densenets have norm.1 for norm1,
    vision transformers linear_1 and linear_2 for 0 and 3. Tables of indices are the network's own.
    """
    computing = name.startswith(("swin", "maxvit", "regnet"))  # their tables, or their widths, as they are built
    with torch.device("cpu" if computing else "meta"):
        network = models.get_model(name, weights=None, **options(name, entry))
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(len(name)))
    state: OrderedDict[str, Tensor] = OrderedDict()  # as OrderedDict[...](), a file would hold its type
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked") and _UNCOUNTED.match(f"{name} {entry.name}"):
            continue
        state[old_key(name, key)] = _filled(key, value, noise, gain_of(name))
    if not name.startswith(("densenet", "vit_")) and not _UNCOUNTED.match(f"{name} {entry.name}"):
        state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    return state


def options(name: str, entry: WeightsEnum) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": entry.meta["min_size"][0]}
    return {"aux_logits": True, "init_weights": False} if name in ("inception_v3", "googlenet") else {}


def old_key(name: str, key: str) -> str:
    if name.startswith("densenet"):
        return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12]\.)", r"\1.\2", key)
    if name.startswith("vit_"):
        return key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")
    return key


def gain_of(name: str) -> float:
    """By what each layer multiplies the variance. 2 suits ReLU; the deepest networks would explode, and lose digits."""
    gains = {"efficientnet_v2": 1.0, "efficientnet_b7": 1.4, "regnet_y_128gf": 1.6}
    return next((gain for start, gain in gains.items() if name.startswith(start)), 2.0)


def _filled(key: str, like: Tensor, noise: Tensor, gain: float) -> Tensor:
    """Values that keep what flows through the network of a usual size: chaos would magnify rounding."""
    if not like.is_floating_point() or "relative_coords" in key:
        return torch.zeros(like.shape, dtype=like.dtype) if like.is_meta else like.clone()
    values = noise.repeat(-(-like.numel() // len(noise)))[: like.numel()].reshape(like.shape)
    if key.endswith("running_var"):
        return 0.5 + values.abs()
    if like.ndim > 1:
        return values * (gain * len(like) / like.numel()) ** 0.5
    return 0.01 * values + (1 if key.endswith("weight") else 0)


def file_of(entry: WeightsEnum) -> Path:
    """Where torch.hub looks for it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name


def write(name: str, entry: WeightsEnum) -> Path:
    """Put a file of random values there."""
    file = file_of(entry)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(published(name, entry), file)
    return file


def any_data(classes: int = 3) -> ArrayDataset:
    """In-memory images of 32 pixels: what a pretrained teacher wants to see does not come from them."""
    labels, pixels = np.arange(classes)[:, None], torch.zeros((classes, 32, 32, 3), dtype=torch.uint8)
    sizes = np.full((classes, 2), 32, np.int32)
    names = tuple(f"class {i}" for i in range(classes))
    return ArrayDataset("any", "train", labels, names, sizes, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), pixels)


def pictures(size: int) -> Tensor:
    """uint8 [2, 3, size, size]: smooth colours, as in photographs."""
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return (nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def torchvisions_answer(name: str, entry: WeightsEnum) -> tuple[Tensor, Tensor]:
    """Two images of the size of the weights' transforms, and the logits [2, C] by torchvision alone."""
    preset, network = entry.transforms(), models.get_model(name, weights=entry).eval()
    shown = pictures(preset.crop_size[0])
    with torch.inference_mode():
        return shown, network(tv.normalize(tv.to_dtype(shown, scale=True), preset.mean, preset.std))


def check(name: str, entry: WeightsEnum) -> dict[str, Any]:
    """One entry: kdcache's teacher by name answers as torchvision's network, and is the one by file, bit by bit."""
    start, file = time.monotonic(), write(name, entry)
    shown, theirs = torchvisions_answer(name, entry)
    gc.collect()
    spread, device = float((theirs[0] - theirs[1]).abs().max()), torch.device("cpu")
    teacher = load_teacher(name_for_kdcache(name), any_data(), device, weights=entry.name)
    difference = float((teacher.logits(shown[:1]) - theirs[:1]).abs().max())
    identity = teacher.identity
    found = {"network": name, "weights": entry.name, "teacher": teacher.about}
    del teacher
    gc.collect()
    by_file = load_teacher(name_for_kdcache(name), any_data(), device, weights=str(file)).identity
    file.unlink()
    same = by_file == identity
    seconds = round(time.monotonic() - start, 1)
    return {**found, "spread": spread, "difference": difference / spread, "file_is_the_same": same, "seconds": seconds}


def main() -> None:
    """Check all entries, or those whose name begins so, and file the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Networks whose names begin so.")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    about = {"machine": machine(), "torch": str(torch.__version__), "torchvision": torchvision.__version__}
    each: list[dict[str, Any]] = json.loads(chosen.out.read_text())["each"] if chosen.out.exists() else []
    done = {(one["network"], one["weights"]) for one in each}
    with tempfile.TemporaryDirectory() as home:
        os.environ["TORCH_HOME"] = home
        for name, entry in entries():
            if not name.startswith(chosen.only) or (name, entry.name) in done:
                continue
            each.append(check(name, entry))
            print(json.dumps(each[-1]), flush=True)
            summary = {
                "command": "python bench/torchvision_weights.py", "entries": len(each),
                "largest_difference": max(one["difference"] for one in each),
                "files_that_are_another_teacher": [
                    f"{one['network']} {one['weights']}" for one in each if not one["file_is_the_same"]
                ],
            }  # fmt: skip
            replace_file(chosen.out, (json.dumps({**about, **summary, "each": each}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
