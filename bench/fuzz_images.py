"""What decoding does with damaged and hostile image files of every kind that is read; writes JSON.

    python bench/fuzz_images.py

Single bits, overwritten, inserted, removed and cut bytes, headers that lie about the size, chunks whose checksums have
been forged to fit, and decompression bombs. Every file must give pixels or one InputError of one line that names it,
within seconds and without taking memory; a PNG whose checksums were not forged gives the pixels that it had, or none.
The files are decoded in processes of BATCH files each, so that a crash counts as one and names its seed.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import random
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image

sys.path += [str(Path(__file__).parent)]
import fuzzing
from fuzzing import within

from kdcache.cache import KdcacheError
from kdcache.pipeline.data.decode import decode_file, image_size
from kdcache.train.bench.bench import machine

SECONDS, MEGABYTES = 10, 700
BATCH = 500  # files a process
PNG = b"\x89PNG\r\n\x1a\n"


def sources() -> dict[str, bytes]:
    """One small good image of each kind."""
    y, x = np.mgrid[:48, :64]
    waves = np.stack([127 + 100 * np.sin(x / 5 + c) * np.cos(y / 7 * c) for c in range(3)], -1)
    noise = np.random.default_rng(0).normal(0, 8, waves.shape)
    rgb = Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(rgb.convert("L"))
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16))
    two = {"save_all": True, "append_images": [rgb.rotate(180)]}

    def saved(kind: str, image: Image.Image = rgb, **options: Any) -> bytes:
        content = io.BytesIO()
        image.save(content, kind, **options)
        return content.getvalue()

    return {
        "png": saved("PNG"), "png text": saved("PNG", pnginfo=_text()), "png alpha": saved("PNG", alpha),
        "png grey": saved("PNG", rgb.convert("L")), "png palette": saved("PNG", rgb.convert("P")),
        "png bits": saved("PNG", rgb.convert("1")), "png 16": saved("PNG", deep),
        "apng": saved("PNG", **two), "jpeg": saved("JPEG"), "jpeg progressive": saved("JPEG", progressive=True),
        "jpeg grey": saved("JPEG", rgb.convert("L")), "jpeg cmyk": saved("JPEG", rgb.convert("CMYK")),
        "webp": saved("WEBP"), "webp lossless": saved("WEBP", lossless=True), "webp alpha": saved("WEBP", alpha),
        "webp animated": saved("WEBP", **two), "gif": saved("GIF", rgb.convert("P")),
        "gif transparent": saved("GIF", rgb.convert("P"), transparency=3), "gif animated": saved("GIF", **two),
        "bmp": saved("BMP"), "tiff": saved("TIFF"),
    }  # fmt: skip


def _text() -> Any:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("Comment", "zeros " * 100, zip=True)
    return text


# ---- damage ----


def one_bit(good: bytes, rng: random.Random) -> bytes:
    content = bytearray(good)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def overwritten(good: bytes, rng: random.Random) -> bytes:
    content = bytearray(good)
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def inserted(good: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(good))
    return good[:at] + rng.randbytes(rng.choice([1, 2, 30, 3000])) + good[at:]


def removed(good: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(good))
    return good[:at] + good[at + rng.choice([1, 2, 30]) :]


def cut(good: bytes, rng: random.Random) -> bytes:
    return good[: rng.randrange(len(good))]


def beginning(good: bytes, rng: random.Random) -> bytes:
    """Damage among the first bytes, where the headers are."""
    content = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(min(len(content), 64))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    return bytes(content)


def lie(good: bytes, rng: random.Random) -> bytes:
    """A header that gives another size, checksum and all."""
    content = bytearray(good)
    side = [rng.choice([0, 1, 63, 65, 3000, 13_000, 65_500, rng.randrange(65_536)]) for _ in range(2)]
    if good.startswith(PNG):
        wide = [rng.choice([s, s, 2**31 - 1]) for s in side]
        content[16:24] = struct.pack(">II", *wide)
        return _forged(bytes(content))
    if good.startswith(b"\xff\xd8"):
        at = max(good.find(b"\xff\xc0"), good.find(b"\xff\xc2"))
        content[at + 5 : at + 9] = struct.pack(">HH", *side)
    elif good.startswith(b"GIF"):
        frame = good.find(b"\x2c", 13)
        at = rng.choice([6, frame + 5, frame + 1])
        content[at : at + 4] = struct.pack("<HH", *side)
    elif good.startswith(b"RIFF"):
        at = {b"VP8 ": 26, b"VP8L": 21, b"VP8X": 24}[good[12:16]]
        content[at : at + 6] = rng.randbytes(6)
    else:
        return beginning(good, rng)
    return bytes(content)


def forged(good: bytes, rng: random.Random) -> bytes:
    """Damage that the checksums of a PNG's chunks agree with."""
    return _forged(rng.choice([one_bit, overwritten, beginning])(good, rng))


def bomb(good: bytes, rng: random.Random) -> bytes:
    """A few bytes that stand for very many."""
    zeros = fifty_million_zeros()
    text = b"zTXt" + b"a\0\0" + zeros, b"iTXt" + b"a\0\1\0\0\0" + zeros, b"iCCP" + b"a\0\0" + zeros
    pixels = b"IDAT" + zeros
    if good.startswith(PNG):
        head = good[:33]
        if rng.random() < 0.5:  # as the pixels of an image that is too large, or that needs a thousandth of them
            side = rng.choice([48, 7000, 20_000, 2**31 - 1])
            head = _forged(PNG + _chunk(b"IHDR" + struct.pack(">II", side, side) + bytes([1, 0, 0, 0, 0])))
            return head + _chunk(pixels) + good[-12:]
        return head + _chunk(rng.choice(text)) + good[33:]
    if good.startswith(b"GIF"):  # many frames
        frame = good.find(b"\x2c", 13)
        return good[:-1] + good[frame:-1] * 3000 + good[-1:]
    if good.startswith(b"\xff\xd8"):  # many segments
        return good[:2] + b"\xff\xe1\xff\xff" * 30 + good[2:] + b"\xff\xda" * 3000
    return good + bytes(1_000_000)


def _forged(content: bytes) -> bytes:
    if not content.startswith(PNG):
        return content
    found, at = bytearray(content), 8
    while at + 12 <= len(found):
        end = at + 8 + int.from_bytes(found[at : at + 4], "big")
        if end + 4 > len(found):
            break
        found[end : end + 4] = zlib.crc32(found[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(found)


def _chunk(body: bytes) -> bytes:
    """The length, the chunk's name and content, the checksum."""
    return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    one_bit, one_bit, overwritten, inserted, removed, cut, beginning, beginning, lie, lie, forged, forged, bomb,
)  # fmt: skip
FORGED = (lie, forged, bomb)


@lru_cache(1)
def fifty_million_zeros() -> bytes:
    """Compressed to 50 kB, which takes a while: call it before processes are forked."""
    return zlib.compress(bytes(50_000_000), 9)


# ---- one file, all files ----


def decoded(path: Path, kind: str, want: torch.Tensor | None, forgery: bool) -> str:
    """'pixels' | 'same pixels' | 'refused', or in capitals what went wrong."""
    try:
        size = image_size(path)
        pixels = decode_file(path)
    except KdcacheError as e:
        return "refused" if str(e).startswith(f"{path}: ") and "\n" not in str(e) else f"UNCLEAR: {e}"[:300]
    except Exception as e:
        return f"RAISED {type(e).__name__}: {e}"[:300]
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        return f"WRONG SHAPE {tuple(pixels.shape)}"
    if want is not None and torch.equal(pixels, want):
        return "same pixels"
    if "png" in kind and not forgery:
        return "OTHER PIXELS"
    return "pixels" if size == pixels.shape[1:] or kind.startswith("gif") else "OTHER SIZE"


def fuzz(seed: int, images: dict[str, bytes], wanted: dict[str, torch.Tensor | None], path: Path) -> tuple[str, str]:
    """What became of one damaged file, and its kind with that of the damage."""
    rng = random.Random(seed)
    kind, how = rng.choice(list(images)), rng.choice(DAMAGES)
    path.write_bytes(how(images[kind], rng))
    outcome = within(SECONDS, MEGABYTES, lambda: decoded(path, kind, wanted[kind], how in FORGED))
    return outcome, f"{kind}, {how.__name__}"


def in_processes(seeds: range, folder: Path) -> tuple[collections.Counter[tuple[str, str]], list[str]]:
    """Outcomes by kind, and a line for each file that went wrong."""
    images = sources()
    wanted: dict[str, torch.Tensor | None] = {}
    for kind, good in images.items():
        (folder / "good").write_bytes(good)
        try:
            wanted[kind] = decode_file(folder / "good")
        except KdcacheError:
            wanted[kind] = None
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong: list[str] = []
    for seed, outcome, kind in fuzzing.in_processes(seeds, BATCH, lambda s: fuzz(s, images, wanted, folder / "image")):
        if outcome is None:
            wrong.append(f"seed {seed}: the process ended by {kind}")
            continue
        found[outcome, kind] += 1
        if not outcome.islower():
            wrong.append(f"seed {seed}: {kind}: {outcome}")
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/fuzz_images.json")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        found, wrong = in_processes(range(a.seed, a.seed + a.cases), Path(folder))
    outcomes: collections.Counter[str] = collections.Counter()
    for (outcome, _), n in found.items():
        outcomes[outcome if outcome.islower() else "wrong"] += n
    result = {
        "machine": {**machine(), "torchvision": torchvision.__version__, "pillow": PIL.__version__},
        "command": f"python bench/fuzz_images.py --cases {a.cases} --seed {a.seed}",
        "files": a.cases, "seconds": round(time.monotonic() - start), "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
        "by_kind": [{"of": kind, "outcome": o, "files": n} for (o, kind), n in sorted(found.items())],
    }  # fmt: skip
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{a.cases} damaged images: {dict(outcomes)}, {len(wrong)} wrong", *wrong[:20], sep="\n")


if __name__ == "__main__":
    main()
