"""The file path at ImageNet's shape: a 1,000-class teacher on 224-pixel JPEG files, built, verified and trained from.

    python bench/files.py --work FOLDER

What a build consists of, decoding once for several views and the bare teacher, is measured in turns (`kdcache bench`
compares whole builds with them). The images are seeded cut-outs of the two photographs that scikit-learn carries, at
sizes from 256 to 400 pixels, in ten class folders; the teacher is a resnet34 with random weights, so the accuracies
mean nothing: this measures the path, not the method. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from kdcache.cache import open_cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Source, open_source
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.verify import verify
from kdcache.pipeline.views.parameters import ViewParameters, draw
from kdcache.pipeline.views.render import Renderer
from kdcache.train.bench.bench import machine
from kdcache.train.config import TrainConfig
from kdcache.train.run import train

IMAGES, CLASSES, VIEWS, BATCH, ROUNDS = 240, 10, 8, 32, 3


def make_folder(folder: Path, images: int = IMAGES, sides: tuple[int, int] = (256, 400)) -> None:
    """So many JPEG files in train/ and a quarter as many in val/, the same ones every time. sides: in pixels."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("val", images // 4)):
        for i in range(count):
            path = folder / split / f"class{i % CLASSES}" / f"{i:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph = photographs[i % 2]
            height, width = rng.integers(*sides, 2)
            top, left = (rng.integers(0, s - c + 1) for s, c in zip(photograph.shape, (height, width), strict=False))
            Image.fromarray(photograph[top : top + height, left : left + width]).save(path, quality=90)


def rate(renderer: Renderer, batches: list[np.ndarray], parameters: list[ViewParameters]) -> float:
    """Views/s of decoding and cutting alone, each image decoded once for all of them."""
    places = range(len(parameters))
    start = time.perf_counter()
    count = sum(len(images) for *_, images in renderer.views(parameters, [(batch, places) for batch in batches]))
    return count / (time.perf_counter() - start)


def in_turns(source: Source) -> dict[str, float]:
    """Medians of images/s: decoding by views a decode, and the bare teacher."""
    batches = np.split(np.arange(IMAGES), range(BATCH, IMAGES, BATCH))
    parameters = [draw("rrc,flip", 0, view, range(IMAGES), source.train.sizes) for view in range(VIEWS)]
    renderer = Renderer(source.train, 224, torch.device("cpu"))
    pixels = next(iter(renderer.batches(parameters[0], batches[:1])))
    source.teacher.logits(pixels)
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for n in (1, 2, 4, VIEWS):
            found.setdefault(f"decoded once for {n}", []).append(rate(renderer, batches, parameters[:n]))
        start = time.perf_counter()
        for _ in batches:
            source.teacher.logits(pixels)
        found.setdefault("bare teacher", []).append(len(batches) * len(pixels) / (time.perf_counter() - start))
    return {name: statistics.median(rates) for name, rates in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/files.json")
    a = parser.parse_args()
    os.environ["KDCACHE_HOME"] = str(a.work / "home")
    folder, weights, classes = a.work / "images", a.work / "teacher.safetensors", a.work / "classes.json"
    make_folder(folder)
    torch.manual_seed(0)
    teacher = Classifier(build_network("resnet34", 1000, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    save_file(teacher.network.state_dict(), weights)
    classes.write_text(json.dumps({f"class{i}": 97 * i for i in range(CLASSES)}))
    config = BuildConfig(
        "resnet34", str(weights), data=f"imagefolder:{folder}", views=VIEWS, class_map=str(classes),
        allow_low_accuracy=True, batch_size=BATCH,
    )  # fmt: skip
    source = open_source(config)
    rates = in_turns(source)
    built = build(config, source=source)
    report = verify(open_cache(built.path), source, replay=64)
    summary = train(
        TrainConfig(
            "nkd", cache=str(built.path), data=config.data, student="resnet18", epochs=1, batch_size=32,
            image_size=160, out=str(a.work / "run"),
        )
    )  # fmt: skip
    result = {
        "machine": machine(),
        "command": "python bench/files.py",
        "images": IMAGES,
        "evaluation_images": IMAGES // 4,
        "views": VIEWS,
        "rounds": ROUNDS,
        "images_per_second": {**rates, "built": built.teacher_images / built.seconds},
        "records": {"k": 20, "bytes_of_the_whole_cache": built.bytes, "bytes_a_record": built.bytes / (IMAGES * VIEWS)},
        "verify": {"passed": report.passed, "total_variation": report.total_variation, "replayed": report.replayed},
        "student_seconds_an_epoch": summary["seconds_an_epoch"],
        "student_loss": summary["loss"],
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
