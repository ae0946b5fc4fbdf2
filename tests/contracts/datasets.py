"""What every kind of dataset must do. The tests of a kind are a subclass that says how one is made, and from what."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.pipeline.data.dataset import Dataset

N = 6


def images(seed: int = 0, side: int = 8) -> np.ndarray:
    """uint8 [6, side, side, 3] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (N, side, side, 3), np.uint8)


class DatasetContract:
    """changes: what may be made different; a kind leaves out what cannot be with it."""

    changes = ("label", "pixel", "order")

    def make(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        """A train split of these images, with these labels of the classes a and b, in or below an empty folder."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))

    @pytest.fixture
    def pixels(self) -> np.ndarray:
        return images()

    def made(self, place: Path, pixels: np.ndarray, labels: list[int]) -> Dataset:
        place.mkdir()
        return self.make(place, pixels, labels)

    @pytest.fixture
    def data(self, tmp_path: Path, pixels: np.ndarray) -> Dataset:
        return self.made(tmp_path / "data", pixels, [0, 0, 0, 1, 1, 1])

    def test_order_pixels_and_labels_are_as_they_were_given(self, data: Dataset, pixels: np.ndarray) -> None:
        assert isinstance(data, Dataset) and len(data) == N and data.split == "train"
        assert data.labels.dtype == np.int64 and data.labels[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
        assert data.class_names == ("a", "b") and data.labels.max() < len(data.class_names)
        assert data.sizes.dtype == np.int32 and data.sizes.tolist() == [list(pixels.shape[1:3])] * N
        for i in (0, 3, 0, 5):
            image = data.decode(i)
            assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0), pixels[i])
        assert len(data.paths) in (0, N) and len({data.where(i) for i in range(N)}) == N
        assert len(data.mean) == len(data.std) == 3 and all(value > 0 for value in data.std)

    def test_pixels_in_memory_are_those_that_are_decoded(self, data: Dataset, pixels: np.ndarray) -> None:
        assert data.in_memory == (data.pixels is not None) == (data.image_size is not None)
        if data.pixels is not None:
            assert np.array_equal(data.pixels, pixels) and data.image_size == max(pixels.shape[1:3])

    def test_a_fingerprint_is_stable_and_any_change_changes_it(self, tmp_path: Path, pixels: np.ndarray) -> None:
        labels = [0, 0, 0, 1, 1, 1]
        other = pixels.copy()
        other[2, 3, 4, 1] ^= 1
        last = np.concatenate([pixels[1:2], pixels[0:1], pixels[2:]])
        changed = {"label": (pixels, [0, 0, 1, 1, 1, 1]), "pixel": (other, labels), "order": (last, labels)}
        first, again = (self.made(tmp_path / name, pixels, labels) for name in ("first", "again"))
        seen = {first.fingerprint()}
        assert seen == {again.fingerprint()} == {first.fingerprint()}
        for name in self.changes:
            seen.add(self.made(tmp_path / name, *changed[name]).fingerprint())
        assert len(seen) == 1 + len(self.changes)
        seen |= {first.fingerprint(full=True), first.unlabelled().fingerprint()}
        assert len(seen) == 3 + len(self.changes)
        assert first.named("other", "eval").fingerprint() == first.fingerprint()

    def test_it_may_be_unlabelled(self, data: Dataset, pixels: np.ndarray) -> None:
        bare = data.unlabelled()
        assert bare.labels.shape == (N, 0) and bare.labels.dtype == np.int64 and bare.class_names == ()
        assert np.array_equal(bare.decode(5).permute(1, 2, 0), pixels[5])

    def test_a_subset_is_of_the_same_kind(self, data: Dataset, pixels: np.ndarray) -> None:
        part = data.subset(np.array([4, 1]))
        assert type(part) is type(data) and len(part) == 2 and part.labels[:, 0].tolist() == [1, 0]
        for i, place in enumerate((4, 1)):
            assert np.array_equal(part.decode(i).permute(1, 2, 0), pixels[place])
        assert part.fingerprint() != data.fingerprint()

    def test_worker_processes_get_the_same_dataset(self, data: Dataset) -> None:
        there = pickle.loads(pickle.dumps(data))
        assert there.fingerprint() == data.fingerprint() and torch.equal(there.decode(3), data.decode(3))
        assert there.where(3) == data.where(3)

    def test_every_file_can_be_read(self, data: Dataset) -> None:
        assert data.unreadable() == []
        if (file := data.file(1)) is None:
            return
        file.write_bytes(b"")
        (line,) = data.unreadable()
        assert line.startswith(f"{file}: ") and data.where(1) == str(file)
