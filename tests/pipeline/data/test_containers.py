"""The same 200 real images in every kind of container: equal pixels, labels and records, and what is refused alike.

A new container is a writer in tests/helpers/containers.py, and a row in WRITERS there.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache.errors import InputError, KdcacheError
from kdcache.pipeline.build.build import build
from kdcache.pipeline.data.dataset import Dataset, list_unreadable, open_data
from kdcache.pipeline.data.kinds.containers import passes
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers import containers
from kdcache.tests.helpers.building import content, quiet, settings
from kdcache.tests.helpers.containers import CLASSES, OF_COLUMNS, OF_ITEMS, OF_TEXT, WRITERS, Sample

TRAIN, VAL = 161, 39  # odd numbers of 200 images
TOY = """
from kd_toy import net

def thousands():
    return net(20_000, 4, 8, 2)
"""
THOUSANDS = {"teacher": "kd_thousands:thousands", "topk": 3, "batch_size": 1}
BY_ID = [kind for kind in WRITERS if kind != "folder"]  # whose labels can be ids: folders name their classes
WRONG = (1.5, -1, None, "cat", True)  # among labels that are whole numbers
WRONG_TEXT = ("1.5", "-1", "")  # the same, where everything is written as text; there "cat" makes all labels names
WRONG_COLUMN = (1.5, -1, None)  # the same, where a column has one type
Put = Callable[[list[Sample]], str]


@pytest.fixture(scope="module", autouse=True)
def place(toy: Path, tmp_path_factory: pytest.TempPathFactory, no_fsync: None) -> Iterator[Path]:
    """A folder with a home of kdcache's, and two modules of teachers at hand."""
    top = tmp_path_factory.mktemp("containers")
    (top / "kd_thousands.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(top / "home"))
        patch.syspath_prepend(str(toy))
        patch.syspath_prepend(str(top))
        yield top


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return containers.pictures(TRAIN, VAL)


@pytest.fixture(scope="module")
def few() -> list[Sample]:
    return containers.pictures(17, 7)


@pytest.fixture(scope="module", params=WRITERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(kind: str, top: Path, samples: list[Sample]) -> str:
    """Put samples into a container of a kind, in a new folder, and give the spec of the data."""
    top.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(top))
        spec = WRITERS[kind](top, samples)
        if (top / f"{spec.partition(':')[0]}.py").exists():
            __import__(spec.partition(":")[0])
    return spec


@pytest.fixture(scope="module")
def spec(kind: str, samples: list[Sample], place: Path) -> str:
    return written(kind, place / f"all of {kind}", samples)


@pytest.fixture
def put(kind: str, tmp_path: Path) -> Put:
    count = iter(range(100))
    return lambda samples: written(kind, tmp_path / f"{next(count)} of {kind}", samples)


@pytest.fixture(scope="module")
def files(samples: list[Sample], place: Path) -> dict[str, Dataset]:
    """The same images in class folders."""
    folder = written("folder", place / "files", samples)
    return {split: open_data(folder, split) for split in ("train", "eval")}


def of_split(samples: list[Sample], split: str) -> list[Sample]:
    return [s for s in samples if s.split == {"train": "train", "eval": "val"}[split]]


def records(spec: str, out: Path, **changes: Any) -> dict[str, Any]:
    """Every file of a cache of these images but its identity; of commits all but the key and who wrote them."""
    kinds = {"teacher": "kd_toy:two", "augment": "rrc,flip", "topk": None, "teacher_size": 12, "workers": 0}
    build(settings(data=spec, out=str(out), **{**kinds, **changes}), quiet)
    found = content(out)
    assert "sha256" in json.dumps(found["commits/labels.json"])
    for name, about in found.items():
        if "commits/" in name:
            about.pop("key")
    del found["identity.json"]
    return found


@pytest.fixture(scope="module")
def reference(files: dict[str, Dataset], place: Path) -> dict[str, Any]:
    return records(f"imagefolder:{place / 'files'}", place / "reference")


@pytest.fixture(scope="module")
def alone(few: list[Sample]) -> list[Sample]:
    """One image for each split, of 20,000 classes."""
    return [replace(few[0], label=19_999), replace(of_split(few, "eval")[0], label=3)]


@pytest.fixture(scope="module")
def of_alone(alone: list[Sample], place: Path) -> dict[str, Any]:
    """The records of these, which a table names."""
    return records(written("csv", place / "alone", alone), place / "records of alone", **THOUSANDS)


def refusal(spec: str, split: str = "train") -> str:
    with pytest.raises(InputError) as caught:
        open_data(spec, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single process reads items, however many cores there are."""
    monkeypatch.setattr(passes, "cores", lambda: 1)


class TestEveryContainer:
    def test_pixels_labels_and_sizes_are_those_of_the_files(
        self, spec: str, samples: list[Sample], files: dict[str, Dataset]
    ) -> None:
        for split, n in (("train", TRAIN), ("eval", VAL)):
            data, same = open_data(spec, split), files[split]
            assert isinstance(data, Dataset) and data.split == split and not data.in_memory and len(data) == n
            assert data.class_names == same.class_names == CLASSES
            assert np.array_equal(data.labels, same.labels) and np.array_equal(data.sizes, same.sizes)
            assert [CLASSES[i] for i in data.labels[:, 0]] == [s.label for s in of_split(samples, split)]
            assert all(torch.equal(data.decode(i), same.decode(i)) for i in range(n))
            assert (data.mean, data.std) == (same.mean, same.std)
            assert data.note and f"{n} images to" in data.note and data.unreadable() == []

    @pytest.mark.usefixtures("one_worker")
    def test_records_are_equal_bit_for_bit(self, spec: str, tmp_path: Path, reference: dict[str, Any]) -> None:
        found = records(spec, tmp_path / "cache")
        assert found == reference and len(found) > 40

    @pytest.mark.usefixtures("one_worker")
    @pytest.mark.parametrize("kind", BY_ID)
    def test_one_image_alone_and_20_000_classes(
        self, alone: list[Sample], of_alone: dict[str, Any], put: Put, tmp_path: Path
    ) -> None:
        spec = put(alone)
        data = open_data(spec, "train")
        assert data.labels.tolist() == [[19_999]] and data.subset(np.array([0])).fingerprint() == data.fingerprint()
        assert data.class_names == open_data(spec, "eval").class_names == tuple(map(str, range(20_000)))
        assert records(spec, tmp_path / "cache", **THOUSANDS) == of_alone

    @pytest.mark.usefixtures("one_worker")
    @pytest.mark.parametrize("kind", BY_ID)
    def test_two_classes_by_their_ids(self, few: list[Sample], put: Put) -> None:
        spec = put([replace(s, label=s.id) for s in few])
        for split in ("train", "eval"):
            data = open_data(spec, split)
            assert data.class_names == ("0", "1")
            assert data.labels[:, 0].tolist() == [s.id for s in of_split(few, split)]

    @pytest.mark.usefixtures("one_worker")
    def test_moved_copies_keep_their_fingerprint_and_changed_ones_do_not(self, few: list[Sample], put: Put) -> None:
        first, second = few[0], few[1]
        other = bytearray(first.content)
        other[-20] ^= 1
        swapped = [replace(s, content=t.content) for s, t in ((first, second), (second, first))]
        changes = {
            "order": [*swapped, *few[2:]],
            "label": [Sample("train", "roof", "z.jpg", first.content), *few[1:]],
            "content": [replace(first, content=bytes(other)), *few[1:]],
            "one less": few[1:],
        }
        assert first.name.endswith("jpg")
        spec = put(few)
        seen = {open_data(spec, "train").fingerprint()}
        assert open_data(put(few), "train").fingerprint() in seen
        for changed in changes.values():
            ordered = sorted(changed, key=lambda s: s.path.encode())
            seen.add(open_data(put(ordered), "train").fingerprint())
        assert len(seen) == 1 + len(changes)
        seen |= {open_data(spec, split).fingerprint(full) for split, full in (("train", True), ("eval", False))}
        assert len(seen) == 3 + len(changes)

    @pytest.mark.usefixtures("one_worker")
    def test_without_labels(self, spec: str) -> None:
        bare, data = open_data(spec, "train", unlabelled=True), open_data(spec, "train")
        assert bare.labels.shape == (len(data), 0) and bare.class_names == ()
        assert torch.equal(bare.decode(3), data.decode(3))
        assert bare.fingerprint() == data.unlabelled().fingerprint() != data.fingerprint()

    @pytest.mark.usefixtures("one_worker")
    def test_small_images_are_held_in_memory(self, put: Put, tmp_path: Path) -> None:
        small = containers.pictures(side=12)
        folder, spec = written("folder", tmp_path / "folder", small), put(small)
        for split in ("eval", "train"):
            data, same = open_data(spec, split), open_data(folder, split)
            assert data.pixels is not None and torch.equal(data.pixels, same.pixels)
            assert (data.mean, data.std) == (same.mean, same.std)

    def test_a_worker_that_is_killed_is_reported_with_its_image(
        self, spec: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, parent = open_data(spec, "train"), os.getpid()
        decode = type(data).decode

        def killed(self: Dataset, index: int) -> torch.Tensor:
            if index == 17 and os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(self, index)

        monkeypatch.setattr(type(data), "decode", killed)
        some = data.subset(np.arange(40))
        renderer = Renderer(some, 64, torch.device("cpu"), workers=1)
        with pytest.raises(KdcacheError) as caught:
            list(renderer.views([draw("rrc", 0, 0, range(40), some.sizes)], [(np.arange(40), range(1))]))
        assert str(caught.value).startswith(f"{data.where(17)}: the worker process that read it was killed")

    @pytest.mark.usefixtures("one_worker")
    def test_unreadable_images_are_named_and_all_of_them_are_listed(
        self, kind: str, few: list[Sample], put: Put
    ) -> None:
        broken = [replace(s, content=b"no image" if i in (2, 5) else s.content) for i, s in enumerate(few)]
        word = {"PIL images": "sample", "bytes": "sample", "tensors": "sample", "hf": "row", "hf parquet": "row"}
        names = [f"{word[kind]} {i}" if kind in word else broken[i].name for i in (2, 5)]
        spec = put(broken)
        line = refusal(spec)
        assert names[0] in line and "--list-unreadable" in line
        lines = list_unreadable(spec, "train")
        assert len(lines) == 2 and all(name in line for name, line in zip(names, lines, strict=True))
        for line in lines:
            assert "\n" not in line and ("not a JPEG, PNG, WebP or GIF image" in line or "Unidentified" in line)

    @pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "hf parquet"])  # that is kept as Arrow files
    def test_what_is_changed_or_deleted_while_it_is_open_is_named(
        self, kind: str, few: list[Sample], put: Put, tmp_path: Path
    ) -> None:
        spec = put(few)
        data = open_data(spec, "train")
        held = containers.files_of(tmp_path / f"0 of {kind}", few[4])
        assert held
        for path in held:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match=r"changed|cut off|ends before|[Tt]runcated") as caught:
            data.decode(4)
        named = {data.where(4).partition(": ")[0], *map(str, held)}
        assert str(caught.value).startswith(tuple(named)) and "\n" not in str(caught.value)
        for path in held:
            path.unlink()
        with pytest.raises(InputError, match="No such file") as caught:
            data.decode(4)
        assert str(caught.value).startswith(tuple(named)) and "\n" not in str(caught.value)
        if kind == "folder":  # it has one image less
            assert len(open_data(spec, "train")) == len(data) - 1
        else:
            line = refusal(spec)
            assert any(Path(name).name in line for name in named)

    @pytest.mark.parametrize(
        ("kind", "label"),
        [
            (kind, label)
            for kind in BY_ID
            for label in (WRONG_TEXT if kind in OF_TEXT else WRONG_COLUMN if kind in OF_COLUMNS else WRONG)
        ],
    )
    def test_a_label_of_a_wrong_type_is_named(self, kind: str, label: object, few: list[Sample], put: Put) -> None:
        wrong = [replace(s, label=label if i == 4 else s.id) for i, s in enumerate(few)]
        spec = put(wrong)
        where = (
            f"line {25 - 4 if kind == 'csv' else 5}:" if kind in ("csv", "jsonl") else wrong[4].name.partition(".")[0]
        )
        line = refusal(spec)
        assert "label" in line
        if kind in OF_COLUMNS:  # all of a column are of one type, and a table counts from 1
            assert any(text in line for text in ("row 4: ", "row 5: ", "column label holds double", "row 1: label 0.0"))
        else:
            assert "sample 4" in line or where in line

    @pytest.mark.parametrize("split", ["train", "eval"])
    def test_a_split_without_images_is_refused(self, split: str, few: list[Sample], put: Put) -> None:
        other = {"train": "eval", "eval": "train"}[split]
        line = refusal(put(of_split(few, other)), split)
        words = (
            "no samples",
            "no such file",
            "no row",
            "none of val",
            "no such folder",
            "but no val",
            "holds no",
            "no data",
        )
        assert any(word in line for word in words), line


def test_contents_have_one_fingerprint_whatever_holds_them(few: list[Sample], tmp_path: Path) -> None:
    data = [open_data(written(kind, tmp_path / kind, few), "train") for kind in OF_ITEMS]
    assert len({one.fingerprint() for one in data}) == len({one.fingerprint(full=True) for one in data}) == 1


def test_20_000_class_folders(few: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(few[0].content)
    for split, classes in (("train", range(20_000)), ("val", (7, 19_999))):
        for i in classes:
            (tmp_path / "d" / split / f"{i:05d}").mkdir(parents=True)
            os.link(tmp_path / "image", tmp_path / "d" / split / f"{i:05d}" / "1.jpg")
    held = open_data(f"imagefolder:{tmp_path}/d", "eval")
    assert held.labels[:, 0].tolist() == [7, 19_999]
    assert held.class_names == tuple(f"{i:05d}" for i in range(20_000))


def test_subsets_have_the_class_names_of_their_dataset(few: list[Sample], tmp_path: Path) -> None:
    whole = written("bytes", tmp_path / "bytes", few)
    half = open_data(whole.partition(":")[0] + ":half", "train")
    assert len(half) == 9 and half.class_names == CLASSES
