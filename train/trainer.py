"""Stage 2: one student, from a loader's (images, labels, records) and a loss."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kdcache.cache.errors import CorruptError, InputError, KdcacheError, NotFoundError
from kdcache.cache.files import replace_file
from kdcache.cache.records import Records
from kdcache.pipeline.progress import Progress
from kdcache.pipeline.teachers import Classifier, file_classifier
from kdcache.train.losses import Loss


class Loader(Protocol):
    """What the trainer iterates over: an epoch of (images uint8, labels, records)."""

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int: ...

    def steps(self) -> Iterator[tuple[Tensor, Tensor, Records | None]]: ...


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, linear warm-up over `warmup` epochs, then cosine to zero, step by step.

    lr: peak learning rate at this batch size; decay: weight decay; amp: bfloat16 autocast.
    """

    epochs: int
    lr: float
    decay: float = 5e-4
    momentum: float = 0.9
    warmup: float = 1.0
    amp: bool = False

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        total, warm = self.epochs * steps_per_epoch, round(self.warmup * steps_per_epoch)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


@runtime_checkable
class Learnt(Protocol):
    """A loss with parameters of its own, which are trained beside the student's."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@runtime_checkable
class Paced(Protocol):
    """A loss that goes by the epoch, counted from 1."""

    def set_epoch(self, epoch: int) -> None: ...


class Partner(Protocol):
    """A second network that learns beside the student (bdkd's teacher), and sees to its own optimiser.

    Its metrics stand in those of an evaluation with `teacher_` before their names. notes: for its weights' files.
    """

    model: Classifier
    notes: dict[str, Any]

    def learn(self, student: Tensor, labels: Tensor, rate: float) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


PARTNER = "teacher"  # in the names of its metrics and files

_STATE = {"history", "model", "optimiser", "random", "loss", PARTNER}
_ANEW = "remove it to start the run anew"


def read_config(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise NotFoundError(f"{path} is no run folder: it has no config.json") from None
    except ValueError as e:  # also where it is no text
        raise CorruptError(f"{file} is not valid JSON ({e}): give another --out") from e
    if not isinstance(config, dict):
        raise CorruptError(f"{file} is not what kdcache writes: give another --out")
    return config


class RunFolder:
    """config.json, metrics.jsonl, summary.json, last and best weights, TensorBoard events, and the state to resume.

    Where the teacher learns too, its weights are teacher-last and teacher-best.
    """

    def __init__(self, path: Path, config: dict[str, Any], resume: bool) -> None:
        self.path = path
        file = path / "config.json"
        if any((path / name).exists() for name in ("metrics.jsonl", "state.pt", "summary.json")):
            if not resume:
                raise InputError(f"{path} holds a run already: give --resume to go on with it, or another --out")
            self._require_same(config)
        elif file.exists():
            replace_file(file, _json(config))  # it ended before its first whole epoch: nothing to keep
        elif resume:
            raise InputError(f"{path} holds no run to resume: leave --resume out to start one")
        elif path.exists() and any(path.iterdir()):
            raise InputError(f"{path} is not empty and no run: give another --out")
        else:
            replace_file(file, _json(config))

    def _require_same(self, config: dict[str, Any]) -> None:
        had = read_config(self.path)
        wanted = json.loads(_json(config))
        # The cache may have been moved: its key says what it is.
        names = [k for k in {**had, **wanted} if had.get(k) != wanted.get(k) and k != "cache_path"]
        if names:
            found = "; ".join(f"{k}: the run has {had.get(k)}, asked for {wanted.get(k)}" for k in names)
            raise InputError(f"{self.path} is another run and is not resumed: {found}")

    def load_state(self) -> dict[str, Any] | None:
        """The state after the last whole epoch, or None."""
        file = self.path / "state.pt"
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as e:  # bytes that are no pickle raise whatever comes first
            raise CorruptError(f"{file} cannot be read ({type(e).__name__}): {_ANEW}") from e
        if not isinstance(state, dict) or state.keys() != _STATE:
            raise CorruptError(f"{file} is not what kdcache writes: {_ANEW}")
        return state

    def save_weights(self, model: Classifier, notes: dict[str, Any], history: list[dict[str, Any]], of: str) -> None:
        """The last weights, and the best where the history's last line is; `of` stands before the files' names."""
        scores = [_score(line) for line in history]
        notes = {**notes, "metrics": history[-1]}
        file_classifier(self.path / f"{of}last.safetensors", model, notes)
        if scores[-1] >= max(scores):
            file_classifier(self.path / f"{of}best.safetensors", model, notes)

    def save_state(self, state: dict[str, Any]) -> None:
        """After the weights of a whole epoch, so that a kill in between repeats the epoch."""
        history = state["history"]
        replace_file(self.path / "metrics.jsonl", b"".join(_json(line, indent=None) for line in history))
        content = io.BytesIO()
        torch.save(state, content)
        replace_file(self.path / "state.pt", content.getvalue())

    def finish(self, summary: dict[str, Any]) -> None:
        replace_file(self.path / "summary.json", _json(summary))

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None before that."""
        file = self.path / "summary.json"
        if not file.exists():
            return None
        try:
            summary = json.loads(file.read_text())
        except ValueError:  # also where it is no text
            summary = None
        if not isinstance(summary, dict):
            raise CorruptError(f"{file} is not what kdcache writes: remove it, and --resume writes it again")
        return summary


def make_optimiser(parameters: Iterable[nn.Parameter], recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.decay,
        nesterov=recipe.momentum > 0,
        fused=device.type in ("cpu", "cuda"),
    )


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
) -> list[dict[str, Any]]:
    """Train in place; one line of metrics an epoch. With a folder, goes on after the last whole epoch there.

    `notes` go into the weights' files. partner: learns in the same steps. KdcacheError when a loss is no longer finite.
    """
    device = next(model.parameters()).device
    learnt = list(loss.parameters()) if isinstance(loss, Learnt) else []
    optimiser = make_optimiser([*model.parameters(), *learnt], recipe, device)
    history: list[dict[str, Any]] = []
    if folder and (state := folder.load_state()):
        history = state["history"]
        try:
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            if isinstance(loss, Learnt):
                loss.load_state_dict(state["loss"])
            if partner is not None:
                partner.load_state_dict(state[PARTNER])
        except (KeyError, RuntimeError, TypeError, ValueError) as e:
            raise CorruptError(f"{folder.path / 'state.pt'} is not of this network: {_ANEW}") from e
        _restore_random(state["random"], device)
        say(f"resuming {folder.path} after epoch {len(history)} of {recipe.epochs}")
    events = _events(folder, len(history), say) if folder else None
    for epoch in range(len(history), recipe.epochs):
        loader.set_epoch(epoch)
        if isinstance(loss, Paced):
            loss.set_epoch(epoch + 1)
        started = time.monotonic()
        losses = _train_epoch(model, loss, loader, optimiser, recipe, epoch, partner)
        seconds = time.monotonic() - started
        if not all(map(math.isfinite, losses.values())):
            raise KdcacheError(f"the loss is not finite in epoch {epoch + 1}: lower --lr (now {recipe.lr:g})")
        line: dict[str, Any] = {"epoch": epoch + 1, **losses, "seconds": seconds, **evaluate(model)}
        history.append(line)
        say(_describe(line, recipe.epochs))
        if events is not None:
            for name, value in line.items():
                events.add_scalar(name, value, epoch + 1)
            events.flush()
        if folder:
            folder.save_weights(model, notes or {}, history, of="")
            if partner is not None:
                theirs = [_of_partner(past) for past in history]
                folder.save_weights(partner.model, partner.notes, theirs, of=f"{PARTNER}-")
            folder.save_state(
                {
                    "history": history,
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "loss": loss.state_dict() if isinstance(loss, Learnt) else {},
                    PARTNER: partner.state_dict() if partner is not None else {},
                    "random": _random_state(device),
                }
            )
    if events is not None:
        events.close()
    return history


def _train_epoch(
    model: Classifier,
    loss: Loss,
    loader: Loader,
    optimiser: torch.optim.Optimizer,
    recipe: Recipe,
    epoch: int,
    partner: Partner | None,
) -> dict[str, float]:
    """The mean loss, and that of the partner."""
    model.train()
    device = next(model.parameters()).device
    total, total_partner = torch.zeros((2,), device=device)
    first = epoch * len(loader)
    with Progress(f"epoch {epoch + 1}/{recipe.epochs}", len(loader), "steps") as progress:
        for i, (images, labels, records) in enumerate(loader.steps()):
            rate = recipe.rate(first + i, len(loader))
            for group in optimiser.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp):
                logits = model(images)
            value = loss(logits, labels, records)
            optimiser.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += value.detach()
            if partner is not None:
                total_partner += partner.learn(logits.detach(), labels, rate)
            progress.advance(1)
    means = {"loss": float(total) / len(loader)}
    if partner is not None:
        means[f"{PARTNER}_loss"] = float(total_partner) / len(loader)
    return means


def _of_partner(line: dict[str, Any]) -> dict[str, Any]:
    """The partner's part of a line of metrics, under the names that a student's has."""
    mark = f"{PARTNER}_"
    return {k.removeprefix(mark): v for k, v in line.items() if k.startswith(mark)}


def _score(line: dict[str, Any]) -> float:
    """What the best weights are best at: top-1, or agreement where there are no labels."""
    return float(line.get("top1", line.get("agreement", -line["loss"])))


def _describe(line: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {line['epoch']}/{epochs}", f"loss {line['loss']:.4f}"]
    parts += [
        f"{name} {100 * line[key]:.2f}" for name, key in (("top-1", "top1"), ("agreement", "agreement")) if key in line
    ]
    if "nll" in line:
        parts.append(f"nll {line['nll']:.4f}")
    if theirs := _of_partner(line):
        parts.append(f"ece {line['ece']:.4f}  teacher: loss {theirs['loss']:.4f}")
        parts.append(f"top-1 {100 * theirs['top1']:.2f}  nll {theirs['nll']:.4f}  ece {theirs['ece']:.4f}")
    return "  ".join([*parts, f"{line['seconds']:.1f} s"])


def _events(folder: RunFolder, done: int, say: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("note: no TensorBoard events are written: pip install 'kdcache[tensorboard]' for them")
        return None
    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=done + 1)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _json(value: dict[str, Any], indent: int | None = 2) -> bytes:
    return (json.dumps(value, indent=indent, sort_keys=indent is not None) + "\n").encode()


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A freshly initialised network that depends on the seed alone; dropout goes on from there."""
    torch.manual_seed(seed)
    return make()
