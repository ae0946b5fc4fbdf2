"""Truncation at 1,000 classes: heads fitted by nkd to records of real ImageNet logits, and their KL to the teacher.

The file holds a teacher's logits [views, images, C] without the images, so a head's input is made from other views of
the same image: the teacher's logits on view v + V/2, centred and reduced to 64 whitened principal components (those of
the training images). Its target is the record of view v, for the first half of the views. So a head sees the image as a
student with little capacity would, and cannot copy the answer. Four fifths of the images train it; on the others KL is
taken, to the teacher's whole distribution of view v at temperature 1. The label is the class with the highest mean
logit, as the file gives it. A seed draws the division of the images, the head's start and the order of batches, and all
heads of a seed share them, so that they are compared pair by pair.

KL is a sum of two parts: that of the label against all others, of which nkd's first term asks more confidence than the
teacher's, and (1 - p_y) KL(p~, q~) among the others, which is what records decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.cache import Records, encode
from kdcache.cache.records.encoding import class_prior, tail_distribution
from kdcache.train.losses import CE, NKD, Loss
from kdcache.train.losses.options import make_loss

KS, TAILS, DENSE = (5, 10, 20, 50), ("prior", "uniform", "renorm", "drop"), "dense"
GAMMA, TEMPERATURE = 1.5, 1.0  # nkd's preset for more than 200 classes
COMPONENTS, EPOCHS, BATCH, LR, DECAY = 64, 40, 128, 0.01, 0.1
NOTHING = -1e4  # a logit without any probability, though its logarithm is finite


def heads(file: Path, seed: int) -> dict[str, dict[str, float]]:
    """On the images left out "kl", KL(teacher, head) in nats, and "others", its part beside the label.

    Each by "K tail", "dense", and "ce" for a head without teacher.
    """
    parts = divided(file, seed)
    x, y, z, unseen, truth = parts.x, parts.y, parts.z, parts.unseen, parts.truth
    target = parts.target[:, None]
    rest = 1 - truth.softmax(1).gather(1, target)[:, 0]
    found: dict[str, dict[str, float]] = {"kl": {}, "others": {}}

    def fit(name: str, loss: Loss, records: Records | None) -> None:
        answers = fitted(loss, x, y, records, z.shape[1], seed)(unseen)
        found["kl"][name] = float(kl(truth, answers).mean())
        without = (z.scatter(1, target, NOTHING) for z in (truth, answers))
        found["others"][name] = float((rest * kl(*without)).mean())

    fit("ce", CE(), None)
    fit(DENSE, NKD(GAMMA, TEMPERATURE), encode(z, y))
    for k in KS:
        records = encode(z, y, k, (TEMPERATURE,))
        of_view_0 = tail_distribution(z[: parts.images], records[: parts.images])
        records = replace(records, prior=class_prior(of_view_0))
        for tail in TAILS:
            fit(f"{k} {tail}", NKD(GAMMA, TEMPERATURE, tail), records)
    return found


def presets(file: Path, classes: int, seed: int, specs: Sequence[str]) -> dict[str, dict[str, float]]:
    """By loss, and "ce": what heads of dense records say of the images left out.

    top1 is the share that gets the label, nll the label's loss in nats, kl KL(teacher, head) in nats. With fewer
    classes than the file has, the teacher is asked among those that it finds most probable on average.
    """
    parts = divided(file, seed, classes)
    records, found = encode(parts.z, parts.y), {}
    for spec in ("ce", *specs):
        loss = make_loss(spec, classes)
        head = fitted(loss, parts.x, parts.y, None if spec == "ce" else records, classes, seed)
        answers = head(parts.unseen)
        found[spec] = {
            "top1": float((answers.argmax(1) == parts.target).double().mean()),
            "nll": float(F.cross_entropy(answers, parts.target)),
            "kl": float(kl(parts.truth, answers).mean()),
        }
    return found


@dataclass(frozen=True)
class Parts:
    """Inputs, labels and logits of the training images (x, y, z) and of those left out; images: how many train."""

    x: Tensor
    y: Tensor
    z: Tensor
    unseen: Tensor
    target: Tensor
    truth: Tensor
    images: int


def divided(file: Path, seed: int, classes: int | None = None) -> Parts:
    """The file's images as a seed divides them, all views of an image on one side; with these many classes, or all."""
    with np.load(file) as f:
        logits, labels = torch.from_numpy(f["logits"]).float(), torch.from_numpy(f["labels"].astype(np.int64))
    half, images = len(logits) // 2, len(labels)
    order = torch.from_numpy(np.argsort(np.random.Philox(key=seed).random_raw(images), kind="stable"))
    train, test = order[images // 5 :], order[: images // 5]
    inputs = components(logits[half:], train)
    if classes is not None and classes < logits.shape[2]:
        likely = logits.softmax(2).mean((0, 1)).topk(classes).indices
        logits = logits[:, :, likely]
        labels = logits.mean(0).argmax(1)
    x, z = (values[:, train].flatten(0, 1) for values in (inputs, logits[:half]))
    unseen, truth = (values[:, test].flatten(0, 1) for values in (inputs, logits[:half]))
    return Parts(x, labels[train].repeat(half), z, unseen, labels[test].repeat(half), truth, len(train))


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """[N] KL(softmax(teacher), softmax(student)) of logits [N, C], in nats."""
    return F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="none", log_target=True).sum(1)


def components(logits: Tensor, train: Tensor) -> Tensor:
    """[views, images, COMPONENTS] of logits [views, images, C], with the mean and axes of the training images."""
    known = logits[:, train].flatten(0, 1)
    mean = known.mean(0)
    values, axes = torch.linalg.eigh(torch.cov((known - mean).T))
    return (logits - mean) @ axes[:, -COMPONENTS:] / values[-COMPONENTS:].sqrt()


def fitted(loss: Loss, x: Tensor, y: Tensor, records: Records | None, classes: int, seed: int) -> torch.nn.Linear:
    """A linear head after EPOCHS over the rows of x."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(x.shape[1], classes)
    optimiser = torch.optim.AdamW(head.parameters(), LR, weight_decay=DECAY)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, EPOCHS * steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x))
        for rows in order[: steps * BATCH].split(BATCH):
            value = loss(head(x[rows]), y[rows], None if records is None else records[rows])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
    return head.requires_grad_(False)
