"""WebDataset tars: patterns, splits, what is remembered, and one line for each tar that is damaged or hostile."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import list_unreadable, open_data
from kdcache.pipeline.data.kinds.containers import items, tars
from kdcache.pipeline.data.kinds.containers.items import ItemDataset
from kdcache.pipeline.data.kinds.containers.tarnames import expand
from kdcache.tests.helpers.containers import pictures, write_tar
from kdcache.train.evaluation.otherdata import whole_of
from kdcache.train.plan.resuming import placed

IMAGES = [sample.content for sample in pictures(12, 0)]
Members = list[tuple[str, bytes]]


def samples(n: int, first: int = 0, classes: int = 2) -> Members:
    each = [(f"{i:04d}.jpg", IMAGES[i % 12], f"{i:04d}.cls", b"%d\n" % (i % classes)) for i in range(first, first + n)]
    return [member for a, b, c, d in each for member in ((a, b), (c, d))]


@pytest.fixture(autouse=True)
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "tars").mkdir()
    return tmp_path / "tars"


def opened(spec: str, split: str = "train") -> ItemDataset:
    data = open_data(spec, split)
    assert isinstance(data, ItemDataset) and data.name == "wds"
    return data


def test_patterns_name_tars_in_order(top: Path) -> None:
    for name in ("a-000", "a-001", "a-002", "b é-7", "{x}"):
        write_tar(top / f"{name}.tar", samples(1))
    write_tar(top / "deep/c.tar", samples(1))
    write_tar(top / ".hidden/d.tar", samples(1))

    def names(pattern: str) -> list[str]:
        return [path.name for path in expand(f"{top}/{pattern}")]

    assert names("a-{000..002}.tar") == names("a-*.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names("{b é-7,a-001}.tar") == ["b é-7.tar", "a-001.tar"]
    assert names("a-00[02].tar") == ["a-000.tar", "a-002.tar"] and names("{x}.tar") == ["{x}.tar"]
    assert names("") == ["a-000.tar", "a-001.tar", "a-002.tar", "b é-7.tar", "c.tar", "{x}.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{000..003}.tar", r"a-003\.tar: no such file, one of 4 that"),
        ("a-{000..999999999}.tar", "the pattern names more than 1,000,000 tars"),
        ("a-{5..2}.tar", "is no range"),
        ("c-*.tar", r"c-\*\.tar: no such files"),
        ("{a,a}-000.tar", "names .*a-000.tar twice"),
        ("a-000.tar::{a,b}-000.tar", "b-000.tar: no such file"),
        ("a-000.tar::{a-000,a-001}.tar", r"a-000\.tar: is in both splits"),
        ("a-000.tar::", "needs tars: wds:TRAIN::EVAL"),
        ("::::", "needs tars"),
        ("", "holds no .tar files|needs tars|holds no sample"),
    ],
)
def test_a_wrong_pattern_is_one_line(pattern: str, message: str, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3 if pattern else 0):
        write_tar(top / f"a-{i:03d}.tar", samples(1))
    monkeypatch.chdir(top)
    with pytest.raises(InputError, match=message) as caught:
        open_data(f"wds:{pattern or top}", "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["wds:https://host/a.tar", "wds:pipe:cat a.tar", "wds:s3://b/a-{0..9}.tar"])
def test_addresses_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="tars are read from disk"):
        open_data(spec, "train")


def test_names_tell_the_splits(top: Path) -> None:
    sizes = {"imagenet1k-train-0": 4, "imagenet1k-train-1": 3, "imagenet1k-validation-0": 2, "x-test-0": 1}
    for name, n in sizes.items():
        write_tar(top / f"{name}.tar", samples(n))
    train, held = (opened(f"wds:{top}", split) for split in ("train", "eval"))
    assert (len(train), len(held)) == (7, 2) and "1 tars of test are not read" in str(train.note)
    assert whole_of(f"wds:{top}", held) is held
    write_tar(top / "other.tar", samples(1))
    with pytest.raises(InputError, match=r"other\.tar: its name does not tell .*: give wds:TRAIN::EVAL"):
        open_data(f"wds:{top}", "train")
    for split in ("train", "val"):
        write_tar(top / "deep" / split / "0.tar", samples(3))
    assert len(opened(f"wds:{top}/deep", "eval")) == 3


def test_of_tars_without_splits_every_tenth_is_held_out(top: Path) -> None:
    for i in range(2):
        write_tar(top / f"{i}.tar", samples(11, 11 * i))
    train, held = (opened(f"wds:{top}", split) for split in ("train", "eval"))
    assert len(train) == 20 and held.paths == ("0018.jpg", "0019.jpg") and "held out" in str(held.note)
    assert len(whole_of(f"wds:{top}", held)) == 22


def test_paths_of_both_splits_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert placed("wds:a-{0..9}.tar::b/*.tar") == f"wds:{tmp_path}/a-{{0..9}}.tar::{tmp_path}/b/*.tar"
    assert placed("imagefolder:a::b") == f"imagefolder:{tmp_path}/a::b" and placed("own:data") == "own:data"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_other_members(format: int, top: Path) -> None:
    long = "/".join(["x" * 60, "y" * 60, "é" * 20])
    members = [("README", b"text"), (f"./{long}/0.jpg", IMAGES[0]), (f"./{long}/0.cls", b"cat"), ("._0.jpg", b"mac")]
    members += [(f"{long}/0.seg.png", IMAGES[1]), ("only.txt", b"no image"), ("z.v1.webp", b"?"), ("z.JPEG", IMAGES[2])]
    members += [("z.json", b'{"cls": "dog", "label": null}'), ("z.txt", b"caption")]
    members[-2] = ("z.json", b'{"cls": "dog"}')
    write_tar(top / "a.tar", members, format)
    data = opened(f"wds:{top}")
    assert data.paths == (f"{long}/0.jpg", "z.JPEG") and data.class_names == ("cat", "dog")
    assert "1 samples without an image are left out" in str(data.note)
    assert data.where(1) == f"{top}/a.tar: z.JPEG" and data.decode(1).shape[0] == 3


def test_a_second_opening_reads_no_tar(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        write_tar(top / f"{i}.tar", samples(11, 11 * i))
    first = opened(f"wds:{top}")
    with monkeypatch.context() as patch:
        patch.setattr(tars, "index_tar", None)
        again = opened(f"wds:{top}")
        patch.setattr(items, "_START", 0)
    assert again.paths == first.paths and np.array_equal(again.sizes, first.sizes)
    assert again.fingerprint() == first.fingerprint()
    for memory in (top.parent / "home/datasets").iterdir():
        memory.write_bytes(memory.read_bytes()[:-30])
    assert opened(f"wds:{top}").fingerprint() == first.fingerprint()
    os.utime(top / "0.tar", (1, 1))
    assert opened(f"wds:{top}").fingerprint() == first.fingerprint()
    with pytest.raises(InputError, match=r"0\.tar: has changed since it was indexed: open the dataset again"):
        first.decode(0)


def test_class_names_may_stand_beside_the_tars(top: Path) -> None:
    write_tar(top / "train.tar", samples(4))
    write_tar(top / "val.tar", samples(2))
    (top / "classnames.txt").write_text("a cat\nein großer Hund\n", encoding="utf-8")
    assert opened(f"wds:{top}", "eval").class_names == ("a cat", "ein großer Hund")
    (top / "classnames.txt").write_text("a cat\n")
    with pytest.raises(InputError, match=r"classnames\.txt: names 1 classes, but labels go up to 1"):
        open_data(f"wds:{top}", "train")


def test_a_header_that_lies_deep_in_the_file_is_found(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "_START", 30)
    write_tar(top / "train.tar", samples(3))
    assert opened(f"wds:{top}").sizes.min() > 60


def damaged(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return damage


def with_member(**about: object) -> Callable[[Path], None]:
    """Put a member with these properties at the start of a tar."""

    def add(path: Path) -> None:
        member = tarfile.TarInfo("0000.png")
        for name, value in about.items():
            setattr(member, name, value)
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())

    return add


def replaced(name: str, content: bytes | None) -> Callable[[Path], object]:
    members = [(n, content if n == name and content is not None else c) for n, c in samples(3) if n != name or content]
    return lambda path: write_tar(path, members)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged(lambda c: c.__delitem__(slice(len(c) // 2, None))), r"a\.tar: ends .*truncated"),
        (
            damaged(lambda c: c.__delitem__(slice(512 + 100, None))),
            "ends before the content of 0000.jpg: it is truncated",
        ),
        (damaged(lambda c: c.__delitem__(slice(0, None))), "ends in the middle: it is truncated, or no tar"),
        (damaged(lambda c: c.__setitem__(3, c[3] ^ 1)), "is no tar: bad checksum"),
        (damaged(lambda c: c.__setitem__(slice(None), gzip.compress(bytes(c)))), r"compressed \(gzip\): unpack it"),
        (damaged(lambda c: c.extend(bytes(c))), "goes on after its end"),
        (lambda path: path.write_bytes(IMAGES[0]), "is no tar"),
        (lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()), "holds no .tar files|not a plain file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a plain file"),
        (
            with_member(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "0000.png is a link or something else that is no plain",
        ),
        (with_member(type=tarfile.LNKTYPE, linkname="0001.jpg"), "is a link"),
        (with_member(type=tarfile.CHRTYPE), "is a link or something else"),
        (with_member(type=tarfile.GNUTYPE_SPARSE), "is a link or something else"),
        (with_member(size=-5), "ends before the content of|is no tar"),
        (with_member(size=1 << 50), "ends before the content of 0000.png: it is truncated"),
        (with_member(type=tarfile.XHDTYPE, size=1 << 40), "ends before the content"),
        (with_member(), "0000.png and 0000.jpg|0000.jpg and 0000.png are two images of one sample"),
        (with_member(name="0000.jpg"), "0000.jpg is there twice"),
        (replaced("0001.cls", None), r"0001\.jpg: has no label \(1 samples have none\)"),
        (replaced("0001.cls", b"\xff"), r"0001\.cls cannot be read: .*decode"),
        (replaced("0001.cls", b" \n"), r"0001\.cls: label '' is neither"),
        (replaced("0001.cls", b"-1"), "label '-1' is neither"),
        (replaced("0001.cls", b"1" * (1 << 20) + b"1"), r"0001\.cls is larger than 1 MiB"),
        (replaced("0001.cls", b"9" * 30), "label 99999999999999999999 is no class"),
        (replaced("0001.jpg", b"no image"), r"a\.tar: 0001\.jpg: not a JPEG.*--list-unreadable"),
        (lambda path: write_tar(path, [("a.txt", b"x")]), "holds no sample with an image"),
        (lambda path: write_tar(path, [("a.jpg", IMAGES[0]), ("a.json", b"[1]")]), "has no label"),
        (lambda path: write_tar(path, [("a.jpg", IMAGES[0]), ("a.json", b"{")]), r"a\.json cannot be read"),
        (lambda path: write_tar(path, [("a.jpg", IMAGES[0]), ("a.json", b"[" * 99_999)]), r"a\.json cannot be read"),
    ],
)
def test_a_wrong_tar_is_one_line(change: Callable[[Path], object], message: str, top: Path) -> None:
    change(write_tar(top / "a.tar", samples(3)))
    with pytest.raises(InputError, match=message) as caught:
        open_data(f"wds:{top}/a.tar", "train")
    assert "\n" not in str(caught.value)


def test_pax_headers_tell_names_and_sizes_and_are_not_trusted(top: Path) -> None:
    good = write_tar(top / "a.tar", [("é" * 99 + ".jpg", IMAGES[0]), ("é" * 99 + ".cls", b"1")])
    assert opened(f"wds:{good}").paths == ("é" * 99 + ".jpg",)
    for record in (b"999999999 path=x\n", b"22 GNU.sparse.major=1\n", b"17 size=99999999\n", b"11 size=-5\n"):
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, len(record)
        file = io.BytesIO(header.tobuf() + record.ljust(512, b"\0") + good.read_bytes())
        (top / "b.tar").write_bytes(file.getvalue())
        if record.startswith(b"999"):
            assert len(opened(f"wds:{top}/b.tar")) == 1
        else:
            with pytest.raises(InputError, match=r"b\.tar: (holds a sparse|ends before)"):
                open_data(f"wds:{top}/b.tar", "train")


def test_unreadable_images_of_the_part_that_is_asked_for_are_listed(top: Path) -> None:
    members = samples(20, classes=1)
    members[2 * 9] = ("0009.jpg", b"no image")
    write_tar(top / "a.tar", members)
    assert list_unreadable(f"wds:{top}", "train") == []
    assert list_unreadable(f"wds:{top}", "eval") == [f"{top}/a.tar: 0009.jpg: not a JPEG, PNG, WebP or GIF image"]


def test_labels_that_the_train_split_lacks(top: Path) -> None:
    write_tar(top / "train.tar", samples(3))
    write_tar(top / "val.tar", samples(3, classes=3))
    with pytest.raises(InputError, match=r"val\.tar: 0002\.jpg: label '2' is no class of the train split"):
        open_data(f"wds:{top}", "eval")
    assert len(open_data(f"wds:{top}", "eval", unlabelled=True)) == 3
