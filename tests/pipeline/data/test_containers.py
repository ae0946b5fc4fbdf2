"""The same real images in every kind of container: equal pixels, labels and records, and what changes fingerprints."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cache.errors import InputError
from kdcache.pipeline.build.build import build
from kdcache.pipeline.data.dataset import Dataset, list_unreadable, open_data
from kdcache.tests.helpers import containers
from kdcache.tests.helpers.building import quiet, settings
from kdcache.tests.helpers.containers import Sample

Write = Callable[[Path, list[Sample]], str]
WRITERS: dict[str, Write] = {
    "csv": containers.write_csv,
    "jsonl": containers.write_jsonl,
    "hf": containers.write_hf,
    "hf parquet": partial(containers.write_hf, form="parquet"),
    "tars": containers.write_tars,
    "tars with json": partial(containers.write_tars, json_labels=True),
    "PIL images": partial(containers.write_module, function="images"),
    "bytes": partial(containers.write_module, function="contents"),
    "tensors": partial(containers.write_module, function="tensors"),
    "paths": partial(containers.write_module, function="paths"),
}
OF_ITEMS = ("tars", "tars with json", "bytes", "hf", "hf parquet")  # whose fingerprints are of the same things


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return containers.pictures()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts samples into a container of a kind, in a new folder, and gives the spec of the data."""
    count = iter(range(100))

    def into(kind: str, samples: list[Sample]) -> str:
        top = tmp_path / f"{next(count)} of {kind}"
        top.mkdir()
        monkeypatch.syspath_prepend(str(top))
        return WRITERS[kind](top, samples)

    return into


def expected(samples: list[Sample], split: str) -> list[Sample]:
    return [s for s in samples if s.split == {"train": "train", "eval": "val"}[split]]


@pytest.mark.parametrize("kind", WRITERS)
class TestEveryContainer:
    @pytest.fixture
    def spec(self, kind: str, samples: list[Sample], put: Callable[..., str]) -> str:
        return put(kind, samples)

    def test_pixels_labels_and_sizes_are_those_of_the_files(
        self, kind: str, samples: list[Sample], spec: str, tmp_path: Path
    ) -> None:
        folder = containers.write_folder(tmp_path / "folder", samples)
        for split in ("train", "eval"):
            data, files = open_data(spec, split), open_data(folder, split)
            assert isinstance(data, Dataset) and data.split == split and not data.in_memory
            assert data.class_names == files.class_names == containers.CLASSES
            assert np.array_equal(data.labels, files.labels) and np.array_equal(data.sizes, files.sizes)
            assert all(torch.equal(data.decode(i), files.decode(i)) for i in range(len(files)))
            assert (data.mean, data.std) == (files.mean, files.std)
            assert data.note and f"{len(files)} images to" in data.note

    def test_moved_copies_keep_their_fingerprint_and_changed_ones_do_not(
        self, kind: str, samples: list[Sample], spec: str, put: Callable[..., str]
    ) -> None:
        first, second = samples[0], samples[1]
        other = bytearray(first.content)
        other[-20] ^= 1
        swapped = [replace(s, content=t.content) for s, t in ((first, second), (second, first))]
        changes = {
            "order": [*swapped, *samples[2:]],
            "label": [Sample("train", "roof", "z.jpg", first.content), *samples[1:]],
            "content": [replace(first, content=bytes(other)), *samples[1:]],
            "one less": samples[1:],
        }
        assert first.name.endswith("jpg")
        seen = {open_data(spec, "train").fingerprint()}
        assert open_data(put(kind, samples), "train").fingerprint() in seen
        for changed in changes.values():
            ordered = sorted(changed, key=lambda s: s.path.encode())
            seen.add(open_data(put(kind, ordered), "train").fingerprint())
        assert len(seen) == 1 + len(changes)
        seen |= {open_data(spec, split).fingerprint(full) for split, full in (("train", True), ("eval", False))}
        assert len(seen) == 3 + len(changes)

    def test_without_labels(self, kind: str, samples: list[Sample], spec: str) -> None:
        bare, data = open_data(spec, "train", unlabelled=True), open_data(spec, "train")
        assert bare.labels.shape == (len(data), 0) and bare.class_names == ()
        assert torch.equal(bare.decode(3), data.decode(3))
        assert bare.fingerprint() == data.unlabelled().fingerprint() != data.fingerprint()

    def test_one_image_alone(self, kind: str, samples: list[Sample], put: Callable[..., str]) -> None:
        data = open_data(put(kind, [samples[0], expected(samples, "eval")[0]]), "train")
        assert len(data) == 1 and data.subset(np.array([0])).fingerprint() == data.fingerprint()

    def test_records_are_equal_bit_for_bit(
        self,
        kind: str,
        spec: str,
        tmp_path: Path,
        toy: Path,
        reference: dict[str, bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.syspath_prepend(str(toy))
        assert records(spec, tmp_path / "cache") == reference


@pytest.fixture(scope="module")
def reference(samples: list[Sample], toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The records of the same images in class folders."""
    top = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(toy))
        patch.setenv("KDCACHE_HOME", str(top / "home"))
        return records(containers.write_folder(top / "images", samples), top / "cache")


def records(spec: str, out: Path) -> dict[str, bytes]:
    """The stored arrays of a cache of these images."""
    kinds = {"teacher": "kd_toy:two", "augment": "rrc,flip", "topk": None, "teacher_size": 12, "workers": 0}
    build(settings(data=spec, out=str(out), **kinds), quiet)
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    arrays = {name: content for name, content in found.items() if "/c/" in f"/{name}" and "commits" not in name}
    assert len(arrays) > 4
    return arrays


def test_contents_have_one_fingerprint_whatever_holds_them(samples: list[Sample], put: Callable[..., str]) -> None:
    data = [open_data(put(kind, samples), "train") for kind in OF_ITEMS]
    assert len({one.fingerprint() for one in data}) == len({one.fingerprint(full=True) for one in data}) == 1


@pytest.mark.parametrize("kind", WRITERS)
def test_small_images_are_held_in_memory(kind: str, put: Callable[..., str], tmp_path: Path) -> None:
    small = containers.pictures(side=12)
    folder = containers.write_folder(tmp_path / "folder", small)
    for split in ("eval", "train"):
        data, files = open_data(put(kind, small), split), open_data(folder, split)
        assert data.pixels is not None and torch.equal(data.pixels, files.pixels)
        assert (data.mean, data.std) == (files.mean, files.std)


@pytest.mark.parametrize("kind", ["csv", "tars", "bytes", "paths", "hf"])
def test_an_unreadable_image_is_named_and_all_of_them_are_listed(
    kind: str, samples: list[Sample], put: Callable[..., str]
) -> None:
    broken = [
        Sample(s.split, s.label, s.name, b"no image" if i in (2, 5) else s.content) for i, s in enumerate(samples)
    ]
    spec = put(kind, broken)
    with pytest.raises(InputError, match=r"not a JPEG, PNG, WebP or GIF image.*--list-unreadable") as caught:
        open_data(spec, "train")
    assert "\n" not in str(caught.value)
    lines = list_unreadable(spec, "train")
    assert len(lines) == 2 and all("not a JPEG" in line and "\n" not in line for line in lines)
    shown = {"bytes": ("sample 2 of", "sample 5 of"), "hf": ("row 2", "row 5")}.get(
        kind, (broken[2].name, broken[5].name)
    )
    assert all(name in line for name, line in zip(shown, lines, strict=True))


@pytest.mark.parametrize("kind", ["csv", "tars", "paths"])
def test_what_is_deleted_or_changed_while_it_is_open_is_named(
    kind: str, samples: list[Sample], put: Callable[..., str]
) -> None:
    spec = put(kind, samples)
    data = open_data(spec, "train")
    place = Path(data.where(4).partition(": ")[0])
    content = place.read_bytes()
    place.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{place.name}.*(changed|not a JPEG|ends before)"):
        data.decode(4)
    place.unlink()
    with pytest.raises(InputError, match=rf"{place.name}: cannot be read: No such file"):
        data.decode(4)
    with pytest.raises(InputError, match=rf"{place.name}"):
        open_data(spec, "train")


def test_subsets_have_the_class_names_of_their_dataset(samples: list[Sample], put: Callable[..., str]) -> None:
    whole = put("bytes", samples)
    half = open_data(whole.partition(":")[0] + ":half", "train")
    assert len(half) == 9 and half.class_names == containers.CLASSES


@pytest.mark.parametrize("kind", ["csv", "tars", "own", "hf"])
@pytest.mark.parametrize("classes", [2, 20_000])
def test_labels_that_are_whole_numbers_are_ids(
    kind: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = containers.pictures(3, 2)
    labels = [0, classes - 1, 1, 1, classes - 1]
    if kind == "csv":
        containers.write_folder(tmp_path, samples)
        rows = [f"{s.path},{label},{s.split}\n" for s, label in zip(samples, labels, strict=True)]
        (tmp_path / "t.csv").write_text("path,label,split\n" + "".join(rows), encoding="utf-8")
        spec = f"files:{tmp_path}/t.csv"
    elif kind == "tars":
        for split in ("train", "val"):
            both = [(s, label) for s, label in zip(samples, labels, strict=True) if s.split == split]
            members = [(s.name, s.content) if i else (s.name[:3] + ".cls", b"%d" % n) for s, n in both for i in (0, 1)]
            containers.write_tar(tmp_path / split / "0.tar", members)
        spec = f"wds:{tmp_path}"
    elif kind == "hf":
        rows = containers.hf_rows(samples).remove_columns("label").add_column("target", labels)
        for split, places in (("train", range(3)), ("validation", range(3, 5))):
            rows.select(places).to_parquet(str(tmp_path / f"{split}.parquet"))
        spec = f"hf:{tmp_path}"
    else:
        spec = containers.write_module(tmp_path, samples, "contents")
        monkeypatch.syspath_prepend(str(tmp_path))
        own = __import__(spec.partition(":")[0])
        own.FILES = [(path, label, split) for (path, _, split), label in zip(own.FILES, labels, strict=True)]
        own.Own.classes = range(classes)
    train, held = open_data(spec, "train"), open_data(spec, "eval")
    assert train.class_names == held.class_names == tuple(map(str, range(classes)))
    assert train.labels[:, 0].tolist() == labels[:3] and held.labels[:, 0].tolist() == labels[3:]
