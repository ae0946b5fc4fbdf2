"""Stage 2: one student, from a loader's (images, labels, records) and a loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdcache.cache.errors import CorruptError, InputError, KdcacheError
from kdcache.cache.records.records import Records
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.process.screen import with_room
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier, try_out
from kdcache.train import group
from kdcache.train.config import SAVE_EVERY
from kdcache.train.loop.compiling import clear_compile_error, compiled
from kdcache.train.loop.ema import WeightAverage
from kdcache.train.loop.interrupts import Interrupts
from kdcache.train.loop.logs.logs import Logged, Logs
from kdcache.train.loop.optimisers import Recipe, Updater
from kdcache.train.loop.runfolder import ANEW, RunFolder
from kdcache.train.loop.watching import PARTNER, EpochLines, Glance, of_partner
from kdcache.train.losses.base import Learnt, Loss, Paced


class Loader(Protocol):
    """What the trainer iterates over: an epoch's (images uint8, labels, records), or what is left after `start`."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def steps(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Records | None]]: ...


class Partner(Protocol):
    """A second network that learns beside the student (bdkd's teacher), by the same recipe.

    An evaluation returns its metrics with `teacher_` before their names. notes: what goes into its weights files.
    """

    model: Classifier
    notes: dict[str, Any]

    def learn(self, student: Tensor, labels: Tensor, batches: int, weights: Tensor | None = None) -> Tensor: ...

    def update(self, step: int, steps_per_epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _PartSums:
    """The sums of a loss's named parts over the batches of an epoch, on the device; empty for a loss of one part."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums = torch.zeros((0,))
        self._batches = 0

    def add(self, named: Mapping[str, Tensor], weighted: Callable[[Tensor], Tensor]) -> None:
        """Count a batch's parts; `weighted` gives this rank's share of them."""
        if len(named) == 1:
            return
        values = weighted(torch.stack(list(named.values())))
        self._sums = self._sums + values if self._batches else values
        self._names, self._batches = tuple(named), self._batches + 1

    def means(self, batches: int) -> dict[str, float]:
        """The parts' means as metrics; none unless all of these batches were counted (see load_state_dict)."""
        if batches != self._batches:
            return {}
        sums = _of_ranks(self._sums).tolist()
        return {f"loss_{name}": total / batches for name, total in zip(self._names, sums, strict=True)}

    def clear(self) -> None:
        self._batches = 0

    def state_dict(self) -> dict[str, Any]:
        sums = _of_ranks(self._sums) if self._batches else self._sums
        return {"names": list(self._names), "sums": sums, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from this state. An older version left it empty, and then this epoch gets no means."""
        self._names = tuple(state.get("names", ()))
        self._batches = state.get("batches", 0)
        self._sums = state["sums"].to(device) if state else torch.zeros((0,))


def _of_ranks(sums: Tensor) -> Tensor:
    return group.total(sums) / group.world()


class Training:
    """All that changes while a student learns. learn() takes a batch, update() ends a step of `recipe.accumulate`.

    epoch, batch: how far it has come, counted from 0. evaluated: the network that is evaluated and filed; it has the
    average of the weights if the recipe asks for one.
    """

    def __init__(
        self, model: Classifier, loss: Loss, recipe: Recipe, batches: int, partner: Partner | None = None
    ) -> None:
        self.model, self.loss, self.recipe, self.partner = model, loss, recipe, partner
        self.epoch = self.batch = 0
        self.seconds = 0.0
        self._batches, self._steps = batches, math.ceil(batches / recipe.accumulate)  # an epoch
        self._device = next(model.parameters()).device
        learnt = list(loss.parameters()) if isinstance(loss, Learnt) else []
        self._averaged, self._weighted = group.averaged(model, learnt), group.Weighted()
        self._forward = compiled(self._averaged) if recipe.compile else self._averaged
        group.draw_apart()
        self._updater = Updater([*model.parameters(), *learnt], recipe, self._device)
        self._average = WeightAverage(model, recipe.ema) if recipe.ema is not None else None
        self._sums = torch.zeros((2,), device=self._device)  # of the epoch's losses: the student's, the partner's
        self._parts = _PartSums()  # of the student's loss
        self._glance = Glance(self._device)

    @property
    def evaluated(self) -> Classifier:
        return self.model if self._average is None else self._average.model

    @clear_compile_error()
    def learn(self, images: Tensor, labels: Tensor, records: Records | None) -> None:
        """Add the gradient of one batch. Nothing here waits for the device."""
        # The mean over a step's batches counts, even if an epoch ends with fewer of them.
        first = self.batch - self.batch % self.recipe.accumulate
        together = min(self.recipe.accumulate, self._batches - first)
        more = self.batch + 1 < first + together
        with group.gradients_stay(self._averaged) if more else nullcontext():
            with torch.autocast(self._device.type, self.recipe.dtype, enabled=self.recipe.dtype is not None):
                logits = self._forward(images)
            parts = self.loss.parts(logits, labels, records)
            value = self._weighted(parts.total, len(images))
            self._updater.backward(value, together)
        self._sums[0] += value.detach()
        self._parts.add(parts.named, lambda values: self._weighted(values, len(images)))
        if self.partner is not None:
            weights = None if records is None else records.label_weights
            self._sums[1] += self.partner.learn(logits.detach(), labels, together, weights)
        self.batch += 1

    @property
    def step_is_whole(self) -> bool:
        return self.batch % self.recipe.accumulate == 0 or self.batch == self._batches

    def update(self) -> None:
        """Update the weights with the gradients that were added since the last update."""
        step = self.epoch * self._steps + math.ceil(self.batch / self.recipe.accumulate) - 1
        self._updater.update(step, self._steps)
        if self._average is not None:
            self._average.update(step)
        if self.partner is not None:
            self.partner.update(step, self._steps)

    def glance(self) -> str:
        """Loss, learning rate and the device's memory, for a bar: what this rank knows without waiting."""
        return self._glance(self._sums[0], self.batch, self._updater.rate)

    def losses(self) -> dict[str, float]:
        """The epoch's mean loss, the means of its parts if it has several, and the partner's mean loss."""
        loss, of_partner = (total / self._batches for total in _of_ranks(self._sums).tolist())
        partner = {} if self.partner is None else {f"{PARTNER}_loss": of_partner}
        return {"loss": loss, **self._parts.means(self._batches), **partner}

    def average_statistics(self) -> None:
        """Give all networks the mean of the ranks' running statistics, before they are evaluated or kept."""
        average, partner = self._average, self.partner
        group.average_statistics(self.model, *(other.model for other in (average, partner) if other is not None))

    def end_epoch(self) -> None:
        self._sums.zero_()
        self._parts.clear()
        self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The whole state, with the random generators. Call it only between two steps, and on all ranks together."""
        self.average_statistics()
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "sums": _of_ranks(self._sums),
            "parts": self._parts.state_dict(),
            "model": self.model.state_dict(),
            "average": self._average.state_dict() if self._average is not None else {},
            "updater": self._updater.state_dict(),
            "loss": self.loss.state_dict() if isinstance(self.loss, Learnt) else {},
            PARTNER: self.partner.state_dict() if self.partner is not None else {},
            "random": group.everyones(_random_state(self._device)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch, self.seconds = state["epoch"], state["batch"], state["seconds"]
        self._sums.copy_(state["sums"])
        self._parts.load_state_dict(state.get("parts", {}), self._device)
        self.model.load_state_dict(state["model"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._updater.load_state_dict(state["updater"])
        if isinstance(self.loss, Learnt):
            self.loss.load_state_dict(state["loss"])
        if self.partner is not None:
            self.partner.load_state_dict(state[PARTNER])
        if group.rank() < len(state["random"]):
            _restore_random(state["random"][group.rank()], self._device)


class _Kept:
    """What is kept of a training: its lines in `history` and, with a folder, its weights, logs and state.

    All ranks take part in keeping, and the first one writes. Use it in a `with` statement, which closes the logs.
    """

    def __init__(
        self,
        training: Training,
        folder: RunFolder | None,
        notes: dict[str, Any],
        say: Callable[[str], None],
        logged: Logged | None,
    ) -> None:
        self._training, self._notes, self._say = training, notes, say
        self.history = _resume(training, folder, say) if folder else []
        self._keeps, self._folder = folder is not None, None if group.rank() else folder
        self._logs = Logs(self._folder.path, self.history, say, logged) if self._folder else None
        self._lines = EpochLines(training.recipe.epochs)

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._logs is None:
            return
        try:
            self._logs.close()
        except (KdcacheError, OSError) as e:
            if error is None:
                raise
            self._say(f"warning: {e}")  # the error to show is the one that ended the training

    def save(self) -> None:
        """Keep the state from which a run goes on."""
        if self._keeps:
            state = self._training.state_dict()
            if self._folder:
                self._folder.save_state(self.history, state)

    def add(self, line: dict[str, Any]) -> None:
        """Keep the results of a whole epoch. The state comes last, so that after a kill the epoch's end is repeated."""
        self.history.append(line)
        self._say(self._lines(line))
        if self._folder and self._logs:
            self._folder.save_weights(self._training.evaluated, self._notes, self.history, of="")
            if (partner := self._training.partner) is not None:
                theirs = [of_partner(past) for past in self.history]
                self._folder.save_weights(partner.model, partner.notes, theirs, of=f"{PARTNER}-")
            self._logs.line(line)
        self.save()
        if self._logs and line["epoch"] == self._training.recipe.epochs:
            self._logs.end(self._training.evaluated)


def fit(
    model: Classifier,
    loss: Loss,
    loader: Loader,
    recipe: Recipe,
    evaluate: Callable[[Classifier], dict[str, float]],
    folder: RunFolder | None = None,
    notes: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
    partner: Partner | None = None,
    save_every: float = SAVE_EVERY,
    evaluate_every: int = 1,
    logged: Logged | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place, and return a line of metrics for each epoch. With a folder, go on from the state there.

    The state is saved after every epoch, every `save_every` seconds within an epoch, and when Ctrl-C or SIGTERM asks
    to stop. The current step is finished then, and KeyboardInterrupt is raised. notes: what goes into the weights
    files. partner: a network that learns in the same steps. evaluate_every: the number of epochs between evaluations;
    the last epoch is always evaluated, and the lines of epochs without an evaluation have no metrics. logged: what is
    logged beside the folder's own files. KdcacheError if a loss is no longer finite.
    """
    training = Training(model, loss, recipe, len(loader), partner)
    wishes = group.Wishes()
    with (
        _Kept(training, folder, notes or {}, with_room(say), logged) as kept,
        Interrupts() as interrupts,
        _progress(training, len(loader)) as progress,
    ):
        while training.epoch < recipe.epochs:
            progress.title = f"epoch {training.epoch + 1}/{recipe.epochs}"
            _train_epoch(training, loader, interrupts, wishes, kept.save, save_every, progress.advance)
            training.average_statistics()
            losses, epoch = training.losses(), training.epoch + 1
            if not all(map(math.isfinite, losses.values())):
                raise KdcacheError(f"the loss is not finite in epoch {epoch}: lower --lr (now {recipe.lr:g})")
            measured: dict[str, float] = {}
            if epoch % evaluate_every == 0 or epoch == recipe.epochs:
                end = logged.last if logged and epoch == recipe.epochs else None
                measured = _evaluated(training, end.evaluate if end else evaluate, interrupts, kept.save)
            line: dict[str, Any] = {"epoch": epoch, **losses, "seconds": training.seconds, **measured}
            training.end_epoch()
            kept.add(line)
            _stop_together(interrupts)
    return kept.history


def _progress(training: Training, batches: int) -> Progress:
    """What is shown of the whole run while it lasts."""
    done = training.epoch * batches + training.batch
    return Progress("epoch", training.recipe.epochs * batches, "steps", done=done, facts=training.glance)


def _evaluated(
    training: Training,
    evaluate: Callable[[Classifier], dict[str, float]],
    interrupts: Interrupts,
    save: Callable[[], None],
) -> dict[str, float]:
    """The metrics of an epoch whose batches are all learnt. If this is stopped, they are kept, not learnt again."""
    if group.world() > 1:
        save()  # ranks evaluate together, to the end, and torchrun may kill one that takes so long to stop
        return evaluate(training.evaluated)
    try:
        with interrupts.at_once():
            return evaluate(training.evaluated)
    except KeyboardInterrupt:
        save()
        raise


def _resume(training: Training, folder: RunFolder, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Put the training back as it was, and return the lines of the epochs that are done."""
    state = group.from_first(folder.load_state)
    if state is None:
        return []
    try:
        training.load_state_dict(state["training"])
    except (KeyError, RuntimeError, TypeError, ValueError) as e:
        raise CorruptError(f"{folder.path / 'state.pt'} belongs to another network: {ANEW}") from e
    within = f" and {training.batch} batches" if training.batch else ""
    say(f"resuming {folder.path} after epoch {training.epoch}{within} of {training.recipe.epochs}")
    history: list[dict[str, Any]] = state["history"]
    return history


def _train_epoch(
    training: Training,
    loader: Loader,
    interrupts: Interrupts,
    wishes: group.Wishes,
    save: Callable[[], None],
    save_every: float,
    advance: Callable[[int], object],
) -> None:
    """Train what is left of the epoch that the training is in. advance: is told of every step."""
    loader.set_epoch(training.epoch)
    if isinstance(training.loss, Paced):
        training.loss.set_epoch(training.epoch + 1)
    training.model.train()
    if training.batch == len(loader):  # stopped in the evaluation
        return
    began, saved = time.monotonic() - training.seconds, time.monotonic()
    for images, labels, records in loader.steps(training.batch):
        training.learn(images, labels, records)
        advance(1)
        if not training.step_is_whole:
            continue
        training.update()
        interrupts.waiting = True  # not in the first step, which may compile for minutes
        now = time.monotonic()
        training.seconds = now - began
        stop, keep = wishes(interrupts.asked, now - saved > save_every)
        if stop:
            break  # this ends the loader's threads and processes
        if keep:
            save()
            saved = time.monotonic()
    _stop_together(interrupts, save)


def _stop_together(interrupts: Interrupts, save: Callable[[], None] = lambda: None) -> None:
    """KeyboardInterrupt if any rank was asked to stop. One that is asked just now stops with the others later."""
    if group.anyones(interrupts.asked):
        save()
        raise KeyboardInterrupt


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network whose initial weights depend on the seed alone. Dropout then draws from the same generator."""
    torch.manual_seed(seed)
    return make()


def new_classifier(
    name: str, classes: int, size: int, data: Dataset, device: torch.device, seed: int, whose: str
) -> Classifier:
    """The network `name` with weights drawn from the seed, for images of `size` pixels normalised as the data's.

    InputError if it does not answer for so many classes. whose: what the error says before their number.
    """
    network = seeded(seed, lambda: build_network(name, classes, size))
    model = Classifier(network, data.mean, data.std).to(device)
    model.to(memory_format=torch.channels_last)
    if (answers := try_out(model, name, size)) != classes:
        raise InputError(f"{name} answers for {answers} classes, {whose} {classes}")
    return model
