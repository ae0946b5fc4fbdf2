"""No image file ends a process, PNG's pixels are torchvision's, and of a worker that is killed the file is named."""

import json
import os
import signal
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode

from kdcache.cache import KdcacheError
from kdcache.cache.identity import TeacherIdentity
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.decode import decode_file
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.pipeline.views import workers
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers import warm
from kdcache.tests.helpers.places import ROOT


def noise(height=24, width=37):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "transparent", "transparent P"])
def test_a_png_has_torchvisions_pixels(tmp_path, mode):
    image, options = noise(), {}
    if mode.startswith("transparent"):
        image = image.convert("P" if "P" in mode else "RGB")
        options = {"transparency": b"\x10\x80" if "P" in mode else (1, 2, 3)}
    else:
        image = image.convert(mode)
    image.save(tmp_path / "1.png", **options)
    data = torch.from_numpy(np.fromfile(tmp_path / "1.png", dtype=np.uint8))
    want = torch.ops.image.decode_image(data, ImageReadMode.RGB.value)
    got = decode_file(tmp_path / "1.png")
    assert torch.equal(got, want) and got.stride() == want.stride()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_an_interlaced_png(tmp_path):
    pixels = np.asarray(noise(11, 13))
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx])
    head = struct.pack(">II", 13, 11) + bytes([8, 2, 0, 0, 1])
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert np.array_equal(decode_file(tmp_path / "1.png"), pixels.transpose(2, 0, 1))


ONE_BYTE = """
import sys
from pathlib import Path
from kdcache.cache import KdcacheError
from kdcache.cache.identity import TeacherIdentity
from kdcache.pipeline.data.decode import decode_file
path = Path(sys.argv[1])
good, refused = path.read_bytes(), 0
for at in range(60, 260):
    path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1:])
    try:
        decode_file(path)
    except KdcacheError as e:
        refused += str(e).startswith(f"{path}: cannot be decoded")
print(refused)
"""


def test_one_changed_byte_in_a_png_is_refused_each_time(tmp_path):
    noise().save(tmp_path / "1.png")
    command = [sys.executable, "-c", ONE_BYTE, str(tmp_path / "1.png")]
    assert warm.run(command, check=True).stdout == "200\n"


def test_a_short_run_of_the_fuzz(tmp_path):
    command = [sys.executable, "bench/fuzz_images.py", "--cases", "150", "--out", str(tmp_path / "found.json")]
    warm.run(command, check=True, cwd=ROOT)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == [] and sum(found["outcomes"].values()) == 150
    assert found["outcomes"].keys() == {"pixels", "refused", "same pixels"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_lie_about_the_size_is_refused_before_memory_is_taken(tmp_path, kind):
    path = tmp_path / "1"
    noise().save(path, kind)
    content = bytearray(path.read_bytes())
    if kind == "PNG":
        content[16:24] = struct.pack(">II", 13_000, 13_000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        at = content.find(b"\xff\xc0")
        content[at + 5 : at + 9] = struct.pack(">HH", 13_000, 13_000)
    path.write_bytes(content)
    with pytest.raises(KdcacheError, match="its data end before its last row"):
        decode_file(path)


@pytest.fixture
def data(tmp_path):
    for i in range(40):
        path = tmp_path / "images" / ("train" if i < 36 else "val") / f"c{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(70 + i, 90).save(path)
    return open_data(f"imagefolder:{tmp_path}/images", "train", home=tmp_path)


def all_views(data):
    drawn = [draw("rrc,flip", 0, view, range(len(data)), data.sizes) for view in range(4)]
    renderer = Renderer(data, 64, torch.device("cpu"), workers=2)
    return [images.clone() for *_, images in renderer.views(drawn, [(np.arange(36), range(4))])]


@pytest.mark.parametrize("free", [0, 1 << 20])
def test_pixels_are_the_same_without_shared_memory(data, monkeypatch, free):
    want = all_views(data)
    monkeypatch.setattr(workers, "shared_memory_free", lambda: free)
    monkeypatch.setattr(workers, "default_collate", None)  # what takes shared memory is not called
    assert all(torch.equal(a, b) for a, b in zip(all_views(data), want, strict=True))


def test_pixels_come_where_others_have_taken_the_shared_memory(data, monkeypatch):
    def full(cuts):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    want = all_views(data)
    monkeypatch.setattr(workers, "default_collate", full)
    assert all(torch.equal(a, b) for a, b in zip(all_views(data), want, strict=True))


def test_a_worker_that_is_killed_is_reported_with_its_file(data, monkeypatch):
    decode = FileDataset.decode

    def killed(self, sample):
        if sample == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, sample)

    monkeypatch.setattr(FileDataset, "decode", killed)
    with pytest.raises(KdcacheError) as caught:
        all_views(data)
    line = f"{data.root / data.paths[17]}: the worker process that read it was killed"
    assert str(caught.value).startswith(line) and str(caught.value).endswith("too small; lower --workers")


def test_an_identity_of_an_absurd_input_size_is_refused():
    with pytest.raises(ValueError, match="less than or equal to 16384"):
        TeacherIdentity(
            architecture="x", weights="a" * 64, mean=(0.5,) * 3, std=(0.5,) * 3, input_size=2**40, numeric="float32"
        )
