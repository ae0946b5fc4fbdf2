"""What a renderer is asked for: samples with their parameters as rows of a table, and the rows that make a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.pipeline.views.operations.operation import Drawn
from kdcache.pipeline.views.parameters import ViewParameters


@dataclass(frozen=True, eq=False)
class Rows:
    """What is rendered for a batch of b samples: rows int64 [m] of a table, of which the first b are the samples' own.

    partners int64 [b]: which of the m images each sample's partner is; None where images are not mixed.
    """

    rows: NDArray[np.int64]
    partners: NDArray[np.int64] | None = None


class Table:
    """The samples first, first + 1, ... in one view, and behind them their partners that are not among them.

    samples int64 [m], boxes int32 [m, 4], flips bool [m] and drawn, by operation, are of all rows. mixing is drawn for
    the samples alone.
    """

    def __init__(self, parameters: ViewParameters, first: int) -> None:
        n, mixing = len(parameters), parameters.mixing
        self._first, self._partner_rows = first, None
        self.samples = np.arange(first, first + n)
        self.boxes, self.flips = parameters.boxes, parameters.flips
        self.drawn: dict[str, Drawn] = dict(parameters.drawn)
        self.mixing: Drawn | None = None
        if mixing is None:
            return
        self.mixing = mixing.drawn
        among = (mixing.partners >= first) & (mixing.partners < first + n)
        self._partner_rows = np.where(among, mixing.partners - first, n + np.arange(n))
        if (theirs := mixing.theirs) is not None:
            self.samples = np.concatenate([self.samples, mixing.partners])
            self.boxes = np.concatenate([self.boxes, theirs.boxes])
            self.flips = np.concatenate([self.flips, theirs.flips])
            self.drawn = {name: _joined(rows, theirs.drawn[name]) for name, rows in self.drawn.items()}
        self._places = np.full(len(self.samples), -1)  # of rows in a batch, while it is put together

    def batch(self, samples: NDArray[np.int64]) -> Rows:
        """The rows that a batch of samples is rendered from. A batch that holds both of each pair needs no others."""
        own = samples - self._first
        if self._partner_rows is None:
            return Rows(own)
        wanted, at = self._partner_rows[own], self._places
        at[own] = np.arange(len(own))
        others = np.unique(wanted[at[wanted] < 0])
        at[others] = np.arange(len(own), len(own) + len(others))
        rows, partners = np.concatenate([own, others]), at[wanted]
        at[rows] = -1
        return Rows(rows, partners)


def _joined(a: Drawn, b: Mapping[str, NDArray[np.int64]]) -> Drawn:
    return {name: np.concatenate([rows, b[name]]) for name, rows in a.items()}
