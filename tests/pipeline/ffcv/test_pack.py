"""FFCV's file is read back as it was packed, and appears whole or not at all."""

import shutil
import signal
import subprocess
import sys
import textwrap
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache import errors as e
from kdcache.pipeline.ffcv import format, write
from kdcache.pipeline.ffcv.pack import pack_ffcv
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import RENDERER
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.caches import same
from kdcache.tests.helpers.ffcv import packed_arrays, packed_files, quiet
from kdcache.tests.helpers.images import arrays_data


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A cache, its images and the file, none of them to be changed."""
    return packed_arrays(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return packed_files(tmp_path_factory.mktemp("files"))


def test_images_labels_and_chosen_views_come_back(packed, tmp_path):
    cache, data, _ = packed
    lines = []
    path = pack_ffcv(cache, data, tmp_path / "one.beton", [1], lines.append)
    file = FFCVFile(path)
    assert file.views == (1,) and file.raw and file.renderer == RENDERER
    assert same(file.read(1), cache.read(1)) and file.read(1).prior.equal(cache.prior)
    assert np.array_equal(file.labels, cache.train.labels) and (file.mean, file.std) == (data.mean, data.std)
    assert all(file.image(i).equal(data.decode(i)) for i in range(len(data)))
    assert same(file.read_evaluation(), cache.read_evaluation())
    assert np.array_equal(file.evaluation.labels, cache.evaluation.labels)
    assert "50 images (raw pixels) and 1 views" in lines[0] and " about " in lines[0]
    with pytest.raises(e.NotFoundError, match=r"view 0 is not packed in .*one.beton \(packed: 1\)"):
        file.read(0)
    drawn, want = file.parameters(1), draw("crop,flip", 0, 1, range(50), data.sizes)
    assert np.array_equal(drawn.boxes, want.boxes) and np.array_equal(drawn.flips, want.flips)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**31), st.binary(min_size=1, max_size=40))
def test_the_checksum_is_zlibs_seeded_with_the_place(first, view, content):
    rows = np.frombuffer(content * 2, np.uint8).reshape(2, -1)
    got = format.checksums(rows, first, view)
    assert [zlib.crc32(content, format.checksum_seed(first + i, view)) for i in range(2)] == got.tolist()


def test_a_pack_refuses_what_it_cannot_do(packed, tmp_path, monkeypatch):
    cache, data, path = packed
    with pytest.raises(e.InputError, match=r"ends in \.beton"):
        pack_ffcv(cache, data, tmp_path / "x.ffcv", None, quiet)
    with pytest.raises(e.NotFoundError, match="no complete view 7"):
        pack_ffcv(cache, data, tmp_path / "x.beton", [0, 7], quiet)
    with pytest.raises(e.MismatchError, match="other data than toy: fingerprint"):
        pack_ffcv(cache, arrays_data(50, 6, 8), tmp_path / "x.beton", None, quiet)
    lines = []
    before = path.read_bytes()
    assert pack_ffcv(cache, data, path, None, lines.append) == path and "holds these views already" in lines[0]
    with pytest.raises(e.InputError, match="other records and is never overwritten"):
        pack_ffcv(cache, data, path, [0], quiet)
    assert path.read_bytes() == before
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(e.InputError, match=r"would take .* and 1 B are free"):
        pack_ffcv(cache, data, tmp_path / "x.beton", None, quiet)
    assert not list(tmp_path.iterdir())


def test_a_file_made_meanwhile_is_kept(packed, tmp_path, monkeypatch):
    cache, data, _ = packed
    out = tmp_path / "x.beton"
    written = write.Writer.write
    monkeypatch.setattr(write.Writer, "write", lambda self, *a: (written(self, *a), out.write_text("theirs")))
    with pytest.raises(e.InputError, match="made meanwhile"):
        pack_ffcv(cache, data, out, None, quiet)
    assert out.read_text() == "theirs" and [p.name for p in tmp_path.iterdir()] == ["x.beton"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_pack_that_is_stopped_leaves_no_file(packed, tmp_path, how):
    cache, data, path = packed
    script = f"""
        import time
        from pathlib import Path
        from kdcache.cache.store.cache import Cache
        from kdcache.pipeline.ffcv import write
        from kdcache.pipeline.ffcv.pack import pack_ffcv
        from kdcache.tests.helpers.images import arrays_data
        read_images = write.read_images
        def slowly(*about):
            for i, image in enumerate(read_images(*about)):
                if i == 5:
                    print("there", flush=True)
                    time.sleep(60)
                yield image
        write.read_images = slowly
        pack_ffcv(Cache(Path({str(cache.path)!r})), arrays_data(50, 6, 9), Path("x.beton"))
    """
    with warm.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while process.stdout.readline() not in (b"there\n", b""):
            pass
        with pytest.raises(e.BusyError, match="another process is packing"):
            pack_ffcv(cache, data, tmp_path / "x.beton", None, quiet)
        process.send_signal(how)
        _, errors = process.communicate()
    left = [p.name for p in tmp_path.iterdir()]
    if how == signal.SIGINT:
        assert errors.strip().endswith(b"KeyboardInterrupt") and not left
    else:
        assert left == [".x.beton.packing"]
        pack_ffcv(cache, data, tmp_path / "x.beton", None, quiet)
        assert [p.name for p in tmp_path.iterdir()] == ["x.beton"]
        assert (tmp_path / "x.beton").read_bytes() == path.read_bytes()  # nothing in it but what it is made from


def test_jpeg_is_stored_as_it_is(files):
    _, data, path = files
    found = FFCVFile(path)
    for i in range(len(data)):
        file, row = data.root / data.paths[i], found.table["image"][i]
        assert found.image(i).equal(data.decode(i))
        as_it_is = int(file.stem) // 4 % 4 < 2
        assert row["mode"] == (format.JPEG if as_it_is else format.RAW)
        if as_it_is:
            at = int(row["pointer"])
            assert found.content[at : at + found.image_bytes[i]].tobytes() == file.read_bytes()


def test_a_file_that_has_gone_is_named(files, tmp_path):
    cache, data, _ = files
    other = tmp_path / "images"
    shutil.copytree(data.root, other)
    (other / data.paths[5]).unlink()
    moved = replace(data, root=other)
    moved._fingerprints[False] = data.fingerprint()
    with pytest.raises(e.InputError, match=f"{data.paths[5]} cannot be read"):
        pack_ffcv(cache, moved, tmp_path / "x.beton", None, quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]
