"""Datasets by stable index: order, splits, labels, fingerprints, and one clear line for each mistake."""

import gzip
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, FashionMNIST

from kdcache.cache.errors import InputError
from kdcache.pipeline.data import imagefiles
from kdcache.pipeline.data.dataset import list_unreadable, open_data
from kdcache.pipeline.data.imagefiles import IMAGENET_MEAN, IMAGENET_STD
from kdcache.pipeline.data.kinds import files, named
from kdcache.pipeline.data.kinds.arrays import ArrayDataset
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.tests.helpers.images import draw


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def top(tmp_path: Path, home: Path) -> Path:
    """Two classes in two splits, of small images."""
    for name in ("train/cat/1.png", "train/cat/2.png", "train/dog/3.png", "val/cat/4.png", "val/dog/5.png"):
        draw(tmp_path / "top" / name)
    return tmp_path / "top"


def test_files_and_classes_go_in_byte_order(tmp_path: Path, home: Path) -> None:
    for name in ("é/1.png", "a-b/2.PNG", "a/3.png", "a/deep/0.png", "B/4.png", "a/.hidden.png", ".git/5.png"):
        draw(tmp_path / "top/train" / name)
    (tmp_path / "top/train/a/notes.txt").touch()
    data = open_data(f"imagefolder:{tmp_path}/top", "train")
    assert data.paths == ("B/4.png", "a-b/2.PNG", "a/3.png", "a/deep/0.png", "é/1.png")
    assert data.class_names == ("B", "a", "a-b", "é")
    assert data.labels.tolist() == [[0], [2], [1], [1], [3]]


def test_a_small_folder_is_in_memory_and_equals_its_files(top: Path) -> None:
    train, val = (open_data(f"imagefolder:{top}", split) for split in ("train", "eval"))
    pixels = np.stack([np.asarray(Image.open(top / "train" / path)) for path in train.paths])
    assert train.pixels is not None and np.array_equal(train.pixels, pixels)
    assert torch.equal(train.decode(2), torch.from_numpy(pixels[2]).permute(2, 0, 1))
    assert train.image_size == 8 and train.sizes.tolist() == [[8, 8]] * 3
    np.testing.assert_allclose(train.mean, pixels.mean((0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(train.std, pixels.std((0, 1, 2)) / 255, rtol=1e-12)
    assert (val.mean, val.std) == (train.mean, train.std)


def test_the_eval_split_alone_knows_the_statistics_of_train(top: Path) -> None:
    val = open_data(f"imagenet:{top}", "eval")
    assert val.name == "imagenet" and val.labels.tolist() == [[0], [1]]
    assert val.mean == open_data(f"imagenet:{top}", "train").mean


def test_larger_images_stay_in_files_and_their_headers_are_read_once(
    top: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(top / "train/cat/1.png", 70, 90)
    data = open_data(f"imagefolder:{top}", "train")
    assert data.pixels is None and data.image_size is None
    assert data.sizes.tolist() == [[70, 90], [8, 8], [8, 8]] and data.sizes.dtype == np.int32
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert np.array_equal(data.decode(0), np.asarray(Image.open(top / "train/cat/1.png")).transpose(2, 0, 1))

    opened = []
    size = imagefiles.image_size
    monkeypatch.setattr(imagefiles, "image_size", lambda path: opened.append(path) or size(path))
    assert np.array_equal(open_data(f"imagefolder:{top}", "train").sizes, data.sizes)
    assert not opened
    (memory,) = (home / "datasets").iterdir()
    memory.write_bytes(memory.read_bytes()[:-9])
    assert np.array_equal(open_data(f"imagefolder:{top}", "train").sizes, data.sizes)
    assert len(opened) == 3
    draw(top / "train/cat/1.png", 71, 90)
    with pytest.raises(InputError, match=r"1\.png: has changed"):
        data.decode(0)
    assert open_data(f"imagefolder:{top}", "train").sizes[0].tolist() == [71, 90]


def test_without_split_folders_every_tenth_of_a_class_is_held_out(tmp_path: Path, home: Path) -> None:
    for i in range(25):
        draw(tmp_path / "top/cat" / f"{i:02}.png")
    for i in range(9):
        draw(tmp_path / "top/dog" / f"{i:02}.png")
    train, held = (open_data(f"imagefolder:{tmp_path}/top", split) for split in ("train", "eval"))
    assert held.paths == ("cat/09.png", "cat/19.png")
    assert len(train) == 32 and not set(train.paths) & set(held.paths)
    assert train.class_names == held.class_names == ("cat", "dog")
    assert train.mean == held.mean


def test_unlabelled_images_need_no_class_folders(tmp_path: Path, home: Path) -> None:
    for i in range(12):
        draw(tmp_path / "top" / ("deep" if i % 2 else ".") / f"{i:02}.png")
    spec = f"imagefolder:{tmp_path}/top"
    train, held = (open_data(spec, split, unlabelled=True) for split in ("train", "eval"))
    assert train.labels.shape == (11, 0) and train.labels.dtype == np.int64 and train.class_names == ()
    assert held.paths == ("deep/07.png",)
    assert open_data("digits", "eval", unlabelled=True).labels.shape == (355, 0)


def test_a_moved_copy_keeps_its_fingerprint_and_any_change_changes_it(top: Path, tmp_path: Path) -> None:
    def fingerprint(where: Path) -> str:
        return open_data(f"imagefolder:{where}", "train").fingerprint()

    before = fingerprint(top)
    changes = {
        "content": lambda copy: shutil.copy(copy / "train/cat/2.png", copy / "train/cat/1.png"),
        "bytes": lambda copy: os.truncate(copy / "train/cat/1.png", 1000),
        "path": lambda copy: (copy / "train/cat/1.png").rename(copy / "train/cat/0.png"),
        "label": lambda copy: (copy / "train/cat/1.png").rename(copy / "train/dog/1.png"),
        "class": lambda copy: (copy / "train/cat").rename(copy / "train/Cat"),
        "sample": lambda copy: draw(copy / "train/cat/9.png"),
    }
    seen = {before}
    for name, change in changes.items():
        copy = tmp_path / name
        shutil.copytree(top, copy)
        os.utime(copy / "train/cat/1.png", (1, 1))
        assert fingerprint(copy) == before
        change(copy)
        seen.add(fingerprint(copy))
    seen.add(open_data(f"imagefolder:{top}", "train").fingerprint(full=True))
    seen.add(open_data(f"imagefolder:{top}", "train", unlabelled=True).fingerprint())
    seen.add(open_data(f"imagefolder:{top}", "eval").fingerprint())
    assert len(seen) == len(changes) + 4


def test_only_a_full_fingerprint_reads_all_of_many_files(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FINGERPRINTED_FILES", 1)
    data = open_data(f"imagefolder:{top}", "train")
    before = data.fingerprint(), data.fingerprint(full=True)
    noticed = []
    for path in data.paths:
        original = (top / "train" / path).read_bytes()
        (top / "train" / path).write_bytes(bytes(len(original)))
        changed = replace(data)  # a Dataset remembers its own fingerprints
        noticed.append(changed.fingerprint() != before[0])
        assert changed.fingerprint(full=True) != before[1]
        (top / "train" / path).write_bytes(original)
    assert sum(noticed) == 1


def test_digits_never_change() -> None:
    train, held = (open_data("digits", split) for split in ("train", "eval"))
    assert (len(train), len(held), train.image_size) == (1442, 355, 8)
    assert train.pixels is not None and (train.pixels.min(), train.pixels.max()) == (0, 255)
    assert np.bincount(held.labels[:, 0]).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert train.mean == held.mean
    assert train.fingerprint()[:16] == "c4214a6080dc2b4b"
    assert held.fingerprint(full=True)[:16] == "1c0771f9624de087"


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Fashion-MNIST's four files, tiny."""
    for part, n in (("train", 5), ("t10k", 3)):
        pixels = np.arange(n * 12, dtype=np.uint8).reshape(n, 3, 4)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8))
    return tmp_path


def test_fashion_mnist_from_debians_files(packed: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", packed)
    data = open_data("fashion-mnist", "eval")
    assert data.pixels is not None and data.pixels.shape == (3, 3, 4, 3) and data.image_size == 4
    assert data.pixels[1, 2].tolist() == [[20] * 3, [21] * 3, [22] * 3, [23] * 3]
    assert data.labels.tolist() == [[0], [1], [2]] and data.class_names[1] == "Trouser"
    assert data.mean[0] == pytest.approx(29.5 / 255)  # of the 60 pixels of train


def test_broken_idx_files_are_refused(packed: Path, home: Path) -> None:
    images, labels = packed / "train-images-idx3-ubyte.gz", packed / "train-labels-idx1-ubyte.gz"
    write_idx(labels, np.arange(4, dtype=np.uint8))
    with pytest.raises(InputError, match="labels do not fit the images"):
        open_data(f"fashion-mnist:{packed}", "train")
    images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:-1]))
    with pytest.raises(InputError, match=r"train-images.*not a whole idx file"):
        open_data(f"fashion-mnist:{packed}", "train")
    images.write_bytes(images.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"train-images.*cannot be read: Compressed file ended"):
        open_data(f"fashion-mnist:{packed}", "train")


def test_cifar_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name, n in (("data_batch_1", 4), ("test_batch", 2)):
        pixels = np.arange(n * 3072, dtype=np.uint32).astype(np.uint8).reshape(n, 3072)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(n))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})
    data = open_data(f"cifar10:{tmp_path}", "eval")
    assert data.name == "cifar10" and data.pixels is not None and data.pixels.shape == (2, 32, 32, 3)
    assert data.decode(1).flatten().tolist() == [i % 256 for i in range(3072)]
    assert data.labels.tolist() == [[0], [1]] and data.class_names == tuple("abcdefghij")


@pytest.mark.parametrize(("spec", "kind"), [("cifar10", CIFAR10), ("fashion-mnist", FashionMNIST)])
def test_a_failed_download_says_where_the_files_belong(
    spec: str, kind: type, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(kind, "download", fail)
    monkeypatch.setattr(named, "DEBIAN_FASHION_MNIST", home)
    message = rf"^{home}/data: has no {spec} .*no network.*put .* there.*imagefolder:PATH"
    with pytest.raises(InputError, match=message):
        open_data(spec, "train")


USERS = """
import numpy as np
from kdcache.pipeline.data.dataset import open_data
def arrays(split):
    n = 4 if split == "train" else 2
    return np.full((n, 5, 6, 3), n, dtype=np.uint8), [i for i in range(n)]
def named(split):
    return (*arrays(split), ["a", "b", "c", "d"])
def dataset(split):
    return open_data("digits", split)
def floats(split):
    return np.zeros((2, 5, 5, 3)), [0, 1]
def short(split):
    return np.zeros((2, 5, 5, 3), dtype=np.uint8), [0]
def negative(split):
    return np.zeros((2, 5, 5, 3), dtype=np.uint8), [0, -1]
def protocol(split):
    from kdcache.pipeline.data.dataset import Dataset
    return Dataset("mine", split, images=[], labels=[])

def pairs(split):
    return [(0, 1)]
def broken(split):
    raise RuntimeError("two\\nlines")
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_data.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *filter(None, sys.path)])


@pytest.mark.usefixtures("users_module")
def test_a_users_function() -> None:
    data = open_data("users_data:arrays", "eval")
    assert data.name == "users_data:arrays" and data.sizes.tolist() == [[5, 6]] * 2
    assert data.labels.tolist() == [[0], [1]] and data.class_names == ("0", "1", "2", "3")
    assert data.mean == (4 / 255, 4 / 255, 4 / 255) and data.std[0] > 0
    assert open_data("users_data:named", "eval").class_names == ("a", "b", "c", "d")
    assert open_data("users_data:named", "eval").fingerprint() != data.fingerprint()
    own = open_data("users_data:dataset", "eval")
    assert own.name == "users_data:dataset" and own.fingerprint() == open_data("digits", "eval").fingerprint()


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("floats", r"images must be uint8 \[N, H, W, 3\], not float64"),
        ("short", r"labels must be whole numbers \[N\], not int64 \(1,\)"),
        ("negative", "labels must be places in class_names"),
        ("pairs", "return an ArrayDataset, a FileDataset, or images"),
        ("protocol", r"Dataset\(\.\.\.\) is only a protocol: return an ArrayDataset, a FileDataset, or images"),
        ("broken", r"broken\('train'\) failed: RuntimeError: two lines"),
        ("missing", "'users_data' has no function 'missing'; known are digits"),
    ],
)
def test_a_users_mistake_is_one_line(function: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_data(f"users_data:{function}", "train")
    assert "\n" not in str(caught.value)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("imagenett:{top}", "train", "cannot import 'imagenett': .* known are digits, cifar10"),
        ("{top}", "train", "unknown dataset .* imagefolder:{top}"),
        ("imagefolder", "train", "needs a folder: imagefolder:PATH"),
        ("imagefolder:{top}/train/cat/1.png", "train", "1.png: is not a folder"),
        ("imagefolder:{top}/train/cat", "train", "{top}/train/cat: has no class folders"),
        ("imagefolder:{top}/other", "train", "{top}/other: no such folder"),
        ("imagenet:{top}/val", "train", "{top}/val/train: no such folder"),
        ("imagefolder:{top}/train", "eval", "{top}/train: has no tenth image in any class"),
        ("digits", "test", "no split 'test'"),
    ],
)
def test_a_wrong_spec_is_one_line(spec: str, split: str, message: str, top: Path) -> None:
    with pytest.raises(InputError, match=message.format(top=top)) as caught:
        open_data(spec.format(top=top), split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (lambda top: shutil.rmtree(top / "train"), "eval", "top/train: no such folder"),
        (lambda top: shutil.rmtree(top / "val"), "eval", "has a folder train but no val or test or eval"),
        (lambda top: empty(top / "val"), "eval", "top/val: holds no images"),
        (lambda top: empty(top / "train"), "train", "top/train: has no class folders"),
        (lambda top: empty(top / "train/dog"), "train", "top/train/dog: holds no images"),
        (lambda top: draw(top / "val/ox/1.png"), "eval", "val/ox: no such class folder in .*top/train$"),
        (lambda top: draw(top / "train/1.png"), "train", "train/1.png: lies in no class folder"),
        (lambda top: draw(top / "train/cat/1.bmp"), "train", "1.bmp: .*holds 1 files of formats that cannot"),
        (lambda top: (top / "train/cat/4.png").symlink_to("gone"), "train", "4.png: cannot be read: No such"),
        (lambda top: os.truncate(top / "train/cat/1.png", 99), "train", "1.png: cannot be decoded: .*; 1 of"),
        (lambda top: os.truncate(top / "train/cat/1.png", 9), "train", "1.png: not a JPEG.*; 1 of 3 images"),
        (lambda top: os.truncate(top / "train/cat/1.png", 0), "train", "kdcache build --list-unreadable"),
    ],
)
def test_a_wrong_folder_is_one_line(
    change: Callable[[Path], object],
    split: str,
    message: str,
    top: Path,
) -> None:
    change(top)
    with pytest.raises(InputError, match=message) as caught:
        open_data(f"imagefolder:{top}", split)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_all_listed(top: Path) -> None:
    draw(top / "train/cat/1.png", 100, 100)
    data = open_data(f"imagefolder:{top}", "train")
    Image.fromarray(np.zeros((100, 100), dtype=np.uint16)).save(top / "train/cat/1.png")
    with pytest.raises(InputError, match=r"cat/1\.png: has more than 8 bits a channel"):
        data.decode(0)
    (top / "train/dog/3.png").write_bytes(b"")
    done = []
    lines = data.unreadable(lambda *progress: done.append(progress))
    assert [line.split(":")[0] for line in lines] == [f"{top}/train/cat/1.png", f"{top}/train/dog/3.png"]
    assert done == [(3, 3)]
    with pytest.raises(InputError, match=r"dog/3\.png"):  # its header is read at opening
        open_data(f"imagefolder:{top}", "train")
    assert list_unreadable(f"imagefolder:{top}", "train") == lines
    assert list_unreadable("digits", "train") == []


def test_fields_that_do_not_fit_are_refused() -> None:
    sizes, labels, images = np.full((2, 2), 4, np.int32), np.zeros((2, 1), np.int64), torch.zeros(2, 4, 4, 3)
    with pytest.raises(InputError, match="dataset mine, split train: images must be uint8"):
        ArrayDataset("mine", "train", labels, ("a",), sizes, IMAGENET_MEAN, IMAGENET_STD, images)
    with pytest.raises(InputError, match="root must come with a path a sample"):
        FileDataset("mine", "train", labels, ("a",), sizes, IMAGENET_MEAN, IMAGENET_STD, Path(), ("1.png",))
