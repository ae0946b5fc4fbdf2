"""The teacher that a run needs beside the cache: the one that answers live, or the one that learns too."""

from __future__ import annotations

from kdcache.cache.errors import InputError, MismatchError, NotFoundError
from kdcache.pipeline.teachers import weightstore
from kdcache.pipeline.teachers.pixels import Wanted
from kdcache.pipeline.teachers.teacher import Teacher, load_teacher
from kdcache.pipeline.trust import stored_network
from kdcache.train.loop.cotrain import LearningTeacher
from kdcache.train.loop.trainer import new_classifier
from kdcache.train.losses.base import Partnered
from kdcache.train.plan.plan import TrainPlan


def live_teacher(plan: TrainPlan) -> Teacher:
    """The teacher that answers in every step. MismatchError unless it is the one that the cache was built by."""
    asked, cache = plan.asked, plan.cache
    had = cache.identity.teacher
    amp = "bf16" if had.numeric == "bf16" else None
    weights = weightstore.weights_of(cache.identity, cache.where, asked.weights, asked.registry)
    try:
        teacher = load_teacher(
            _network_of(plan), plan.data, plan.device, weights=weights, amp=amp, wanted=Wanted.of(had)
        )
    except NotFoundError:
        raise weightstore.not_to_be_had(had, asked.registry) from None
    if found := had.differences(teacher.identity, theirs="found"):
        raise MismatchError(f"the live teacher is not that of cache {cache.key[:12]}: {'; '.join(found)}")
    if teacher.classes != plan.classes:
        raise MismatchError(
            f"the class map of cache {cache.key[:12]} makes one class of several of the teacher's, and a live teacher "
            "does not: train without --online"
        )
    return teacher


def learning_teacher(plan: TrainPlan) -> LearningTeacher | None:
    """The teacher that learns beside the student, where the loss has one and the run is online; else None.

    InputError for options of it in a run without one, and for what it cannot learn from.
    """
    loss, data, had = plan.loss, plan.data, plan.cache.identity.teacher
    if not isinstance(loss, Partnered):
        return None
    if not plan.teacher_learns:
        _require_no_options(loss)
        return None
    if not plan.cache.identity.record.labels:
        raise InputError(f"{loss.name}'s teacher learns from labels too, and this cache was built with --unlabelled")
    mean, std = data.mean, data.std
    if loss.starts_taught:
        model, mean, std = live_teacher(plan).model, had.mean, had.std
    else:
        if plan.asked.weights:
            raise InputError(f"--weights are those of a taught teacher: give --loss {loss.name}:start=taught")
        # No student has this seed: two networks of one kind must not start from equal weights.
        model = new_classifier(
            _network_of(plan), plan.classes, had.input_size, data, plan.device, -1 - plan.asked.seed, "the cache holds"
        )
    notes = {
        "network": had.network, "input_size": had.input_size, "mean": list(mean), "std": list(std),
        "interpolation": had.interpolation, "class_names": list(data.class_names),
    }  # fmt: skip
    return LearningTeacher(model, had.input_size, loss, plan.recipe, notes)


def _require_no_options(loss: Partnered) -> None:
    """Raise InputError if an option is given that only concerns a teacher that learns."""
    if any(getattr(loss, name) != getattr(type(loss), name) for name in loss.partner_options):
        *most, last = loss.partner_options
        raise InputError(f"{loss.name}'s {', '.join(most)} and {last} are of a teacher that learns: give --online")


def _network_of(plan: TrainPlan) -> str:
    """The teacher's network. InputError where only the cache names a function for it."""
    return plan.asked.teacher or stored_network(plan.cache.identity.teacher.network, plan.cache.where, "--teacher")
