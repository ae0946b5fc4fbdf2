"""Hugging Face data sets: forms, splits, columns, what is remembered, and one line for each mistake."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache.errors import InputError, UnreadableError
from kdcache.pipeline.data.dataset import Dataset, list_unreadable, open_data
from kdcache.pipeline.data.kinds.containers.hf import kind, library
from kdcache.pipeline.data.kinds.containers.items import ItemDataset
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.tests.helpers.containers import Sample, pictures, write_folder, write_hf
from kdcache.tests.helpers.lazily import Lazily
from kdcache.train.evaluation.otherdata import whole_of
from kdcache.train.plan.resuming import placed

datasets = Lazily("datasets")
SAMPLES = pictures(12, 4)
CONTENTS = [s.content for s in SAMPLES]


@pytest.fixture(autouse=True)
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    datasets.disable_progress_bars()
    return tmp_path


def rows(n: int = 12, **columns: Any) -> Any:
    """n rows with an image, and other columns."""
    images = {"image": [{"bytes": CONTENTS[i % 12], "path": None} for i in range(n)]}
    found = datasets.Dataset.from_dict(images, features=datasets.Features({"image": datasets.Image()}))
    for name, column in columns.items():
        found = found.add_column(name, column[:n])
    return found


def saved(top: Path, found: Any, name: str = "set") -> str:
    found.save_to_disk(str(top / name))
    return f"hf:{top / name}"


def refused(spec: str, message: str, split: str = "train") -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_data(spec, split)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


AB = ["b", "a"] * 6


def same(one: Dataset, other: Dataset) -> None:
    assert np.array_equal(one.labels, other.labels) and np.array_equal(one.sizes, other.sizes)
    assert one.fingerprint() == other.fingerprint() and one.class_names == other.class_names
    assert all(torch.equal(one.decode(i), other.decode(i)) for i in range(len(one)))


def test_every_form_gives_the_same(top: Path) -> None:
    data = open_data(saved(top, rows(label=AB)), "train")
    assert isinstance(data, ItemDataset) and data.name == "hf" and data.class_names == ("a", "b")
    assert len(data) == 12 and "held out" in str(data.note)
    for name in ("one", "two"):
        (top / name).mkdir()
    rows(label=AB).to_parquet(str(top / "one/x.parquet"))
    for i in range(2):
        rows(label=AB).shard(2, i, contiguous=True).to_parquet(str(top / f"two/{i}.parquet"))
    for place in ("one", "one/x.parquet", "two", "two/*.parquet", "two/[01].parquet"):
        found = open_data(f"hf:{top / place}", "train")
        same(found, data)
        assert f"the library datasets keeps its Arrow copy in {os.environ['HF_HOME']}" in str(found.note)
    plain = datasets.Dataset.from_dict({"jpg": CONTENTS[:12], "Class": AB})
    same(open_data(saved(top, plain, "plain"), "train"), data)


def test_splits_and_columns_are_found_or_named(top: Path) -> None:
    sizes = {"train": 6, "validation": 4, "test": 3}
    labels = {"fine": [0, 1, 2] * 4, "coarse": AB}
    features = datasets.ClassLabel(names=["x", "y", "z"])
    found = {name: rows(n, **labels).cast_column("fine", features) for name, n in sizes.items()}
    spec = saved(top, datasets.DatasetDict(found))
    train, held = (open_data(spec, split) for split in ("train", "eval"))
    assert (len(train), len(held)) == (6, 4) and train.class_names == held.class_names == ("x", "y", "z")
    assert train.labels[:, 0].tolist() == [0, 1, 2, 0, 1, 2] and "3 rows of test are not read" in str(held.note)
    assert held.where(1) == f"{spec[3:]}, split validation: row 1" and whole_of(spec, held) is held
    assert len(open_data(f"{spec}:validation,test", "train")) == 4
    other = open_data(f"{spec}:validation,test?label=coarse&image=image", "eval")
    assert len(other) == 3 and other.class_names == ("a", "b")
    alone = open_data(saved(top, rows(12, label=["c"] * 12), "alone"), "eval")
    assert len(alone) == 1 and alone.where(0).endswith("row 9") and len(whole_of(f"hf:{top}/alone", alone)) == 12
    refused(f"{spec}:trian", "has no split 'trian': did you mean train")
    refused(f"{spec}:test,test", "test cannot be both splits")
    refused(f"{spec}?label=Fine", "has no column 'Fine': did you mean fine")
    refused(f"{spec}?lable=fine", "no option 'lable'.*did you mean label")
    refused(f"{spec}?config=x", "was saved by save_to_disk, which knows no configurations")
    refused(f"{spec}:train[:50%]", "no such file or folder")
    refused(saved(top, datasets.DatasetDict({"a": rows(3), "b": rows(3)}), "ab"), "splits a, b: hf:.*:TRAIN,EVAL says")


def test_a_configuration_is_named(top: Path) -> None:
    for name in ("big", "small"):
        (top / "set" / name).mkdir(parents=True)
        rows(12 if name == "big" else 5, label=AB).to_parquet(str(top / "set" / name / "train.parquet"))
    head = "---\nconfigs:\n- config_name: big\n  data_files: big/*\n- config_name: small\n  data_files: small/*\n---\n"
    (top / "set" / "README.md").write_text(head)
    assert len(open_data(f"hf:{top}/set?config=small", "train")) == 5
    refused(f"hf:{top}/set", r"Config name is missing.*: hf:.*\?config=NAME takes one of big, small")


def test_rows_may_name_files(top: Path) -> None:
    write_folder(top / "files", SAMPLES)
    for split in ("train", "val"):
        part = [s for s in SAMPLES if s.split == split]
        paths = {"image": [f"../files/{s.path}" for s in part], "label": [s.label for s in part]}
        (top / "table").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(paths).to_parquet(str(top / "table" / f"{split}.parquet"))
    refused(f"hf:{top}/table", r"has no column of images, but image, label: \?image=COLUMN names it")
    for split in ("train", "eval"):
        data = open_data(f"hf:{top}/table?image=image", split)
        files = open_data(f"imagefolder:{top}/files", split)
        assert isinstance(data, FileDataset) and np.array_equal(data.labels, files.labels)
        assert data.fingerprint() == open_data(f"hf:{top}/table?image=image", split).fingerprint()
        assert all(torch.equal(data.decode(i), files.decode(i)) for i in range(len(data)))
        assert whole_of(f"hf:{top}/table?image=image", data) is data or split == "train"
    images = open_data(f"hf:{top}/files", "eval")  # a folder of images, as the library reads it
    assert isinstance(images, FileDataset) and images.class_names == ("bloom", "roof") and len(images) == 4
    (top / "files" / SAMPLES[0].path).unlink()
    refused(f"hf:{top}/table?image=image", r"000\.jpg: cannot be read: No such file")


def test_a_second_opening_reads_no_rows(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = saved(top, rows(label=AB))
    first = open_data(spec, "train")
    with monkeypatch.context() as patch:
        patch.setattr(kind, "index_rows", None)
        patch.setattr(kind, "item_sizes", None)
        same(open_data(spec, "train"), first)
        shutil.copytree(top / "set", top / "moved", copy_function=shutil.copy2)
        same(open_data(f"hf:{top}/moved", "train"), first)
    for memory in (top / "home/datasets").iterdir():
        memory.write_bytes(memory.read_bytes()[:-30])
    same(open_data(f"hf:{top}/moved", "train"), first)


def test_what_changes_while_it_is_open_is_named_and_found_again(top: Path) -> None:
    spec = saved(top, rows(label=AB))
    data = open_data(spec, "train")
    (file,) = (top / "set").glob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"\.arrow: has changed since it was indexed"):
        data.decode(4)
    refused(spec, "cannot be (opened|read)")
    file.unlink()
    with pytest.raises(InputError, match=r"\.arrow: cannot be read: No such file"):
        data.decode(4)
    refused(spec, "cannot be opened: FileNotFoundError|cannot be read: No such file")
    (top / "p").mkdir()
    rows(label=AB).to_parquet(str(top / "p/x.parquet"))
    before = open_data(f"hf:{top}/p", "train").fingerprint()
    rows(label=AB[::-1]).to_parquet(str(top / "p/x.parquet"))
    assert open_data(f"hf:{top}/p", "train").fingerprint() != before


def test_a_worker_that_is_killed_is_named(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = saved(top, rows(label=AB))
    monkeypatch.setattr(kind.ArrowSource, "few", 0)
    monkeypatch.setattr(kind.ArrowSource, "size", lambda self, place: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UnreadableError, match=r"set: row \d+: the worker process that read it was killed"):
        open_data(spec, "train")


def test_unreadable_images_are_listed(top: Path) -> None:
    broken = [Sample(s.split, s.label, s.name, b"none" if i in (2, 5) else s.content) for i, s in enumerate(SAMPLES)]
    spec = write_hf(top / "set", broken)
    refused(spec, r"row 2: not a JPEG, PNG, WebP or GIF image \(kdcache build --list-unreadable")
    assert [line.partition(": not")[0] for line in list_unreadable(spec, "train")] == [
        f"{spec[3:]}, split train: row {i}" for i in (2, 5)
    ]


IMAGES = {"bytes": CONTENTS[0], "path": None}


def with_image(image: Any) -> Callable[[], Any]:
    def make() -> Any:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        return datasets.Dataset.from_dict({"image": [IMAGES, image], "label": ["a", "b"]}, features=features)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rows(3), "has no column of labels, but image: .label=COLUMN names it, and --unlabelled does without"),
        (lambda: rows(3, label=[1.5] * 3), "column label holds double, but labels are whole numbers or class names"),
        (lambda: rows(3, label=[True] * 3), "column label holds bool, but"),
        (lambda: rows(3, label=["a", None, "b"]), r"row 1: has no label \(1 rows have none\); --unlabelled"),
        (lambda: rows(3, label=[0, None, None]), r"row 1: has no label \(2 rows have none\)"),
        (lambda: rows(3, label=[0, 1, -1]), "row 2: label -1 is no class: ids begin at 0"),
        (lambda: rows(3, label=[0, 1, 1 << 30]), "label 1073741824 is no class: ids are 0 to"),
        (lambda: rows(3, label=["a", "", "b"]), "row 1: label '' is no class name"),
        (lambda: rows(3, label=[0] * 3, target=[1] * 3), r"label and target may each be the labels: \?label=label"),
        (lambda: rows(3, label=[0] * 3).remove_columns("image"), "has no column of images, but label"),
        (lambda: datasets.Dataset.from_dict({"a": CONTENTS[:2], "b": CONTENTS[:2]}), "a and b may each be the images"),
        (with_image({"bytes": b"", "path": None}), "row 1: its image is empty"),
        (with_image(None), r"row 1: has no image \(1 rows here\)"),
        (lambda: datasets.concatenate_datasets([rows(2, label=["a"] * 2)] * 2).select([0, 3]), None),
    ],
)
def test_a_mistake_is_one_line(make: Callable[[], Any], message: str | None, top: Path) -> None:
    spec = saved(top, make())
    if message is None:
        assert len(open_data(spec, "train")) == 2
    else:
        refused(spec, message)


def test_labels_that_are_not_listed_or_of_the_train_split(top: Path) -> None:
    features = datasets.ClassLabel(names=["cat", "dog"])
    listed = rows(3, label=[0, 1, -1]).cast_column("label", features)
    refused(saved(top, listed), r"row 2: has no label \(1 rows have none\)")
    assert len(open_data(f"hf:{top}/set", "train", unlabelled=True)) == 3
    splits = {"train": rows(3, label=["a"] * 3), "test": rows(3, label=["a", "b", "a"])}
    refused(saved(top, datasets.DatasetDict(splits), "ab"), "split test: row 1: label 'b' is no class of", "eval")


def test_files_that_are_none(top: Path) -> None:
    (top / "x.parquet").write_bytes(b"no parquet")
    refused(f"hf:{top}/x.parquet", r"x\.parquet: cannot be opened: ")
    (top / "x.txt").write_bytes(b"no")
    refused(f"hf:{top}/x.txt", r"x\.txt: is neither a folder nor a \.parquet file")
    (top / "empty").mkdir()
    refused(f"hf:{top}/empty", "cannot be opened: ")
    refused(f"hf:{top}/emty", "emty: there is no such file or folder: did you mean empty")
    refused(f"hf:{top}/*.arrow", "there is no such file or folder")
    for spec in ("hf", "hf:"):
        refused(spec, "hf needs a data set: hf:PATH")


def test_an_empty_split_is_named_where_it_is_needed(top: Path) -> None:
    spec = saved(top, datasets.DatasetDict({"train": rows(3, label=AB), "validation": rows(3, label=AB)}))
    state = top / "set/validation/state.json"  # datasets 4.0 saves no images without rows, later ones write this
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": []}))
    assert len(open_data(spec, "train")) == 3
    refused(spec, "split validation: has no rows", "eval")
    refused(f"hf:{top}/set/validation", "set/validation: has no rows")


def test_compressed_arrow_files_are_refused(top: Path) -> None:
    import pyarrow as pa

    spec = saved(top, rows(label=AB))
    (file,) = (top / "set").glob("*.arrow")
    with pa.ipc.open_stream(file.read_bytes()) as stream:
        table = stream.read_all()
    with pa.ipc.new_stream(str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as out:
        out.write_table(table)
    refused(spec, "its Arrow files are compressed or damaged: save it again with save_to_disk")


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        (["label"], AB, r"00002\.arrow: does not have one column 'image' \(its columns: label\): save it again"),
        (["image"], AB, r"does not have one column 'label' \(its columns: image\)"),
        (["image", "label"], [None] * 6, "the column label is string in other files, and null in this one: save it"),
    ],
)
def test_a_file_with_other_columns_is_named(top: Path, names: list[str], label: list[Any], message: str) -> None:
    import pyarrow as pa

    rows(label=AB).save_to_disk(str(top / "set"), num_shards=2)
    file = top / "set/data-00001-of-00002.arrow"
    with pa.ipc.open_stream(file.read_bytes()) as stream:
        table = stream.read_all()
    columns = {"image": table["image"], "label": pa.array(label[:6])}
    table = pa.Table.from_arrays([columns[name] for name in names], names)
    with pa.ipc.new_stream(str(file), table.schema) as out:
        out.write_table(table)
    refused(f"hf:{top}/set", message)


def test_a_name_on_the_hub(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(top)
    refused("hf:nobody/nothing", r"http://127\.0\.0\.1:9 does not answer, there is no such folder here, and .* no copy")
    assert placed("hf:nobody/nothing:train") == "hf:nobody/nothing:train"
    with monkeypatch.context() as patch:
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr(library, "_answers", None)
        refused("hf:nobody/nothing", "HF_HUB_OFFLINE is set, there is no such folder here")
    saved(top, rows(label=AB), "nobody/nothing")
    data = open_data("hf:nobody/nothing", "train")
    assert "this is what lies here, not what the hub may have of that name" in str(data.note)
    assert placed("hf:nobody/nothing?label=label") == f"hf:{top}/nobody/nothing?label=label"


def test_without_the_library(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hf:nobody/nothing", r"needs the package datasets: pip install datasets")
