"""Parsers of data: tars and what is remembered of them, tables, Hugging Face data sets, class maps, images, logits."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fuzz_images
import numpy as np
from damages import BYTES, JSON, LINES, Damage
from forgeries import TAR, ZIP
from PIL import Image

from kdcache.pipeline.data.classmap import map_classes
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.decode import decode_file, image_size
from kdcache.pipeline.imports.config import ImportConfig
from kdcache.pipeline.imports.imports import import_logits
from kdcache.tests.helpers.containers import (
    Sample,
    write_csv,
    write_folder,
    write_hf,
    write_jsonl,
    write_parquet,
    write_tar,
)
from kdcache.tests.helpers.storedlogits import softmax64, write_fkd, write_tinyvit
from parsers.parser import Parser, Prepared, always, contents, in_place, quiet


def small_samples(train: int = 6, val: int = 4) -> list[Sample]:
    """Small images of two sizes."""
    rng, found = np.random.default_rng(0), []
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            content = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8 + i % 2, 9, 3), np.uint8)).save(content, "JPEG" if i % 3 else "PNG")
            found.append(
                Sample(split, ("bloom", "roof")[i % 2], f"{i:03d}.{'jpg' if i % 3 else 'png'}", content.getvalue())
            )
    return sorted(found, key=lambda sample: os.fsencode(sample.path))


def _seen(data: Dataset) -> Any:
    """All that is known of a dataset, and its first images."""
    digest = hashlib.sha256(data.labels.tobytes() + data.sizes.tobytes())
    for i in range(min(3, len(data))):
        digest.update(data.decode(i).numpy().tobytes())
    return digest.hexdigest(), tuple(data.class_names), list(data.paths), data.mean, data.std


def _opening(spec: str, home: Path) -> Callable[[], Any]:
    """Open both splits of a dataset as if for the first time."""

    def read() -> Any:
        shutil.rmtree(home / "datasets", ignore_errors=True)
        return [_seen(open_data(spec, split, home=home)) for split in ("train", "eval")]

    return read


def write_one_tar(path: Path, samples: list[Sample], text: bool) -> None:
    """A tar of these samples, with labels that are text or numbers; one of its names is too long for a header."""
    members = []
    for sample in samples:
        stem = sample.name.partition(".")[0] + ("-" + "long" * 40 if sample.name.startswith("001") else "")
        label = json.dumps({"label": sample.label}).encode() if text else str(sample.id).encode()
        members += [(f"{stem}.{sample.name[-3:]}", sample.content), (f"{stem}.{'json' if text else 'cls'}", label)]
    write_tar(path, members, tarfile.PAX_FORMAT if text else tarfile.GNU_FORMAT)


def _tars(top: Path) -> Prepared:
    samples, home = small_samples(), top / "home"
    files = {}
    for name, text in (("pax", True), ("gnu", False)):
        for split in ("train", "val"):
            files[f"{name} {split}"] = top / name / f"{split}-0.tar"
            write_one_tar(files[f"{name} {split}"], [s for s in samples if s.split == split], text)
    (top / "gnu" / "classes.txt").write_text("bloom\nroof\n")
    files["gnu classes"] = top / "gnu" / "classes.txt"

    def read(name: str, content: bytes) -> Any:
        return ways[name.partition(" ")[0]](name, content)

    ways = {name: in_place(files, _opening(f"wds:{top / name}", home)) for name in ("pax", "gnu")}
    return Prepared(contents(files), read, TAR)


def _remembered(top: Path) -> Prepared:
    """What is remembered of tars, of images and of a data set of a user's own: NumPy's files, which may be replaced."""
    samples, home = small_samples(), top / "home"
    for split in ("train", "val"):
        write_one_tar(top / "tars" / f"{split}-0.tar", [s for s in samples if s.split == split], True)
    write_folder(top / "images", samples)
    specs = (f"wds:{top / 'tars'}", f"imagefolder:{top / 'images'}")

    def opened() -> Any:
        return [_seen(open_data(spec, split, home=home)) for spec in specs for split in ("train", "eval")]

    opened()
    files = {path.name: path for path in (home / "datasets").iterdir()}
    return Prepared(contents(files), in_place(files, opened), ZIP, always)


def _table(write: Callable[[Path, list[Sample]], str], ways: tuple[Damage, ...], top: Path) -> Prepared:
    spec = write(top, small_samples())
    path = Path(spec.partition(":")[2])
    files = {path.suffix: path}
    if path.suffix == ".csv":
        files[".tsv"] = path.with_suffix(".tsv")
        files[".tsv"].write_text(path.read_text().replace('"x,y"', "xy").replace(",", "\t"))
    opens = {name: in_place(files, _opening(f"files:{one}", top / "home")) for name, one in files.items()}
    return Prepared(contents(files), lambda name, content: opens[name](name, content), ways)


def _parquet_parts(good: bytes, others: Any, rng: Any) -> bytes:
    """Damage in the footer, where the places and types of the columns stand."""
    length = int.from_bytes(good[-8:-4], "little")
    at = max(4, len(good) - 8 - length)
    return good[:at] + rng.choice(BYTES[:11])(good[at:-8], others, rng) + good[-8:]


def _hf(form: str, top: Path) -> Prepared:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(top / "hf")}
    (top / "data").mkdir()
    spec = write_hf(top / "data", small_samples(), form)
    found = sorted(p for p in (top / "data").rglob("*") if p.suffix in (".json", ".arrow", ".parquet"))
    files = {str(p.relative_to(top / "data")): p for p in found}
    opening = _opening(spec, top / "home")

    def read() -> Any:
        import datasets

        datasets.config.HF_DATASETS_CACHE = str(top / "hf")
        shutil.rmtree(top / "hf", ignore_errors=True)
        return opening()

    ways = (*JSON[:20], *BYTES) if form == "saved" else (*BYTES, *[_parquet_parts] * 20)
    return Prepared(contents(files), in_place(files, read), ways)


def _class_maps(top: Path) -> Prepared:
    names, teacher = ("bloom", "roof", "sea"), ("flower", "house", "ocean", "tower")
    rows = {"bloom": "flower", "roof": ["house", 3], "sea": 2}
    seeds = {
        "m.json": json.dumps(rows).encode(), "m.csv": b"bloom,flower\nroof,house,3\nsea,2\n",
        "m.tsv": b"bloom\tflower\nroof\thouse\nsea\t2\n",
    }  # fmt: skip

    def read(name: str, content: bytes) -> Any:
        (top / name).write_bytes(content)
        return map_classes(names, str(top / name), teacher, 4)

    return Prepared(seeds, read, (*JSON, *LINES))


def _images(top: Path) -> Prepared:
    """Images of every kind. A PNG has checksums, so its pixels may not change unless they are forged."""
    path = top / "image"
    fuzz_images.fifty_million_zeros()

    def read(name: str, content: bytes) -> Any:
        path.write_bytes(content)
        size = image_size(path)
        pixels = decode_file(path)
        assert pixels.ndim == 3 and pixels.shape[0] == 3, tuple(pixels.shape)
        assert size == pixels.shape[1:] or name.startswith("gif"), (size, tuple(pixels.shape))
        return pixels.shape, pixels.numpy().tobytes()

    def adapted(way: Any) -> Damage:
        def damage(good: bytes, others: Any, rng: Any) -> bytes:
            return bytes(way(good, rng))

        damage.forges = way in fuzz_images.FORGED  # type: ignore[attr-defined]
        damage.__name__ = way.__name__
        return damage

    # What is no image of a known kind is refused, and has no sound pixels to compare with.
    seeds = {name: content for name, content in fuzz_images.sources().items() if name not in ("bmp", "tiff", "png 16")}
    return Prepared(seeds, read, tuple(map(adapted, fuzz_images.DAMAGES)), lambda name, content: "png" in name)


def _stored(kind: str, top: Path) -> Prepared:
    """Logits that other projects have stored, up to a cache of them."""
    classes, k, views = 2, 1, 2
    write_folder(top / "data", small_samples())
    data = open_data(f"imagefolder:{top / 'data'}", "train", home=top / "home")
    rng = np.random.default_rng(0)
    p = softmax64(rng.normal(0, 1, (views, len(data), classes)) + 8 * np.eye(classes)[data.labels[:, 0]])
    if kind == "tinyvit":
        keys = [str(i) for i in range(len(data))]
        where = write_tinyvit(top / "stored", keys, p, rng.integers(0, 2**31 - 1, (views, len(data))), k)
    else:
        boxes = np.tile(np.array([0, 0, 8, 8]), (views, len(data), 1))
        where = write_fkd(top / "stored", data, p, boxes, rng.integers(0, 2, (views, len(data))), k)
    files = {str(path.relative_to(where)): path for path in sorted(where.rglob("*")) if path.is_file()}
    out = top / "out"
    config = ImportConfig(
        kind, str(where), f"imagefolder:{top / 'data'}", out=str(out), allow_low_accuracy=True, classes=classes
    )  # type: ignore[arg-type]

    def read() -> Any:
        shutil.rmtree(out, ignore_errors=True)
        os.environ["KDCACHE_HOME"] = str(top / "home")
        return import_logits(config, quiet).key

    return Prepared(contents(files), in_place(files, read), ZIP if kind == "fkd" else (*BYTES, *LINES[:12]))


PARSERS = (
    Parser("tars", 30, _tars),
    Parser("remembered data", 20, _remembered),
    Parser("csv and tsv", 30, partial(_table, write_csv, LINES)),
    Parser("jsonl", 30, partial(_table, write_jsonl, LINES)),
    Parser("parquet", 20, partial(_table, write_parquet, (*BYTES, *[_parquet_parts] * 20)), slow=True),
    Parser("hf folders", 4, partial(_hf, "saved"), slow=True),
    Parser("hf parquet", 2, partial(_hf, "parquet"), slow=True),
    Parser("class maps", 60, _class_maps),
    Parser("images", 30, _images, megabytes=fuzz_images.MEGABYTES),
    Parser("TinyViT's logits", 6, partial(_stored, "tinyvit"), slow=True),
    Parser("FKD's logits", 8, partial(_stored, "fkd"), slow=True),
)
