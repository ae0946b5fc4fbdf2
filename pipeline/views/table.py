"""What a renderer is asked for: samples with their parameters as rows of a table, and the rows that make a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.pipeline.views.operations.operation import Drawn
from kdcache.pipeline.views.parameters import Parameters, ViewParameters


@dataclass(frozen=True, eq=False)
class Rows:
    """What is rendered for a batch of b samples: rows int64 [m] of a table, of which the first b are the samples' own.

    partners int64 [b]: which of the m images each sample's partner is; None where images are not mixed.
    """

    rows: NDArray[np.int64]
    partners: NDArray[np.int64] | None = None


class Table:
    """The samples first, first + 1, ... in one view, and behind them their partners that are not among them.

    held: the parameters of all m rows without mixing; None where they are drawn when rows are asked for, so that the
    table takes no memory for its samples. mixing is drawn for the samples alone.
    """

    def __init__(self, parameters: Parameters, first: int) -> None:
        n, mixing = len(parameters), parameters.mixing
        self._first, self._count, self._parameters = first, n, parameters
        self._partner_rows = None
        self.held: ViewParameters | None = None
        self.mixing: Drawn | None = None
        if not isinstance(parameters, ViewParameters):
            return
        self.held = ViewParameters(parameters.boxes, parameters.flips, parameters.drawn)
        if mixing is None:
            return
        self.mixing = mixing.drawn
        among = (mixing.partners >= first) & (mixing.partners < first + n)
        self._partner_rows = np.where(among, mixing.partners - first, n + np.arange(n))
        self._others = mixing.partners[:0]  # the samples of the rows from n on
        if (theirs := mixing.theirs) is not None:
            self._others = mixing.partners
            self.held = ViewParameters(
                np.concatenate([parameters.boxes, theirs.boxes]),
                np.concatenate([parameters.flips, theirs.flips]),
                {name: _joined(rows, theirs.drawn[name]) for name, rows in parameters.drawn.items()},
            )
        self._places = np.full(n + len(self._others), -1)  # of rows in a batch, while it is put together

    @property
    def samples(self) -> NDArray[np.int64]:
        """The samples of all rows, int64 [m]."""
        own = np.arange(self._first, self._first + self._count)
        return own if self._partner_rows is None else np.concatenate([own, self._others])

    def samples_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of some rows."""
        found = rows + self._first
        if self._partner_rows is not None:
            others = rows >= self._count
            found[others] = self._others[rows[others] - self._count]
        return found

    def of(self, rows: NDArray[np.int64]) -> ViewParameters:
        """The parameters of some rows, without mixing."""
        return (self._parameters if self.held is None else self.held)[rows]

    def batch(self, samples: NDArray[np.int64]) -> Rows:
        """The rows that a batch of samples is rendered from. A batch that holds both of each pair needs no others."""
        own = samples - self._first if self._first else samples
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
