"""Real images, and the containers of every kind that they can be put into: one writer each, in WRITERS."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdcache.tests.helpers.images import photograph

CLASSES = ("bloom", "roof")


@dataclass(frozen=True)
class Sample:
    """One image file's content, and its class: one of CLASSES, an id, or what is no label, for a test of that."""

    split: str  # train or val
    label: Any
    name: str  # with its ending, and unique in its split
    content: bytes

    @property
    def path(self) -> str:
        return f"{self.split}/{self.label}/{self.name}"

    @property
    def id(self) -> Any:
        return CLASSES.index(self.label) if self.label in CLASSES else self.label


def pictures(train: int = 17, val: int = 7, side: int = 0) -> list[Sample]:
    """Cuts of scikit-learn's two photographs as JPEG and PNG files, by class, of many sizes (or all of one side)."""
    photos = {"roof": photograph("china"), "bloom": photograph("flower")}
    rng = np.random.default_rng(0)
    found = []
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            label = CLASSES[i % 2]
            top, left, height, width = (int(x) for x in rng.integers((0, 0, 66, 66), (300, 500, 120, 120)))
            cut = photos[label][top : top + (side or height), left : left + (side or width)]
            file = io.BytesIO()
            Image.fromarray(cut).save(file, "PNG" if i % 3 == 1 else "JPEG")
            ending = "png" if i % 3 == 1 else "jpg"
            found.append(
                Sample(split, label, f"{i:03d} é.{ending}" if i == 4 else f"{i:03d}.{ending}", file.getvalue())
            )
    return sorted(found, key=lambda sample: os.fsencode(sample.path))


def write_folder(top: Path, samples: list[Sample]) -> str:
    for sample in samples:
        (top / sample.path).parent.mkdir(parents=True, exist_ok=True)
        (top / sample.path).write_bytes(sample.content)
    return f"imagefolder:{top}"


def write_csv(top: Path, samples: list[Sample], ids: bool = False) -> str:
    write_folder(top, samples)
    with (top / "table.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["split", "path", "more", "label"])
        rows.writerows([s.split, s.path, "x,y", s.id if ids else s.label] for s in reversed(samples))
    return f"files:{top}/table.csv"


def write_jsonl(top: Path, samples: list[Sample]) -> str:
    write_folder(top, samples)
    rows = [{"file_name": s.path, "label": s.label, "split": s.split} for s in samples]
    (top / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"files:{top}/table.jsonl"


def write_parquet(top: Path, samples: list[Sample]) -> str:
    """A table in a .parquet file. Names of classes are a category, as pandas calls it."""
    import pyarrow as pa  # slow, and most tests do without it
    import pyarrow.parquet as pq

    write_folder(top, samples)
    labels = pa.array([s.label for s in samples])
    columns = {"more": [1.5] * len(samples), "Path": [s.path for s in samples], "split": [s.split for s in samples]}
    table = pa.table(columns | {"target": labels.dictionary_encode() if pa.types.is_string(labels.type) else labels})
    pq.write_table(table, top / "table.parquet", row_group_size=7)
    return f"files:{top}/table.parquet"


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def members(samples: list[Sample], json_labels: bool = False) -> list[tuple[str, bytes]]:
    found = []
    for s in samples:
        stem = s.name.partition(".")[0]
        label = (f"{stem}.json", json.dumps({"label": s.label}).encode())
        found += [(s.name, s.content), label if json_labels else (f"{stem}.cls", str(s.label).encode())]
    return found


def write_tars(top: Path, samples: list[Sample], json_labels: bool = False) -> str:
    """Tars of five samples, train-000.tar and so on."""
    for split in ("train", "val"):
        of_split = [s for s in samples if s.split == split]
        for i in range(0, len(of_split), 5):
            write_tar(top / f"{split}-{i // 5:03d}.tar", members(of_split[i : i + 5], json_labels))
    tars = len([s for s in samples if s.split == "train"])
    return f"wds:{top}/train-{{000..{(tars - 1) // 5:03d}}}.tar::{top}/val-*.tar"


def hf_rows(samples: list[Sample]) -> Any:
    """The samples as a `datasets.Dataset`. Its classes are listed in the order of CLASSES."""
    import datasets  # slow, and most tests do without it

    named = all(s.label in CLASSES for s in samples)
    features = {"n": datasets.Value("int64")} | ({"label": datasets.ClassLabel(names=list(CLASSES))} if named else {})
    rows: dict[str, list[Any]] = {
        "image": [{"bytes": s.content, "path": s.name} for s in samples],
        "label": [s.id for s in samples],
        "n": list(range(len(samples))),
    }
    if not named:
        whole = all(isinstance(label, int | None) for label in rows["label"])
        features["label"] = datasets.Value("int64" if whole else "float64")
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features | {"image": datasets.Image()}))


def write_hf(top: Path, samples: list[Sample], form: str = "saved") -> str:
    """A Hugging Face data set, in files of a few samples: saved by save_to_disk, or as a folder of parquet files."""
    import datasets  # slow, and most tests do without it

    datasets.disable_progress_bars()
    splits = {name: [s for s in samples if s.split == split] for name, split in (("train", "train"), ("test", "val"))}
    rows = datasets.DatasetDict({name: hf_rows(one) for name, one in splits.items()})
    if form == "saved":
        rows.save_to_disk(str(top), num_shards={name: max(1, min(3, len(one))) for name, one in rows.items()})
        return f"hf:{top}"
    for name, one in rows.items():
        parts = max(1, min(2, len(one)))
        for i in range(parts):
            (top / "data").mkdir(exist_ok=True)
            part = one.shard(parts, i, contiguous=True)
            part.to_parquet(str(top / "data" / f"{name}-{i:05d}-of-{parts:05d}.parquet"), batch_size=3)
    return f"hf:{top}"


# The code of a user's module. FORM says what its samples are; FILES holds path, label and split of each.
_MODULE = """
import io, json
from pathlib import Path
import numpy as np
import torch
from PIL import Image

from kdcache.tests.helpers.images import photograph

TOP = Path({top!r})
FILES = json.loads((TOP / "files.json").read_text())

class Own(torch.utils.data.Dataset):
    if {named}:
        classes = ["bloom", "roof"]

    def __init__(self, split, form):
        self.rows = [row for row in FILES if row[2] == {{"train": "train", "eval": "val"}}[split]]
        self.form = form

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        path, label, _ = self.rows[i]
        if self.form == "bytes":
            return (TOP / path).read_bytes(), label
        image = Image.open(io.BytesIO((TOP / path).read_bytes()))
        if self.form == "image":
            return image, label
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), np.int64(label) if type(label) is int else label

def images(split):
    return Own(split, "image")

def contents(split):
    return Own(split, "bytes")

def tensors(split):
    return Own(split, "tensor")

def half(split):
    return torch.utils.data.Subset(Own(split, "bytes"), range(0, len(Own(split, "bytes")), 2))

def paths(split):
    rows = Own(split, "bytes").rows
    found = [str(TOP / row[0]) for row in rows], [row[1] for row in rows]
    return (*found, Own.classes) if {named} else found
"""


def write_module(top: Path, samples: list[Sample], function: str) -> str:
    """A module of a name of its own in `top`, which must be on the path of modules."""
    write_folder(top, samples)
    (top / "files.json").write_text(json.dumps([(s.path, s.id, s.split) for s in samples]))
    name = f"own_{abs(hash(top))}"
    named = all(s.label in CLASSES for s in samples)
    (top / f"{name}.py").write_text(_MODULE.format(top=str(top), named=named))
    return f"{name}:{function}"


Write = Callable[[Path, list[Sample]], str]  # fills an empty folder, and gives the spec of the data
WRITERS: dict[str, Write] = {
    "folder": write_folder,
    "csv": write_csv,
    "jsonl": write_jsonl,
    "hf": write_hf,
    "parquet": write_parquet,
    "hf parquet": partial(write_hf, form="parquet"),
    "tars": write_tars,
    "tars with json": partial(write_tars, json_labels=True),
    "PIL images": partial(write_module, function="images"),
    "bytes": partial(write_module, function="contents"),
    "tensors": partial(write_module, function="tensors"),
    "paths": partial(write_module, function="paths"),
}
OF_ITEMS = ("tars", "tars with json", "bytes", "hf", "hf parquet")  # whose fingerprints are of the same things
OF_TEXT = ("csv", "tars")  # whose labels are written as text, without a type
OF_COLUMNS = ("hf", "hf parquet", "parquet")  # whose labels are a column of one type


def files_of(top: Path, sample: Sample) -> list[Path]:
    """The files in a container that hold the image of a sample: one of its own, or some with others' images."""
    if (own := top / sample.path).exists():
        return [own]
    return [path for path in top.rglob("*") if path.is_file() and path.suffix in (".tar", ".arrow", ".parquet")]
