"""What the answers to a few training images give away about a teacher whose cache would be silently wrong.

These are functions of answers alone: `build` asks the teacher for some before it computes any record, `import` reads
some that are stored.
Shapes: M images that are probed, C the teacher's classes, D those of them that the data's labels map to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import comb
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.cache.errors import InputError
from kdcache.pipeline.build.source import Source
from kdcache.pipeline.data.kinds.folders import places_in_classes
from kdcache.pipeline.views.parameters import EvaluationView, evaluation_view
from kdcache.pipeline.views.render import Renderer

_ALLOW = "--allow-low-accuracy builds all the same"
_PER_CLASS, _TOGETHER = 16, 4
_PIECE = 1 << 18  # samples at a time
_LEAST, _TIMED, _MOST = 128, 512, 4096
_SUM = 0.01  # by which rounding in 16 bits moves the sum of a softmax, at most
_STEADY = {"float32": 1e-3, "bf16": 2e-2}  # of the largest gap: what rounding may change between two passes
_ALIKE = 1e-5
_FALSE_ALARMS = 1e-3
_TWICE = 2  # moved classes get the other answer at least so many times as often as the right one
_NAMED = 5
_FLAT = 3


def count_of(classes: int, images: int) -> int:
    """How many images are probed for a build of `images` images, in D classes (0 where unlabelled).

    There are sixteen images of a class, but no more than a twentieth of the build or 4,096; a hundredth of the build,
    up to 512, where that is more, because they are timed too; and at least 128, or eight of a class up to 512.
    """
    least = max(_LEAST, min(_PER_CLASS // 2 * classes, _TIMED), min(images // 100, _TIMED))
    return max(least, min(_PER_CLASS * classes, images // 20, _MOST))


def choose(labels: NDArray[np.int64], samples: int, count: int) -> NDArray[np.int64]:
    """Draw samples to probe, [M] in order: seeded, four of a class, then four of another, until `count` are taken.

    So each class that is seen is seen a few times, and a rare one as often as a common one. labels: [N], or [0] where
    there are none.
    """
    shuffled = np.argsort(np.random.Philox(key=7).random_raw(samples), kind="stable")
    if not len(labels):
        return np.sort(shuffled[:count]).astype(np.int64)
    classes = int(labels.max()) + 1
    seen, first = np.zeros(classes, np.int64), np.full(classes, samples)  # so far of each class: how many, and where
    chosen = np.empty((4, 0), np.int64)  # samples, with what they are ordered by
    for start in range(0, samples, _PIECE):
        piece = shuffled[start : start + _PIECE]
        y = labels[piece]
        np.minimum.at(first, y, np.arange(start, start + len(y)))
        rank = seen[y] + places_in_classes(y, np.arange(len(y)))
        seen += np.bincount(y, minlength=classes)
        chosen = np.concatenate([chosen, [piece, rank, first[y], rank // _TOGETHER]], 1)
        chosen = chosen[:, np.lexsort(chosen[1:])[:count]]  # no later piece can put what is left out in front
    return np.sort(chosen[0])


class Trial(NamedTuple):
    """Training images that a teacher is tried out with, as they are, without augmentation.

    samples: [M]; labels: [M] in the teacher's classes, [0] where unlabelled; names: those of the data's classes, by the
    teacher's ids.
    """

    samples: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: dict[int, str]

    def rendered(self, source: Source, renderer: Renderer, batch: int) -> Iterator[Tensor]:
        """The images in batches, uint8 [B, 3, S, S]."""
        batches = [self.samples[i : i + batch] for i in range(0, len(self.samples), batch)]
        data = source.train
        whole = evaluation_view(data.sizes, whole=True) if data.in_memory else EvaluationView(data.sizes, whole=False)
        return renderer.batches(whole, batches)


def choose_trial(source: Source, count: Callable[[int], int]) -> Trial:
    """Choose images to try the teacher out with. count: how many, by the number of classes that the data have."""
    data, labels = source.train, source.train_labels[:, :1].ravel()
    ids, first = _first_of_each(labels)
    samples = choose(labels, len(data), count(len(ids)))
    names = {int(i): data.class_names[at] for i, at in zip(ids, data.labels[first, :1].ravel(), strict=True)}
    return Trial(samples, labels[samples] if names else labels, names)


def _first_of_each(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The labels that there are, in order, and where each of them stands first."""
    first = np.full(labels.max(initial=-1) + 1, -1)
    for start in reversed(range(0, len(labels), _PIECE)):
        piece = labels[start : start + _PIECE][::-1]
        first[piece] = np.arange(start, start + len(piece))[::-1]  # of a label that stands there twice, the last counts
    ids = np.flatnonzero(first >= 0)
    return ids, first[ids]


def mapped_answers(logits: Tensor, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The most probable one of the classes `ids` [D] for logits [M, C], [M]."""
    found: NDArray[np.int64] = ids[logits[:, torch.from_numpy(ids)].argmax(1).numpy()]
    return found


# ---- answers that are no logits ----


def require_logits(logits: Tensor, samples: NDArray[np.int64]) -> list[str]:
    """Notes on logits [M, C] of these samples; InputError where they are not finite, or probabilities."""
    finite = torch.isfinite(logits).all(1)
    if not finite.all():
        bad = (~finite).nonzero()[:, 0]
        raise InputError(
            f"the teacher's logits are not finite for {len(bad)} of {len(samples)} training images, such as sample "
            f"{samples[int(bad[0])]}: are its weights whole, and its inputs scaled as in its training?"
        )
    if float(logits.min()) >= 0 and float((logits.sum(1) - 1).abs().max()) <= _SUM:
        raise InputError(
            "the teacher answers with probabilities (from 0 to 1, with a sum of 1) where logits are needed: give the "
            "network without its softmax"
        )
    if float(torch.logsumexp(logits, 1).abs().max()) <= _SUM:
        return ["the teacher answers with log-probabilities, which do as logits"]
    return []


def require_use(logits: Tensor) -> None:
    """InputError for logits [M, C] that do not depend on the image, or whose gaps are beyond float16."""
    gaps = logits.amax(1, keepdim=True) - logits
    widest, most = float(gaps.max()), torch.finfo(torch.float16).max
    if widest > most:
        raise InputError(
            f"the teacher's logits lie up to {widest:,.0f} apart, but records hold {most:,.0f}: are its weights and "
            f"the scale of its inputs right? {_ALLOW}"
        )
    if len(gaps) > 1 and float((gaps - gaps[:1]).abs().max()) <= _ALIKE * max(widest, float(logits.abs().max())):
        raise InputError(
            f"the teacher answers alike to all of {len(logits)} training images, as if it did not see them: are its "
            f"weights those of a trained network? {_ALLOW}"
        )


def require_steady(answer: Callable[[Tensor], Tensor], network: nn.Module, images: Tensor, numeric: str) -> None:
    """InputError unless images [B, ...] get the same logits in other company, and the network stays as it is.

    Dropout and batch statistics, of a part that is in training mode or that has no other mode, do not pass.
    """
    half = max(1, len(images) // 2)
    company = images[torch.arange(len(images), device=images.device) % half].clone(memory_format=torch.preserve_format)
    before = {name: value.clone() for name, value in _statistics(network).items()}
    first, again = answer(images).clone(), answer(company)
    if not torch.isfinite(first).all():
        return  # `require_logits` has more to say about that
    limit = _STEADY[numeric] * max(float((first.amax(1) - first.amin(1)).max()), 1e-6)
    twin = again[half : 2 * half]
    if len(twin) and float((again[: len(twin)] - twin).abs().max()) > limit:
        what = "answers the same image differently each time"
    elif float((first[:half] - again[:half]).abs().max()) > limit:
        what = "answers an image differently beside other images"
    elif changed := [name for name, value in _statistics(network).items() if not value.equal(before[name])]:
        what = f"changes {changed[0]} as it answers"
    else:
        return
    training = [name for name, module in network.named_modules() if module.training]
    more = f" and {len(training) - _NAMED} more parts" if len(training) > _NAMED else ""
    why = f" ({', '.join(training[:_NAMED])}{more})" if training else ""
    raise InputError(
        f"the teacher {what}, as in training mode{why}: its network has to stay in eval() mode, without dropout and "
        "statistics of the batch"
    )


def _statistics(network: nn.Module) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    return {n: t for n, t in network.state_dict().items() if isinstance(t, Tensor) and n not in parameters}


# ---- which class is which ----


class Agreement(NamedTuple):
    """Shares of M images (0..1): answered rightly; expected of answers that do not depend on the image; the limit."""

    accuracy: float
    expected: float
    limit: float

    @property
    def near_chance(self) -> bool:
        return self.accuracy < self.limit


def agreement(labels: NDArray[np.int64], answers: NDArray[np.int64]) -> Agreement:
    """How often answers [M] are the labels [M], beside chance.

    Chance is a random pairing of these very labels and answers, so constant answers are at chance on unbalanced data
    too. Its mean is sum_c l_c a_c / M for the counts l and a of class c, and its variance the exact one of matches in a
    random permutation. The limit is four standard deviations and one image above the mean, which a random pairing
    passes less than once in 1,000 times, or half of the way from the mean to all images where those are too few.
    """
    size, m = int(max(labels.max(), answers.max())) + 1, float(len(labels))
    of_labels, of_answers = (np.bincount(ids, minlength=size).astype(np.float64) for ids in (labels, answers))
    both = of_labels * of_answers
    mean = float(both.sum()) / m
    # E[T^2] - E[T]^2 for T matches of two sequences with these counts, one of them permuted at random.
    pairs = both.sum() * (both.sum() + m * m) - m * float((both * (of_labels + of_answers)).sum())
    variance = pairs / (m * m * max(m - 1, 1))
    limit = min(mean + 1 + 4 * max(variance, 0.0) ** 0.5, (mean + m) / 2)
    return Agreement(float((labels == answers).mean()), mean / m, limit / m)


class Moves(NamedTuple):
    """Classes whose images are answered as another class: (class, as which), the commonest first.

    other, own: how many of the moved classes' images that were held back got the other answer, and the right one.
    """

    pairs: list[tuple[int, int]]
    other: int
    own: int


def moved_classes(labels: NDArray[np.int64], answers: NDArray[np.int64]) -> Moves | None:
    """The classes that change places where answers [M] fit labels [M] better after a permutation; else None.

    The permutation is the best one on the first half of each class's images, and is tested on the second half, which it
    has not seen. There the moved classes' images must mostly get the other answer, twice as often as the right one, and
    so often that fair coins would do it at most once in 1,000 times (a sign test). So of the teachers that exchange
    classes no more often than they are right on them, at most 1 in 1,000 is stopped by mistake, however weak they are.
    Classes that cannot be told apart are a toss-up in the second half. If many classes are answered as one, that is no
    permutation, because that one would have to be answered as another.
    """
    order = np.argsort(labels, kind="stable")
    y, z = labels[order], answers[order]
    begins, ends = np.searchsorted(y, y), np.searchsorted(y, y, "right")
    fit = np.arange(len(y)) - begins < (ends - begins + 1) // 2
    to = _best_permutation(y[fit], z[fit])
    target = np.array([to[c] for c in y.tolist()])
    held = ~fit & (target != y)
    other, own = int((z == target)[held].sum()), int((z == y)[held].sum())
    if 2 * other <= held.sum() or other < _TWICE * own or _sign_test(other, own) > _FALSE_ALARMS:
        return None
    to = _best_permutation(y, z)
    counts = {c: ((z[y == c] == d).sum(), (z[y == c] == c).sum()) for c, d in to.items() if c != d}
    clear = sorted((c for c, (there, here) in counts.items() if there > here), key=lambda c: -counts[c][0])
    return Moves([(c, to[c]) for c in clear], other, own)


def _best_permutation(labels: NDArray[np.int64], answers: NDArray[np.int64]) -> dict[int, int]:
    """Map each label's class to a class, so that most answers are right; to itself where that is a draw."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and hardly ever needed

    rows, row = np.unique(labels, return_inverse=True)
    columns, column = np.unique(np.concatenate([answers, rows]), return_inverse=True)
    fits = np.zeros((len(rows), len(columns)))
    np.add.at(fits, (row, column[: len(answers)]), 1)
    fits[np.arange(len(rows)), np.searchsorted(columns, rows)] += 0.5 / len(rows)
    chosen = columns[linear_sum_assignment(fits, maximize=True)[1]]
    return dict(zip(rows.tolist(), chosen.tolist(), strict=True))


def _sign_test(more: int, fewer: int) -> float:
    """The probability that so many fair coins show at least `more` heads."""
    n = more + fewer
    heads = sum(comb(n, i) for i in range(more, n + 1))
    return float(heads / 2**n)


def require_order(
    labels: NDArray[np.int64], answers: NDArray[np.int64], names: dict[int, str], whose: str, advice: str
) -> None:
    """InputError that names the classes where answers [M] fit labels [M] after a permutation.

    names: those of the classes, by id. whose: whose classes the answers are. advice: what to do.
    """
    if (moves := moved_classes(labels, answers)) is None:
        return
    shown = [f"images of {names[c]} are answered as {names.get(d, d)}" for c, d in moves.pairs[:_NAMED]]
    more = f" and so on for {len(moves.pairs) - _NAMED} more classes" if len(moves.pairs) > _NAMED else ""
    raise InputError(
        f"{whose} classes are in another order than the data's: {', '.join(shown)}{more} ({moves.other} of "
        f"{moves.other + moves.own} images that are answered as one or the other): {advice}"
    )


def require_classes(labels: NDArray[np.int64], answers: NDArray[np.int64], names: dict[int, str]) -> None:
    """InputError unless a teacher's answers [M] to training images are above chance and in the order of labels [M].

    names: those of the D classes, by id. Where D is 1 there is nothing to tell.
    """
    if len(names) < 2:
        return
    require_order(labels, answers, names, "the teacher's", f"give --class-map FILE that maps them; {_ALLOW}")
    found = agreement(labels, answers)
    if found.near_chance:
        raise InputError(
            f"among {len(names)} classes the teacher is right on {100 * found.accuracy:.1f}% of {len(labels)} training "
            f"images, where chance is {100 * found.expected:.1f}% and {100 * found.limit:.1f}% is needed: are its "
            f"classes in another order (--class-map), or its weights untrained? {_ALLOW}"
        )


def _notes(logits: Tensor, labels: NDArray[np.int64], ids: NDArray[np.int64]) -> list[str]:
    """What should be known about answers that are used all the same."""
    notes = []
    outside = 1 - float(np.isin(logits.argmax(1).numpy(), ids).mean())
    if outside > 0.5:
        notes.append(
            f"for {100 * outside:.0f}% of the images the teacher's first choice is none of the {len(ids)} classes that "
            "the data has, and students learn that too"
        )
    accuracy = float((labels == mapped_answers(logits, ids)).mean())
    confidence = float(torch.softmax(logits, 1).amax(1).mean())
    if confidence < accuracy / _FLAT:
        notes.append(
            f"the teacher is right on {100 * accuracy:.0f}% of the images and gives its first choice "
            f"{100 * confidence:.1f}% on average: cosines and sigmoids, for example, are no logits"
        )
    return notes


def examine(
    logits: Tensor, samples: NDArray[np.int64], labels: NDArray[np.int64], names: dict[int, str], allow: bool
) -> list[str]:
    """All of the above for logits [M, C] of training images: notes on what should be known, or InputError.

    samples: [M]. labels: [M]. names: those of the D classes by the teacher's ids, none where unlabelled. allow: pass
    what may be meant.
    """
    notes = require_logits(logits, samples)
    if not allow:
        require_use(logits)
    if not names:
        return notes
    ids = np.array(sorted(names), np.int64)
    if not allow:
        require_classes(labels, mapped_answers(logits, ids), names)
    return notes + _notes(logits, labels, ids)
