"""The listing of a folder's files: their order, and the lines that its key and its fingerprint are made of."""

import hashlib
import os
from pathlib import Path

import pytest

from kdcache.cache.errors import InputError
from kdcache.pipeline.data import imagefiles
from kdcache.pipeline.data.imagefiles import list_images, listing, load_folder
from kdcache.pipeline.data.memory import memory_file
from kdcache.tests.helpers.containers import pictures

NAMES = [b"\xff.jpg", b"a/\xf0\x9f\x98\x80.jpg", b"a/\xee\x80\x80.jpg", b"a b.jpg", b"\xc3\xa9.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """300 files, some of whose names are not ASCII, and one of which is not UTF-8."""
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    content = next(sample.content for sample in pictures(1, 1))
    for name in [*NAMES, *(b"%03d.jpg" % i for i in range(295))]:
        (root / os.fsdecode(name)).write_bytes(content)
    return root


@pytest.mark.parametrize("threads", [False, True])
def test_lines_are_paths_in_byte_order_with_sizes_and_times(
    folder: Path, tmp_path: Path, threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagefiles, "_WORTH_A_THREAD", 0 if threads else 1e9)
    names = sorted([*NAMES, *(b"%03d.jpg" % i for i in range(295))])
    paths, _ = list_images(folder)
    assert [os.fsencode(path) for path in paths] == names
    about = {name: (folder / os.fsdecode(name)).stat() for name in names}
    sizes = b"".join(b"%s\0%d\n" % (name, about[name].st_size) for name in names)
    times = b"".join(b"%s\0%d %d\n" % (name, about[name].st_size, about[name].st_mtime_ns) for name in names)
    assert b"".join(listing(folder, paths)) == sizes
    assert b"".join(listing(folder, paths, times=True)) == times
    load_folder(folder, paths, tmp_path)
    assert memory_file(tmp_path, hashlib.sha256(b"kdcache listing 1\n" + times).hexdigest()).exists()


def test_what_is_gone_or_no_file_is_named(folder: Path) -> None:
    paths, _ = list_images(folder)
    (folder / paths[280]).unlink()
    with pytest.raises(InputError, match=f"{paths[280]}: cannot be read: No such file"):
        list(listing(folder, paths))
    (folder / paths[280]).mkdir()
    with pytest.raises(InputError, match=f"{paths[280]}: not a plain file"):
        list(listing(folder, paths))
