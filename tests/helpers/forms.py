"""Image files as people have them: every form, with the pixels that it must give or what it is refused for.

The pixels are written down where the form is lossless, and are PIL's `convert("RGB")` where it is not.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from kdcache.tests.helpers.images import photograph

PNG = b"\x89PNG\r\n\x1a\n"
HEIC = struct.pack(">I4s4sI8s", 24, b"ftyp", b"heic", 0, b"mif1heic") + bytes(400)


@dataclass(frozen=True)
class Form:
    """A file's name and content; its pixels uint8 [H, W, 3], or what its refusal says.

    by_pil: whether PIL's Image.open alone takes it, so that a Dataset of PIL images may hold it.
    """

    name: str
    content: bytes
    pixels: np.ndarray | None = None
    refusal: str = ""
    by_pil: bool = False


def photo() -> Image.Image:
    """A part of a photograph, RGB, 70 x 91."""
    return Image.fromarray(photograph("flower")[100:170, 200:291])


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def converted(content: bytes) -> np.ndarray:
    """What torchvision's and timm's folders make of the file."""
    image = Image.open(io.BytesIO(content))
    image.info.pop("transparency", None)  # of which the conversion would warn
    return np.asarray(image.convert("RGB"))


def png(colour: int, bits: int, rows: np.ndarray, palette: bytes = b"") -> bytes:
    """A PNG of rows [H, bytes], or uint16 [H, W, channels], in a form that PIL does not write."""
    width = rows.shape[1] * 8 // bits if rows.ndim == 2 else rows.shape[1]
    head = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(rows.dtype.newbyteorder(">")).tobytes() for row in rows)
    extra = chunk(b"PLTE", palette) if palette else b""
    return PNG + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@cache
def good() -> tuple[Form, ...]:
    """The forms that are taken, in byte order of their names."""
    rgb = photo()
    return tuple(sorted([*_exact(rgb), *_by_pil(rgb), *_cmyk(rgb)], key=lambda form: form.name))


def _exact(rgb: Image.Image) -> list[Form]:
    """Lossless forms, whose pixels are known without a decoder."""
    pixels = np.asarray(rgb)
    grey = np.asarray(rgb.convert("L"))
    grey_rgb = np.repeat(grey[..., None], 3, 2)
    alpha = rgb.copy()
    alpha.putalpha(rgb.convert("L"))
    turned = Image.Exif()
    turned[0x112] = 6
    colours = np.random.default_rng(0).integers(0, 256, (16, 3), np.uint8)
    nibbles = grey[:, :90] // 16
    packed = (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).astype(np.uint8)
    pairs = np.stack([grey[:, i:88:4] // 64 << 6 - 2 * i for i in range(4)]).sum(0).astype(np.uint8)
    bits = rgb.convert("1")
    frames = {"save_all": True, "append_images": [rgb.rotate(180)]}
    black = np.repeat(np.asarray(bits)[..., None], 3, 2).astype(np.uint8) * 255
    palette = rgb.convert("P")
    by_palette = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    return [
        Form("alpha grey.png", saved(rgb.convert("LA")), grey_rgb),
        Form("alpha.png", saved(alpha), pixels),
        Form("alpha.webp", saved(alpha, "WEBP", lossless=True, exact=True), pixels),
        Form("animated.png", saved(rgb, "PNG", **frames), pixels),
        Form("animated.webp", saved(rgb, "WEBP", lossless=True, **frames), pixels),
        Form("bits 1.png", saved(bits), black),
        Form("bits 2.png", png(0, 2, pairs), np.repeat((grey[:, :88] // 64 * 85)[..., None], 3, 2)),
        Form("bits 4.png", png(0, 4, packed), np.repeat((nibbles * 17)[..., None], 3, 2)),
        Form("grey.png", saved(rgb.convert("L")), grey_rgb),
        Form("named.jpg", saved(rgb), pixels),
        Form("named.PNG", saved(rgb, "WEBP", lossless=True), pixels),
        Form("palette 4.png", png(3, 4, packed, colours.tobytes()), colours[nibbles]),
        Form("palette.png", saved(palette), by_palette),
        Form("palette alpha.png", saved(palette, transparency=b"\x10\x80"), by_palette),
        Form("palette one.png", saved(palette, transparency=3), by_palette),
        Form("transparent.png", saved(rgb, transparency=tuple(pixels[0, 0].tolist())), pixels),
        Form("turned.png", saved(rgb, exif=turned), pixels),
        Form("turned.webp", saved(rgb, "WEBP", lossless=True, exif=turned), pixels),
    ]


def _by_pil(rgb: Image.Image) -> list[Form]:
    turned = Image.Exif()
    turned[0x112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(180)]}
    contents = {
        "animated.jpg": saved(rgb, "GIF", **frames),
        "gif.jpg": saved(rgb.convert("P"), "GIF"),
        "gif transparent.JPG": saved(rgb.convert("P"), "GIF", transparency=3),
        "grey.jpeg": saved(rgb.convert("L"), "JPEG"),
        "pictures two.jpg": saved(rgb, "MPO", **frames),
        "profile.jpg": saved(rgb, "JPEG", icc_profile=b"a colour profile that is none"),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True),
        "turned.jpg": saved(rgb, "JPEG", exif=turned),
        "webp.webp": saved(rgb, "WEBP"),
    }
    return [Form(name, content, converted(content)) for name, content in contents.items()]


def _cmyk(rgb: Image.Image) -> list[Form]:
    """Inverted as Adobe's programs write it, as other programs do, and as YCCK."""
    cmyk = rgb.convert("CMYK")
    adobe = saved(cmyk, "JPEG")
    at = adobe.index(b"Adobe") - 4
    plain = adobe[:at] + adobe[at + 2 + int.from_bytes(adobe[at + 2 : at + 4]) :]
    inks = np.asarray(cmyk)
    stored = np.dstack([np.asarray(Image.fromarray(inks[..., :3]).convert("YCbCr")), 255 - inks[..., 3]])
    ycck = bytearray(saved(_as_cmyk(255 - stored), "JPEG"))
    ycck[ycck.index(b"Adobe") + 11] = 2
    found = {"cmyk adobe.jpg": adobe, "cmyk plain.jpg": plain, "cmyk ycck.jpg": bytes(ycck)}
    return [Form(name, content, converted(content)) for name, content in found.items()]


def _as_cmyk(stored: np.ndarray) -> Image.Image:
    return Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(stored[..., i])) for i in range(4)])


@cache
def bad() -> tuple[Form, ...]:
    """The forms that are refused, in byte order of their names."""
    rgb = photo()
    pixels = np.asarray(rgb).astype(np.uint16) * 257
    deep = np.dstack([pixels, pixels[..., :1]])
    whole = {kind: saved(rgb, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")}
    grey = Image.fromarray(pixels[..., 0])
    large = bytearray(saved(rgb, "JPEG"))
    at = large.index(b"\xff\xc0")
    large[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
    refused = {
        "16 alpha.png": (png(6, 16, deep), "has more than 8 bits a channel: convert it to 8"),
        "16 grey.png": (saved(grey), "has more than 8 bits a channel: convert it to 8"),
        "16 rgb.png": (png(2, 16, pixels), "has more than 8 bits a channel: convert it to 8"),
        "cut.jpg": (whole["JPEG"][: len(whole["JPEG"]) // 2], "cannot be decoded: .*truncated"),
        "cut.png": (whole["PNG"][: len(whole["PNG"]) // 2], "cannot be decoded: damaged"),
        "cut.webp": (whole["WEBP"][: len(whole["WEBP"]) // 2], "damaged, or the file is cut off"),
        "cut gif.jpg": (whole["GIF"][: len(whole["GIF"]) // 2], "cannot be decoded"),
        "cut header.jpg": (whole["JPEG"][:30], "not a JPEG.*damaged, or the file is cut off"),
        "empty.jpg": (b"", "not a JPEG.*but an empty file"),
        "large.jpg": (bytes(large), "has 20000 x 20000 pixels, the most is 178,956,970"),
        "large.png": (
            png(0, 1, np.zeros((20_000, 2500), np.uint8)),
            "has 20000 x 20000 pixels, the most is 178,956,970",
        ),
        "of no kind.jpg": (b"no image", "not a JPEG, PNG, WebP or GIF image$"),
        "page.jpg": (b"<!DOCTYPE html><html>", "but a web page, as failed downloads often are"),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "but a pointer of Git LFS"),
        "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "but an SVG image"),
    }
    others = {
        "bmp.jpg": (saved(rgb, "BMP"), "but a BMP image"),
        "heic.jpg": (HEIC, "but a HEIC image"),
        "ppm.png": (saved(rgb, "PPM"), "but a PPM image"),
        "tiff.png": (saved(rgb, "TIFF"), "but a TIFF image"),
    }
    eight = ("16 alpha.png", "16 rgb.png")  # PIL itself reads 8 bits of these
    found = [Form(name, content, None, refusal, name in eight) for name, (content, refusal) in refused.items()]
    taken = [Form(name, content, None, refusal, name != "heic.jpg") for name, (content, refusal) in others.items()]
    return tuple(sorted([*found, *taken], key=lambda form: form.name))
