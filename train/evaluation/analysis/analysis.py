"""What a student's answers tell beside the few figures of `metrics`: by class, by confidence, beside the teacher's.

All of it is plain data: `dataclasses.asdict` makes of it what `kdcache eval --json` prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kdcache.cache.records.records import Records
from kdcache.pipeline.process.progress import percent
from kdcache.train.evaluation.analysis import calibration, classes
from kdcache.train.evaluation.analysis.calibration import Bin, Scaling, bins_of
from kdcache.train.evaluation.analysis.classes import Confusions, PerClass
from kdcache.train.evaluation.judge import Answers
from kdcache.train.evaluation.metrics import metrics

_NEAR = 5


@dataclass(frozen=True)
class Agreement:
    """How close a student is to its teacher on some images.

    top1, top5: how often the student's most probable class is among the teacher's one or five most probable, in 0..1;
    top5 is None where the records hold fewer classes. kl: as in `metrics`, or None where the records do not serve it.
    accuracy: the student's own top-1, or None without labels and on mixed images. bins: by the student's confidence,
    with how often the two agree as `accuracy`.
    """

    images: int
    top1: float
    top5: float | None
    kl: float | None
    accuracy: float | None
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Analysis:
    """evaluation, training: agreement with the teacher there, None where there is no teacher to compare with.

    training: on images of the cache's first complete view, as the teacher saw them. per_class, confusions,
    calibration: on the evaluation images; None where they have no labels.
    """

    per_class: PerClass | None
    confusions: Confusions | None
    calibration: Scaling | None
    evaluation: Agreement | None
    training: Agreement | None


def analyse(answers: Answers, names: Sequence[str], training: Answers | None = None) -> Analysis:
    """Analyse what a student answers for the evaluation images and, if given, for images of a training view.

    names: of the student's C classes.
    """
    by_class = mixed_up = scaled = None
    if answers.labels.numel():
        predictions, labels = answers.ranked[:, 0].numpy(), answers.labels.numpy()
        by_class = classes.per_class(predictions, labels, names)
        mixed_up = classes.confusions(predictions, labels, len(names))
        scaled = calibration.scaling(answers.logits, answers.labels)
    return Analysis(by_class, mixed_up, scaled, agreement(answers), None if training is None else agreement(training))


def agreement(answers: Answers) -> Agreement | None:
    """Compare a student with its teacher; None where there is no teacher."""
    teacher = answers.teacher
    if teacher is None:
        return None
    figures = metrics(answers.logits, answers.labels, teacher)
    near = most_probable(teacher, _NEAR)
    top5 = None
    if near.shape[1] == min(_NEAR, teacher.num_classes):
        top5 = float((near == answers.ranked[:, :1]).any(1).float().mean())
    bins = bins_of(answers.logits, teacher.predictions())
    return Agreement(len(answers.logits), figures["agreement"], top5, figures.get("kl"), figures.get("top1"), bins)


def most_probable(teacher: Records, count: int) -> Tensor:
    """int64 [N, count] the teacher's most probable classes, the most probable first; fewer if fewer are stored."""
    if teacher.classes is not None:
        return teacher.classes[:, :count].long()
    return teacher.decoded_gaps().topk(min(count, teacher.num_classes), dim=1, largest=False).indices


def figures_of(found: Analysis) -> dict[str, float]:
    """Single figures of it, by the names that they have in a run's logs; those that are not known are left out."""
    figures: dict[str, float | None] = {}
    if found.evaluation:
        figures["agreement_top5"] = found.evaluation.top5
    if found.training:
        figures |= {"training_agreement": found.training.top1, "training_agreement_top5": found.training.top5}
    if found.calibration:
        after = found.calibration.after
        figures |= {"temperature": found.calibration.temperature, "scaled_nll": after.nll, "scaled_ece": after.ece}
    if found.per_class:
        figures["worst_class_top1"] = min(a for a in found.per_class.accuracy if a is not None)
    return {name: value for name, value in figures.items() if value is not None}


def described(found: Analysis) -> list[str]:
    """The lines that tell people the most of it."""
    lines: list[str] = []
    for where, one in (("evaluation", found.evaluation), ("training", found.training)):
        if one is not None:
            five = "" if one.top5 is None else f", {percent(one.top5)} with one of its five most probable classes"
            lines.append(f"with teacher  {percent(one.top1)} on {one.images:,} {where} images{five}")
    if found.calibration:
        lines += calibration.described(found.calibration)
    if found.per_class and found.confusions:
        lines += classes.described(found.per_class, found.confusions)
    return lines
