"""Each kind of dataset keeps to the contract; the last one is a toy, to show what a new kind costs."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.cache.errors import InputError
from kdcache.pipeline.data import dataset
from kdcache.pipeline.data.dataset import Dataset, is_function, open_data, with_folders
from kdcache.pipeline.data.kinds.arrays import ArrayDataset, from_arrays
from kdcache.pipeline.data.kinds.base import Asked, Described, Kind
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.tests.contracts.datasets import DatasetContract, images
from kdcache.tests.helpers.containers import write_tar
from kdcache.tests.helpers.lazily import Lazily

datasets = Lazily("datasets")
GREY = (0.5, 0.5, 0.5)


def described(pixels: np.ndarray, labels: list[int]) -> dict[str, Any]:
    sizes = np.tile(np.array(pixels.shape[1:3], np.int32), (len(pixels), 1))
    about = {"labels": np.array(labels, np.int64)[:, None], "class_names": ("a", "b"), "sizes": sizes}
    return {"name": "toy", "split": "train", **about, "mean": GREY, "std": GREY}


class TestArrays(DatasetContract):
    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        return ArrayDataset(**described(pixels, labels), pixels=torch.from_numpy(pixels))


class TestFiles(DatasetContract):
    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        paths = tuple(f"{i}.png" for i in range(len(pixels)))
        for path, image in zip(paths, pixels, strict=True):
            Image.fromarray(image).save(place / path)
        return FileDataset(**described(pixels, labels), root=place, paths=paths)


class TestSmallFolders(DatasetContract):
    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            (place / "train" / "ab"[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / "train" / "ab"[label] / f"{i}.png")
        return open_data(f"imagefolder:{place}", "train")


class TestFolders(TestSmallFolders):
    @pytest.fixture
    def pixels(self) -> np.ndarray:
        return images(side=65)

    def test_its_pixels_stay_in_files(self, data: Dataset) -> None:
        assert not data.in_memory


class TestFunctions(DatasetContract):
    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        np.savez(place / "toy.npz", pixels=pixels, labels=labels)
        module = f"toy_of_kinds_{place.parent.name}_{place.name}".replace("-", "_")
        code = f"import numpy as np\ndef data(split):\n    z = np.load({str(place / 'toy.npz')!r})\n"
        (place / f"{module}.py").write_text(code + "    return z['pixels'], z['labels'], ['a', 'b']\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(place))
            return open_data(f"{module}:data", "train")


class TestTables(DatasetContract):
    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        rows = ["path,label"]
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            Image.fromarray(image).save(place / f"{i}.png")
            rows.append(f"{i}.png,{'ab'[label]}")
        (place / "t.csv").write_text("\n".join(rows))
        return open_data(f"files:{place}/t.csv", "train")


class TestTars(DatasetContract):
    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        members = []
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            members += [(f"{i}.png", file.getvalue()), (f"{i}.cls", b"ab"[label : label + 1])]
        return open_data(f"wds:{write_tar(place / 't.tar', members)}", "train")


class TestTarsOfLargerImages(TestTars):
    @pytest.fixture
    def pixels(self) -> np.ndarray:
        return images(side=65)


class TestHuggingFace(DatasetContract):
    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        features = datasets.Features({"img": datasets.Image(), "y": datasets.ClassLabel(names=["a", "b"])})
        rows = {"img": [Image.fromarray(image) for image in pixels], "y": labels}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(place))
        return open_data(f"hf:{place}", "train")


class TestHuggingFaceOfLargerImages(TestHuggingFace):
    @pytest.fixture
    def pixels(self) -> np.ndarray:
        return images(side=65)


class TestOwnDatasets(DatasetContract):
    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        np.savez(place / "toy.npz", pixels=pixels, labels=labels)
        module = f"toy_of_items_{place.parent.name}_{place.name}".replace("-", "_")
        (place / f"{module}.py").write_text(OWN.format(file=str(place / "toy.npz")))
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(place))
            return open_data(f"{module}:Data", "train")


OWN = """
import numpy as np
from PIL import Image

class Data:
    classes = ["a", "b"]
    def __init__(self, split):
        self.z = dict(np.load({file!r}))
    def __len__(self):
        return len(self.z["labels"])
    def __getitem__(self, i):
        return Image.fromarray(self.z["pixels"][i]), self.z["labels"][i]
"""


class TestOwnDatasetsOfLargerImages(TestOwnDatasets):
    @pytest.fixture
    def pixels(self) -> np.ndarray:
        return images(side=65)


# ---- a new kind: this file, and a line in the table ----


@dataclass(frozen=True, eq=False)
class Compressed(Described):
    """Images as bytes in memory, decoded one at a time."""

    contents: tuple[bytes, ...]
    pixels = None
    paths = ()

    def decode(self, index: int) -> torch.Tensor:
        shape = (*self.sizes[index].tolist(), 3)
        return torch.from_numpy(np.frombuffer(self.contents[index], np.uint8).reshape(shape).copy()).permute(2, 0, 1)

    def _fingerprint(self, full: bool) -> str:
        digest = self._begun("compressed", full)
        digest.update(b"".join(self.contents))
        return digest.hexdigest()

    def _contents(self, places: np.ndarray) -> dict[str, Any]:
        return {"contents": tuple(self.contents[i] for i in places)}


class CompressedFiles(Kind):
    def open(self, asked: Asked) -> Compressed:
        with np.load(asked.downloads) as z:
            pixels, labels = z["pixels"], z["labels"].tolist()
        return Compressed(**described(pixels, labels), contents=tuple(image.tobytes() for image in pixels))


class TestToyKind(DatasetContract):
    @pytest.fixture(autouse=True)
    def _table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(dataset.KINDS, "compressed", CompressedFiles())

    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        np.savez(place / "toy.npz", pixels=pixels, labels=labels)
        return open_data(f"compressed:{place / 'toy.npz'}", "train")

    def test_the_table_knows_it(self) -> None:
        assert not is_function("compressed:x")
        with pytest.raises(InputError, match=r"known are digits, .*, compressed and module:function"):
            open_data("nothing", "train")
        with pytest.raises(InputError, match="are for imagenet and imagefolder, not for compressed:x"):
            with_folders("compressed:x", "a", None)


def test_a_kind_without_a_path_takes_none() -> None:
    """What a file names may be opened: a module that is called like a kind must not be imported for it."""
    with pytest.raises(InputError, match="unknown dataset 'digits:load': digits takes no path"):
        open_data("digits:load", "train")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "wsd:train-{0..9}.tar",
            "there is no such kind: did you mean wds\\?, .*what follows is not the name of a function",
        ),
        ("file:table.csv", "did you mean files\\?"),
        ("hf:load", r"hf:load: .* does not answer, there is no such folder here, and .* has no copy"),
        ("wsd:train", "cannot import 'wsd': ModuleNotFoundError: .*known are .*: did you mean wds"),
        ("imagefoldr", "known are .*: did you mean imagefolder"),
        ("own/data:train", "there is no such kind"),
        ("2own:train", "there is no such kind"),
    ],
)
def test_a_kind_that_nobody_knows_is_no_module(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf.py").write_text("raise AssertionError('imported')")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        open_data(spec, "train")
    assert "\n" not in str(caught.value)
    assert is_function(spec) == (spec == "wsd:train")


def test_statistics_are_those_of_the_train_split() -> None:
    train, held = images(0), images(1)

    def load(is_train: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        return (train if is_train else held), np.zeros(6, np.int64), ("a",)

    data = from_arrays("toy", "eval", load)
    np.testing.assert_allclose(data.mean, train.mean((0, 1, 2)) / 255, rtol=1e-12)
    assert np.array_equal(data.pixels, held)
