"""What an operation on pixels is: its arguments, how it is drawn, and how it is applied.

An operation of the stages colour and erase is a frozen dataclass with the members of `Operation`. Its fields are its
arguments, in the order in which they are typed: `erase(0.25)` is `Erase(0.25)`.

Everything drawn is an integer, and applying is integer arithmetic on uint8 pixels, so that every bit is the same on a
CPU and a GPU, for one image and for a batch, and for any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, field
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Stage = Literal["geometry", "colour", "erase", "mix"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # in the order in which they are applied
Drawn = Mapping[str, NDArray[Any]]  # integer arrays [n, ...] by name
_LEAST, _MOST = "least", "most"


def argument(default: Any, least: float, most: float) -> Any:
    """A field of an operation's dataclass: its default, and the smallest and the largest value that it may have."""
    return field(default=default, metadata={_LEAST: least, _MOST: most})


def of_rows(drawn: Drawn, rows: slice | NDArray[np.int64]) -> Drawn:
    """What was drawn for some of the samples."""
    return {name: of[rows] for name, of in drawn.items()}


def bounds(of: Field[Any]) -> tuple[float, float]:
    """The smallest and the largest value of an argument."""
    return of.metadata[_LEAST], of.metadata[_MOST]


class Operation(Protocol):
    """A change of single images.

    name: how policies call it. stage: when it is applied; within a stage, operations are applied in the order of the
    table. stream: the second word of the Philox key that it draws from, never shared and never changed.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    stream: ClassVar[int]

    @property
    def words(self) -> int:
        """How many random words a sample takes in each view."""

    def draw(self, words: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        """The parameters of n samples, integer arrays [n, ...] by name, from random words uint64 [n, self.words].

        Row i depends on row i of the words alone.
        """

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Change images uint8 [B, 3, H, W], on any device and in any memory format, by parameters of B samples.

        The result may share memory with the images, which may be overwritten. Lengths and places are drawn as
        fractions of the side. Image b depends on row b alone.
        """
