"""Counts up what a classifier answers: how often it is right, how sure it is, and what it confuses.

A teacher's answers are records of a cache. A student's logits are encoded as records with all classes, so that both are
counted alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.records.records import Records
from kdcache.train.evaluation.analysis.calibration import Bin
from kdcache.train.evaluation.analysis.classes import confusions, per_class

ENTROPY_BINS = 24
RANKS = 50  # at most so many classes in the curve of mass by rank
BINS = 15  # of the confidence, as in train/evaluation/metrics.py


@dataclass(frozen=True)
class Answered:
    """Of each record of a batch: the entropy in nats, the nll of the label in nats and whether the most probable class
    is the label; the last two are None without one label."""

    entropy: Tensor
    nll: Tensor | None
    right: Tensor | None


class Tally:
    """Adds up answers at one temperature, batch by batch.

    labelled: whether each record has one label, and its gap, from which accuracy and calibration follow. by_class:
    whether labels and answers are kept, to tell of classes and confusions.
    """

    def __init__(self, classes: int, temperature: float, labelled: bool, by_class: bool = True) -> None:
        self._classes, self._temperature, self._labelled = classes, temperature, labelled
        self._by_class = by_class
        self.images = 0
        self._right = self._right5 = 0
        self._nll = self._entropy = self._confidence = 0.0
        self._bins = torch.zeros(BINS, 3, dtype=torch.float64)
        self._entropies = np.zeros(ENTROPY_BINS, np.int64)
        self._ranks = torch.zeros(0, dtype=torch.float64)
        self._labels: list[NDArray[np.int32]] = []
        self._predictions: list[NDArray[np.int32]] = []

    def add(self, records: Records) -> Answered:
        """Count a batch in."""
        soft = records.softened(self._temperature)
        ids, p, _ = soft.ranked()
        entropy = soft.entropy().clamp(min=0)
        self.images += len(records)
        self._entropy += float(entropy.double().sum())
        self._confidence += float(p[:, 0].double().sum())
        places = (entropy / math.log(self._classes) * ENTROPY_BINS).long().clamp(max=ENTROPY_BINS - 1)
        self._entropies += np.bincount(places.numpy(), minlength=ENTROPY_BINS)
        mass = p[:, :RANKS].double().cumsum(1).sum(0)
        self._ranks = mass if not len(self._ranks) else self._ranks + mass
        if not self._labelled:
            return Answered(entropy, None, None)
        labels = records.labels[:, 0].long()
        nll, right = -soft.log_target()[:, 0], ids[:, 0] == labels
        self._nll += float(nll.double().sum())
        self._right += int(right.sum())
        self._right5 += int((ids[:, :5] == labels.unsqueeze(1)).any(1).sum())
        self._count_sure(p[:, 0].double(), right)
        if self._by_class:
            self._labels.append(labels.numpy().astype(np.int32))
            self._predictions.append(ids[:, 0].numpy().astype(np.int32))
        return Answered(entropy, nll, right)

    def _count_sure(self, confidence: Tensor, right: Tensor) -> None:
        """Count in the bins (0, 1/15] to (14/15, 1] of Guo et al. 2017 (arXiv 1706.04599)."""
        edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
        columns = torch.stack([torch.ones_like(confidence), confidence, right.double()], 1)
        self._bins.index_add_(0, torch.bucketize(confidence, edges), columns)

    def facts(self, names: Sequence[str], ranked: int) -> dict[str, Any]:
        """What was counted, as plain data; rates are in 0..1.

        names: of all classes. ranked: how many classes each record holds in order. entropy: counts in bins of equal
        width from 0 to `most`, log C. ranks: the mean mass of the first 1, 2, ... classes. bins, per_class,
        confusions: as `kdcache eval` has them of a student.
        """
        n = max(self.images, 1)
        found: dict[str, Any] = {
            "images": self.images,
            "temperature": self._temperature,
            "confidence": self._confidence / n,
            "entropy": {"mean": self._entropy / n, "most": math.log(self._classes), "counts": self._entropies.tolist()},
            "ranks": (self._ranks / n).tolist(),
        }
        if not self._labelled:
            return found
        count, sure, right = self._bins.T
        each = self._bins[:, 1:] / count.clamp(min=1).unsqueeze(1)
        found |= {
            "top1": self._right / n,
            "top5": self._right5 / n if ranked >= 5 else None,
            "nll": self._nll / n,
            "ece": float((sure - right).abs().sum()) / n,
            "bins": [asdict(Bin(int(c), *pair)) for c, pair in zip(count.tolist(), each.tolist(), strict=True)],
        }
        if self._by_class:
            labels, predictions = (np.concatenate(of).astype(np.int64) for of in (self._labels, self._predictions))
            found["per_class"] = asdict(per_class(predictions, labels, names))
            found["confusions"] = asdict(confusions(predictions, labels, self._classes))
        return found
