"""A user's own torch Dataset: every mistake is one line that names the sample, and what is remembered is checked."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cache.errors import InputError, UnreadableError
from kdcache.pipeline.data.dataset import list_unreadable, open_data
from kdcache.pipeline.data.kinds.containers import items, own
from kdcache.tests.helpers.images import draw

OWN = """
import os, signal
import numpy as np
import torch
from PIL import Image

READ = []

class Own(torch.utils.data.Dataset):
    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)
    def __len__(self):
        return len(self.items)
    def __getitem__(self, i):
        with open("read", "a") as f:
            f.write(f"{i}\\n")
        item = self.items[i]
        return item() if callable(item) else item

def image(i=0, side=70):
    return torch.full((3, side, side + i % 3), i % 256, dtype=torch.uint8)
def two(last):
    return Own([(image(0), 0), last])
def floats(split):
    return two((image(1) / 255, 1))
def grey(split):
    return two((image(1)[:1], 1))
def array(split):
    return two((image(1).numpy(), 1))
def path(split):
    return two(("a.png", 1))
def deep(split):
    return two((Image.fromarray(np.zeros((4, 4), np.uint16)), 1))
def word(split):
    return two((image(1), "cat"))
def share(split):
    return two((image(1), 1.0))
def truth(split):
    return two((image(1), True))
def onehot(split):
    return two((image(1), torch.tensor([0, 1])))
def mapping(split):
    return two({"image": image(1), "label": 1})
def triple(split):
    return two((image(1), 1, 2))
def alone(split):
    return two(image(1))
def negative(split):
    return two((image(1), -1))
def unnamed(split):
    return Own([(image(0), 0), (image(1), 2)], classes=["a", "b"])
def raising(split):
    return two(lambda: {}["gone"])
def killed(split):
    return two(lambda: os.kill(os.getpid(), signal.SIGKILL))
def ended(split):
    return two(lambda: os._exit(3))
def random(split):
    return two(lambda: (torch.randint(0, 256, (3, 70, 70)).to(torch.uint8), 1))
def empty(split):
    return Own([])
def one_sided(split):
    return two((image(1), 1)) if split == "eval" else [1]
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(image(), 0)])
def stream(split):
    return Stream()
def pairs(split):
    return [(image(), 0)]
MANY = [[image(i), torch.tensor(i % 2)] for i in range(9)]
def many(split):
    return Own(MANY)
def bare(split):
    return Own([image(0), (image(1), "no label"), image(2)])
def thousands(split):
    return Own([(image(0, 1), 19_999), (image(1, 1), 0)])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    return name


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("floats", r"sample 1 of .*: its image is Tensor float32 \[3, 70, 71\], .*: leave out transforms"),
        ("grey", r"sample 1 .*: its image is Tensor uint8 \[1, 70, 71\], but must be a PIL image"),
        ("array", r"its image is ndarray uint8 \[3, 70, 71\]"),
        ("path", r"its image is str 'a.png', .*: return \(paths, labels\)"),
        ("deep", r"sample 1 .*mode I;16: has more than 8 bits a channel"),
        ("word", "sample 1 of .*: its label is str 'cat', but must be a whole number"),
        ("share", r"its label is float 1\.0, but"),
        ("truth", "its label is bool True, but"),
        ("onehot", r"its label is Tensor int64 \[2\], but"),
        ("mapping", r"sample 1 .*: is dict, but must be \(image, label\)"),
        ("triple", "is tuple of 3, but"),
        ("alone", "is Tensor uint8"),
        ("negative", "sample 1 .*: its label -1 is not one of the 1 classes"),
        ("unnamed", "sample 1 .*: its label 2 is not one of the 2 classes"),
        ("raising", "sample 1 .*: KeyError: 'gone'"),
        ("killed", "sample 1 .*: the worker process that read it was killed"),
        ("ended", "sample 1 .*: the worker process that read it was killed or ended"),
        ("random", "sample 1 .*: has other pixels or another label each time it is read: leave out random transforms"),
        ("empty", "has no samples in this split"),
        ("one_sided", "'train' must give a Dataset as 'eval' does"),
        ("stream", "an IterableDataset has no samples by place: return"),
        ("pairs", "a map-style torch Dataset of"),
    ],
)
def test_a_mistake_is_one_line(function: str, message: str, module: str) -> None:
    with pytest.raises((InputError, UnreadableError), match=message) as caught:
        open_data(f"{module}:{function}", "eval" if function == "one_sided" else "train")
    assert "\n" not in str(caught.value)


def test_unlabelled_samples_may_be_images_alone(module: str) -> None:
    data = open_data(f"{module}:bare", "train", unlabelled=True)
    assert len(data) == 3 and data.labels.shape == (3, 0) and data.decode(1).shape == (3, 70, 71)
    assert list_unreadable(f"{module}:bare", "train", unlabelled=True) == []
    assert "sample 0" in list_unreadable(f"{module}:bare", "train")[0]


def test_without_class_names_the_largest_label_tells_how_many_there_are(module: str) -> None:
    assert len(open_data(f"{module}:thousands", "eval").class_names) == 20_000


def read() -> list[int]:
    """The samples that were read since the last call."""
    file = Path("read")
    found = [int(line) for line in file.read_text().split()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_a_second_opening_reads_only_what_a_fingerprint_covers(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (own, items):
        monkeypatch.setattr(place, "FINGERPRINTED_FILES", 2)
    first = open_data(f"{module}:many", "train")
    drawn = sorted(first.digests)
    assert len(drawn) == 2 and set(read()) == set(range(9)) and Path("home/datasets").is_dir()
    again = open_data(f"{module}:many", "train")
    assert set(read()) == set(drawn)
    assert np.array_equal(again.labels, first.labels) and np.array_equal(again.sizes, first.sizes)
    assert again.fingerprint() == first.fingerprint() and not read()
    assert first.fingerprint(full=True) != first.fingerprint() and set(read()) == set(range(9))
    assert first.subset(np.arange(9)).fingerprint() == first.fingerprint()

    other = next(i for i in range(9) if i not in drawn)
    image, label = sys.modules[module].MANY[other]
    sys.modules[module].MANY[other] = [image, 1 - label]
    stale = open_data(f"{module}:many", "train")
    with pytest.raises(InputError, match=f"sample {other} of .*: its label is {1 - label}, and was {label} when"):
        stale.decode(other)
    sys.modules[module].MANY[other] = [image[:, 1:], label]
    with pytest.raises(InputError, match=f"sample {other} of .*has changed since its size was read"):
        stale.decode(other)
    next(Path("home/datasets").iterdir()).write_bytes(b"broken")
    assert open_data(f"{module}:many", "train").sizes[other, 0] == 69
    assert os.listdir("home/datasets")  # noqa: PTH208


def test_this_process_reads_no_sample(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Dataset opens at its first sample must not be open when the workers of a build are forked."""
    parent = os.getpid()

    def getitem(self: object, i: int) -> tuple[torch.Tensor, int]:
        assert os.getpid() != parent
        return torch.zeros((3, 8, 8), dtype=torch.uint8), 0

    __import__(module)
    monkeypatch.setattr(sys.modules[module].Own, "__getitem__", getitem)
    data = open_data(f"{module}:many", "train")
    assert data.in_memory and data.fingerprint(full=True) and not data.unreadable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("['a.png', 3], [0, 1]", "path 1 is 3, which is no path"),
        ("['a.png', 'b.png'], [0]", r"labels must be whole numbers \[N\], not int64 \(1,\)"),
        ("['a.png'], ['cat']", "labels must be whole numbers"),
        ("['a.png'], [0]", r"a\.png: cannot be read: No such file"),
        ("[], []", "images must be uint8"),
    ],
)
def test_wrong_lists_of_paths_are_one_line(
    change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_lists_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(f"def lists(split):\n    return {change}\n")
    for image in ("a.png", "b.png") if "labels" in message else ():
        draw(tmp_path / image)
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        open_data(f"{name}:lists", "train")
    assert "\n" not in str(caught.value)
