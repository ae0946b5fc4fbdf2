"""What records of a probe's answers would weigh and how much of the answers they would keep, by classes stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.identity import RecordIdentity
from kdcache.cache.records.choices import TEMPERATURES
from kdcache.cache.records.encoding import class_prior, default_precision, tail_distribution
from kdcache.cache.records.records import Records
from kdcache.cache.store import chunks
from kdcache.cache.store.layout import record_arrays
from kdcache.train.losses.options import make_loss

KEPT = (10, 20, 50)  # classes a record
_STUDIED = 2**23  # logits whose gradient is studied, at most: larger data are cut
_LOSS = "nkd"


def by_classes(record: RecordIdentity, logits: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """One row for each number of classes a record may hold, dense records last, and the record's own among them.

    logits: [v, M, C], labels: [v, M, L], as in Probe. A row has k (None: dense), bytes (of a record, compressed), and
    for each stored temperature the share (0..1) of the teacher's probability in the head, mean over the records, and
    the relative error of NKD's gradient; None where there is nothing to tell it by.
    """
    own = {record.k or record.classes}
    counts = [*sorted({k for k in {*KEPT, *own} if k < record.classes}), record.classes]
    truth = _Gradients(logits, labels, record.classes)
    temperatures = record.temperatures or TEMPERATURES
    rows = []
    for k in counts:
        asked = _stored(record, k)
        rows.append({
            "k": asked.k,
            "bytes": _record_bytes(asked, logits, labels),
            "head": {f"{t:g}": _head(logits, k, t) for t in temperatures},
            "gradient_error": truth.error(asked),
        })  # fmt: skip
    return rows


def _stored(record: RecordIdentity, k: int) -> RecordIdentity:
    """The record with k classes: its own settings where it has as many, otherwise the defaults for so many."""
    if k == (record.k or record.classes):
        return record
    dense = k == record.classes
    temperatures = () if dense else record.temperatures or TEMPERATURES
    return record.model_copy(
        update={
            "k": None if dense else k, "precision": default_precision(dense), "temperatures": temperatures,
            "tail_std": record.tail_std and not dense,
        }
    )  # fmt: skip


def _record_bytes(record: RecordIdentity, logits: Tensor, labels: Tensor) -> float:
    """Bytes of a record as it is stored: every view in chunks of its own, since views of an image are much alike."""
    total = 0
    for z, y in zip(logits, labels, strict=True):
        encoded = chunks.as_arrays(chunks.encode_as(record, z, y))
        specs = record_arrays(record, len(z), len(z))
        total += sum(len(chunks.encode_part(spec, 0, encoded[spec.name])) for spec in specs)
    return total / (logits.shape[0] * logits.shape[1])


def _head(logits: Tensor, k: int, temperature: float) -> float:
    """The mean share (0..1) of the probability at a temperature that the k most probable classes have."""
    if k == logits.shape[-1]:
        return 1.0
    top = logits.flatten(0, 1).topk(k, 1).values
    total = torch.logsumexp(logits.flatten(0, 1).double() / temperature, 1)
    return float((torch.logsumexp(top.double() / temperature, 1) - total).exp().mean())


class _Gradients:
    """NKD's gradient by records that hold all logits in float32, and how far that by other records is from it.

    The student answers with the teacher's logits for another view, and noise of one nat: somewhat wrong in the way that
    students are. With one view the noise is all there is.
    """

    def __init__(self, logits: Tensor, labels: Tensor, classes: int) -> None:
        views = len(logits)
        each = max(1, min(logits.shape[1], _STUDIED // (views * classes)))
        some = logits[:, :: -(-logits.shape[1] // each)]
        noise = torch.randn(some.shape, generator=torch.Generator().manual_seed(0))
        self._student = (some.roll(-1, 0) + noise).flatten(0, 1)
        self._logits, self._first = some.flatten(0, 1), some.shape[1]
        own = labels[:, :: -(-logits.shape[1] // each), :1].reshape(len(self._logits), -1)
        # Without labels the teacher's first choice stands for one.
        self._labels = own[:, 0] if own.shape[1] else self._logits.argmax(1)
        self._loss = make_loss(_LOSS, classes)
        dense = RecordIdentity(classes=classes, k=None, temperatures=(), precision="float32", tail_std=False, labels=1)
        self._truth = self._gradient(self._records(dense))

    def error(self, record: RecordIdentity) -> float:
        """The relative error (Frobenius) of the gradient by records of that kind."""
        found = self._gradient(self._records(record))
        return float((found - self._truth).norm() / self._truth.norm())

    def _records(self, record: RecordIdentity) -> Records:
        wanted = record.model_copy(update={"labels": 1, "tail_std": False})
        if wanted.k is not None:
            wanted = wanted.model_copy(update={"temperatures": tuple(sorted({*wanted.temperatures, *self._needed}))})
        records = chunks.encode_as(wanted, self._logits, self._labels[:, None])
        if wanted.k is None:
            return records
        first = slice(0, self._first)
        return replace(records, prior=class_prior(tail_distribution(self._logits[first], records[first])))

    @property
    def _needed(self) -> tuple[float, ...]:
        return tuple(self._loss.needs.temperatures)

    def _gradient(self, records: Records) -> Tensor:
        student = self._student.clone().requires_grad_()
        self._loss(student, self._labels, records).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        return student.grad.double()
