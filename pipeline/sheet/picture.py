"""A contact sheet as a picture: images in rows and columns, enlarged where they are small, with words around them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

_LEAST = 112  # pixels: narrower images are enlarged by a whole factor, so that one can see them
_GAP, _MARGIN, _LINE = 4, 8, 15  # pixels: between cells, around all of them, and for a line of text
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_CAPTION = 2  # lines below each image


@dataclass(frozen=True)
class Layout:
    """Where things are on a sheet of so many rows and columns of images of height x width pixels.

    title: what stands above all of it.
    """

    rows: int
    columns: int
    height: int
    width: int
    title: str

    @property
    def scale(self) -> int:
        """How many pixels of the sheet a pixel of an image has to each side."""
        return -(-_LEAST // min(self.height, self.width))

    @property
    def size(self) -> tuple[int, int]:
        """The width and height of the sheet in pixels."""
        right, bottom = self.corner(self.rows, self.columns)
        return right - _GAP + _MARGIN, bottom - _GAP + _MARGIN

    @property
    def across(self) -> int:
        """The width between the margins."""
        return self.columns * (self.scale * self.width + _GAP) - _GAP

    @cached_property
    def title_lines(self) -> list[str]:
        return [part for line in self.title.splitlines() for part in _wrapped(line, self.across)]

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The place (x, y) of an image's first pixel."""
        top = _MARGIN + _LINE * len(self.title_lines) + _GAP + _LINE  # the heads of columns are the last line
        each = self.scale * self.height + _CAPTION * _LINE + _GAP
        return _MARGIN + column * (self.scale * self.width + _GAP), top + row * each


def sheet_png(
    layout: Layout, images: NDArray[np.uint8], heads: Sequence[str], captions: Sequence[Sequence[Sequence[str]]]
) -> bytes:
    """The sheet as a PNG file.

    images [rows, columns, height, width, 3]. heads: a line above each column. captions: up to two lines below each
    image, by row and column.
    """
    paper = Image.new("RGB", layout.size, _PAPER)
    pen, font = ImageDraw.Draw(paper), _font()
    wide, high = layout.scale * layout.width, layout.scale * layout.height

    def write(x: int, y: int, text: str, width: int) -> None:
        pen.text((x, y), _fitted(text, width), fill=_INK, font=font)

    for number, line in enumerate(layout.title_lines):
        write(_MARGIN, _MARGIN + number * _LINE, line, layout.across)
    for column, head in enumerate(heads):
        x, y = layout.corner(0, column)
        write(x, y - _LINE, head, wide)
    for row, column in np.ndindex(layout.rows, layout.columns):
        x, y = layout.corner(row, column)
        image = Image.fromarray(np.ascontiguousarray(images[row, column]))
        paper.paste(image.resize((wide, high), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(captions[row][column][:_CAPTION]):
            write(x, y + high + 1 + number * _LINE, line, wide)
    file = io.BytesIO()
    paper.save(file, "PNG")
    return file.getvalue()


def _font() -> Any:
    """Pillow's own font: one that can be scaled where this Pillow has it."""
    scales = hasattr(ImageFont, "load_default_imagefont") and features.check("freetype2")
    return ImageFont.load_default(12) if scales else ImageFont.load_default()


def _length(text: str) -> float:
    return float(_font().getlength(text))


def _fitted(text: str, width: int) -> str:
    """As much of the text as fits, in signs that Pillow's oldest font has too."""
    plain = text.encode("ascii", "backslashreplace").decode()
    if _length(plain) <= width:
        return plain
    while plain and _length(plain + "...") > width:
        plain = plain[:-1]
    return plain + "..."


def _wrapped(text: str, width: int) -> Iterator[str]:
    """The text in lines that fit, where it has commas or spaces outside of parentheses."""
    line = ""
    for part in re.findall(r"(?:\([^)]*\)|[^, (])+,? ?|[, (]", text):
        if line and _length(line + part.rstrip()) > width:
            yield line.rstrip()
            line = ""
        line += part
    yield line.rstrip()
