"""Reads the size and the pixels of one image, whose bytes may be damaged or hostile: of a file, or held in memory.

No image may crash the process. torchvision decodes JPEG, WebP and GIF. PIL decodes PNG, because libpng leaves a damaged
file by a long jump, which torchvision's decoder does not survive. Both give the same pixels, since PNG is lossless.
PIL also decodes animations, of which only the first frame is wanted.

The pixels are those of PIL's `convert("RGB")`, as in torchvision's and timm's image folders: transparency, EXIF
orientation and colour profiles are not looked at. What `convert` would clip (more than 8 bits a channel) is refused.
docs/data.md lists every form of image.
"""

import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torchvision.io import ImageReadMode

from kdcache.cache.errors import InputError, machine_error

MAX_PIXELS = 178_956_970  # PIL's own bound, beyond which it takes an image for a decompression bomb
MAX_BYTES = 1 << 30  # the size of the largest file that is read
_DEFLATE = 1032  # the most bytes of pixels that one byte of compressed data in a PNG can stand for
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")  # PIL's, of 8 bits at most
_UNKNOWN = "not a JPEG, PNG, WebP or GIF image"
_START = 32  # bytes that tell what a file is
_KINDS: tuple[tuple[re.Pattern[bytes], type[ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImageFile),
)  # recognised by their content, whatever the suffix
_OTHERS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"BM"), "a BMP image"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "a TIFF image"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "an AVIF image"),
    (re.compile(rb"....ftyp(hei|hev|mif|msf)", re.DOTALL), "a HEIC image"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 image"),
    (re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"), "a JPEG XL image"),
    (re.compile(rb"P[1-7]\s"), "a PPM image"),
    (re.compile(rb"8BPS"), "a Photoshop image"),
    (re.compile(rb"\s*<(!doctype html|html|head|body)", re.IGNORECASE), "a web page, as failed downloads often are"),
    (re.compile(rb"\s*(<\?xml|<svg)"), "an SVG image or other XML"),
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS: `git lfs pull` fetches the image"),
)


class _RefusedError(Exception):
    """Tells what is wrong with a file, without its name, which the caller adds."""


def in_one_line(name: object) -> str:
    """The name of a file as messages show it: a name may hold line breaks."""
    return str(name).replace("\n", "\\n").replace("\r", "\\r")


def image_size(path: Path) -> tuple[int, int]:
    """Read height and width in pixels from the file's header. InputError names a file that is no image or too large."""
    try:
        with _opened(path) as f:
            image = _header(f)
            return image.height, image.width
    except Exception as e:  # a parser may raise anything for bytes that are no image
        raise InputError(f"{in_one_line(path)}: {_reason(e)}") from e


def decode_file(path: Path, size: np.ndarray | None = None) -> torch.Tensor:
    """Decode the pixels uint8 [3, H, W] as they are stored, of an animation those of its first frame.

    InputError names a file that cannot be decoded, or that is not of the `size` (H, W) that its header gave.
    """
    try:
        with _opened(path) as f:
            return _decoded(f.read(), size)
    except Exception as e:  # a decoder may raise anything for bytes that are no image
        if machine_error(e):
            raise
        raise InputError(f"{in_one_line(path)}: {_reason(e)}") from e


def decode_bytes(content: bytes, where: str, size: np.ndarray | None = None) -> torch.Tensor:
    """Decode the pixels uint8 [3, H, W] of an image file's content, which messages call `where`, like decode_file."""
    try:
        return _decoded(content, size)
    except Exception as e:  # a decoder may raise anything for bytes that are no image
        if machine_error(e):
            raise
        raise InputError(f"{in_one_line(where)}: {_reason(e)}") from e


def size_of_bytes(content: bytes, where: str) -> tuple[int, int]:
    """Read height and width in pixels from the first bytes of an image file, which must hold its header."""
    try:
        image = _header(io.BytesIO(content))
        return image.height, image.width
    except Exception as e:  # a parser may raise anything for bytes that are no image
        raise InputError(f"{in_one_line(where)}: {_reason(e)}") from e


def size_of_image(image: Image.Image, where: str) -> tuple[int, int]:
    """Height and width of a PIL image. InputError, which calls it `where`, for one whose pixels are not taken."""
    problem = None
    if image.mode not in _MODES:
        problem = "has more than 8 bits a channel: convert it to 8" if image.mode[0] in "IF" else "convert it to RGB"
    elif not 0 < image.width * image.height <= MAX_PIXELS:
        problem = f"has {image.width} x {image.height} pixels, the most is {MAX_PIXELS:,}"
    if problem:
        raise InputError(f"{where}: a PIL image of mode {image.mode}: {problem}")
    return image.height, image.width


def pixels_of_image(image: Image.Image, where: str, size: np.ndarray | None = None) -> torch.Tensor:
    """The pixels uint8 [3, H, W] of a PIL image, which may be read from its file only now. InputError as above.

    Of an image with several frames it is the one that the image stands at, which at first is the first.
    """
    found = size_of_image(image, where)
    try:
        _require_size(found, size)
        return _as_rgb(image)
    except Exception as e:  # PIL may raise anything for a file that is no image
        if machine_error(e):
            raise
        raise InputError(f"{in_one_line(where)}: {_reason(e)}") from e


def _decoded(content: bytes, size: np.ndarray | None) -> torch.Tensor:
    image = _header(io.BytesIO(content))
    _require_size((image.height, image.width), size)
    if isinstance(image, PngImageFile):
        return _png(image, content)
    if not isinstance(image, JpegImageFile) and getattr(image, "is_animated", False):
        return _as_rgb(image)  # torchvision would decode all frames
    # Decoding takes memory for all pixels at once, so a JPEG that has less than a bit for each block of 8 x 8
    # pixels, and so cannot be whole, is refused before.
    if isinstance(image, JpegImageFile) and image.height * image.width > 512 * len(content):
        raise _RefusedError("cannot be decoded: its data end before its last row")
    # The operator is called directly, since torchvision.io.decode_image warns for every image since 0.29.
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels: torch.Tensor = torch.ops.image.decode_image(data, ImageReadMode.RGB.value)
    if pixels.ndim != 3:
        raise _RefusedError("holds several images: convert it to a single one")
    _require_size((pixels.shape[1], pixels.shape[2]), size)
    return pixels


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a plain file of a size that an image may have. Reading anything else, such as a pipe, might never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise _RefusedError("not a plain file")
        if about.st_size > MAX_BYTES:
            raise _RefusedError("larger than 1 GiB")
        with os.fdopen(fd, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(fd)


def _header(file: BinaryIO) -> ImageFile:
    start = file.read(_START)
    file.seek(0)
    if not start:
        raise _RefusedError(f"{_UNKNOWN}, but an empty file")
    kind = next((kind for pattern, kind in _KINDS if pattern.match(start)), None)
    if kind is None:
        other = next((f", but {name}" for pattern, name in _OTHERS if pattern.match(start)), "")
        raise _RefusedError(_UNKNOWN + other)
    try:
        image = kind(file)
    except Exception as e:
        raise _RefusedError(f"{_UNKNOWN}: its header is damaged, or the file is cut off") from e
    if image.width * image.height > MAX_PIXELS:
        raise _RefusedError(f"has {image.width} x {image.height} pixels, the most is {MAX_PIXELS:,}")
    return image


def _require_size(found: tuple[int, int], size: np.ndarray | None) -> None:
    if size is not None and found != tuple(size.tolist()):
        raise _RefusedError("has changed since its header was read: open the dataset again")


def _png(image: PngImageFile, content: bytes) -> torch.Tensor:
    if not image.tile:
        raise _RefusedError("cannot be decoded: holds no pixels")
    if str(image.tile[0][3]).endswith("16B"):  # PIL's name for the form in which pixels are stored
        raise _RefusedError("has more than 8 bits a channel: convert it to 8")
    # A byte may hold eight pixels. PIL would take at least a byte of memory for each, however short the file is.
    if _checked_bytes(content) * _DEFLATE < image.height * -(-image.width // 8):
        raise _RefusedError("cannot be decoded: its data end before its last row")
    return _as_rgb(image)


def _as_rgb(image: Image.Image) -> torch.Tensor:
    if image.mode != "RGB":
        image = image.convert("RGB") if "transparency" not in image.info else _opaque(image).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _opaque(image: Image.Image) -> Image.Image:
    """A copy without the note of a transparent colour, of which the conversion would warn."""
    copied = image.copy()
    del copied.info["transparency"]
    return copied


def _checked_bytes(content: bytes) -> int:
    """Count the bytes of compressed pixels in a PNG, and compare the checksums, which PIL does not look at."""
    view, at, total = memoryview(content), 8, 0
    while len(head := content[at : at + 8]) == 8:
        length, kind = int.from_bytes(head[:4]), head[4:]
        if kind == b"IDAT":
            total += length
        elif total:
            break  # all pixels lie together, so none follow
        end = at + 8 + length
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(content[end : end + 4]):
            raise _RefusedError("cannot be decoded: damaged, its checksum does not fit")
        at = end + 4
    return total


def _reason(error: Exception) -> str:
    """The error in one line, without the position in the decoder's source."""
    if isinstance(error, _RefusedError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    lines = str(error).splitlines() or [type(error).__name__]
    return "cannot be decoded: " + re.sub(r"^.*\.cpp:\d+, ", "", lines[0])
