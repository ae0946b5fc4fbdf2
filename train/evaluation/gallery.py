"""Some training views with what the teacher and a student say of them, for loggers that take images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Protocol

import torch
from torch import Tensor

from kdcache.cache.errors import UnservedError
from kdcache.cache.records.records import Records
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train.loop.logs.services import Picture

_PICTURES, _ANSWERS = 8, 3


class _Steps(Protocol):
    """What a loader gives: (images uint8 [B, 3, S, S], labels [B] or [B, L], records of B)."""

    def set_epoch(self, epoch: int) -> None: ...

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Records | None]]: ...


def gallery(
    loader: _Steps, names: Mapping[int, str], dtype: torch.dtype | None
) -> Callable[[Classifier], list[Picture]]:
    """What makes the pictures of the first samples of the first epoch, as the student was shown them, for a student.

    names: of the teacher's classes, as far as they are known. dtype: of the student's autocast.
    """

    @torch.inference_mode()
    def pictures(model: Classifier) -> list[Picture]:
        loader.set_epoch(0)
        with closing(loader.steps()) as steps:  # type: ignore[type-var]
            images, labels, records = next(steps)
        images, labels = images[:_PICTURES], labels[:_PICTURES]
        model.eval()
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            student = model(images).float().softmax(1)
        teacher = None if records is None else _answers(records[: len(images)])
        shares = None if records is None or records.label_weights is None else records.label_weights[: len(images)]
        found = []
        for i, image in enumerate(images):
            said = [f"label: {_label(labels[i], None if shares is None else shares[i], names)}"]
            said += [] if teacher is None else [f"teacher: {_top(teacher[i], names)}"]
            said.append(f"student: {_top(student[i], names)}")
            found.append(Picture(f"view{i}", image.permute(1, 2, 0).cpu().numpy(), "; ".join(said)))
        return found

    return pictures


def _answers(records: Records) -> Tensor:
    """The teacher's probabilities [B, C] at temperature 1; where that is not stored, all of it for the top class."""
    try:
        return records.dense(1.0)
    except UnservedError:
        return torch.nn.functional.one_hot(records.predictions(), records.num_classes).float()


def _top(probabilities: Tensor, names: Mapping[int, str]) -> str:
    values, classes = probabilities.topk(min(_ANSWERS, len(probabilities)))
    pairs = zip(classes.tolist(), values.tolist(), strict=True)
    return ", ".join(f"{names.get(c, str(c))} {100 * value:.0f}%" for c, value in pairs)


def _label(labels: Tensor, shares: Tensor | None, names: Mapping[int, str]) -> str:
    of = [names.get(c, str(c)) for c in labels.reshape(-1).tolist()]
    if shares is None:
        return " and ".join(of) or "none"
    return ", ".join(f"{name} {100 * share:.0f}%" for name, share in zip(of, shares.tolist(), strict=True))
