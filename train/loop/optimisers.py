"""How a network learns: the recipe, the optimisers by name, and the step from a loss to new weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kdcache.cache.errors import InputError, UnservedError
from kdcache.pipeline.data.defaults import Defaults
from kdcache.train.config import Amp, Optimiser


@dataclass(frozen=True)
class Recipe:
    """How the weights are updated.

    The learning rate rises linearly over `warmup` epochs and then falls to zero along a cosine, update by update.
    lr: its peak, at this batch size. decay: the weight decay. With muon these two are for the weights of two
    dimensions, and sgd_lr and sgd_decay are for all others. momentum: of SGD, which is Nesterov's. amp: the type of
    autocast; with fp16 the losses are scaled. accumulate: the number of batches in an update. clip: the largest norm
    of an update's gradient. ema: the decay of the average of the weights.
    """

    epochs: int
    lr: float
    decay: float = 5e-4
    momentum: float = 0.9
    warmup: float = 1.0
    amp: Amp | None = None
    optimiser: Optimiser = "sgd"
    sgd_lr: float | None = None
    sgd_decay: float | None = None
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    compile: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that autocast computes in; None if autocast is off."""
        return autocast_dtype(self.amp)

    def rate(self, step: int, steps_per_epoch: int, peak: float | None = None) -> float:
        """The learning rate of an update, counted from 0 over the whole run."""
        peak = self.lr if peak is None else peak
        total, warm = self.epochs * steps_per_epoch, round(self.warmup * steps_per_epoch)
        if step < warm:
            return peak * (step + 1) / warm
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def autocast_dtype(amp: str | None) -> torch.dtype | None:
    return {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def require_autocast(device: torch.device, amp: Amp | None) -> None:
    """InputError if torch cannot run a network in this type on this device."""
    if amp is None:
        return
    try:
        # If it cannot, it raises, or it warns and goes on in float32.
        with warnings.catch_warnings(action="error"), torch.autocast(device.type, autocast_dtype(amp)):
            pass
    except (RuntimeError, UserWarning) as e:
        raise InputError(f"--amp {amp} cannot be used on {device}: {' '.join(str(e).split())[:200]}") from e


def default_rates(optimiser: Optimiser, defaults: Defaults, batch: int) -> tuple[float, float]:
    """Peak learning rate and weight decay for updates from a batch of this many images.

    SGD takes the dataset's rate, in proportion to the batch. AdamW's and Muon's rates grow with the square root of the
    batch, because the size of their steps does not follow that of the gradient (Malladi et al. 2022, arXiv 2205.10287).
    """
    if optimiser == "sgd":
        return defaults.rate(batch), defaults.decay
    lr, decay = {"adamw": (1e-3, 0.05), "muon": (0.02, 0.01)}[optimiser]
    return lr * math.sqrt(batch / defaults.train_batch), decay


def _make(parameters: list[nn.Parameter], recipe: Recipe, device: torch.device) -> list[torch.optim.Optimizer]:
    """The recipe's optimisers; every group has its `peak` learning rate."""
    fused = device.type in ("cpu", "cuda")  # fused optimisers also take fp16's scale without waiting for the device

    def sgd(some: list[nn.Parameter], lr: float, decay: float) -> torch.optim.Optimizer:
        momentum = recipe.momentum
        return torch.optim.SGD(
            [{"params": some, "peak": lr}], lr, momentum, weight_decay=decay, nesterov=momentum > 0, fused=fused
        )

    if recipe.optimiser == "sgd":
        return [sgd(parameters, recipe.lr, recipe.decay)]
    if recipe.optimiser == "adamw":
        groups = [{"params": parameters, "peak": recipe.lr}]
        return [torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.decay, fused=fused)]
    if recipe.optimiser != "muon":
        raise InputError(f"unknown optimiser {recipe.optimiser!r}: take one of {', '.join(get_args(Optimiser))}")
    if not hasattr(torch.optim, "Muon"):
        raise UnservedError(f"torch {torch.__version__} has no Muon: install torch 2.9 or later, or take sgd or adamw")
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    if not matrices:
        raise InputError("muon needs weights of two dimensions, and this network has none: take sgd or adamw")
    groups = [{"params": matrices, "peak": recipe.lr}]
    made: list[torch.optim.Optimizer] = [torch.optim.Muon(groups, recipe.lr, weight_decay=recipe.decay)]
    if others:
        lr = recipe.lr if recipe.sgd_lr is None else recipe.sgd_lr
        made.append(sgd(others, lr, recipe.decay if recipe.sgd_decay is None else recipe.sgd_decay))
    return made


class _Together(torch.optim.Optimizer):
    """Several optimisers as one for the scaler: if the gradients of one overflow, none of them steps."""

    def __init__(self, optimisers: list[torch.optim.Optimizer]) -> None:
        super().__init__([{"params": group["params"]} for o in optimisers for group in o.param_groups], {})
        self._optimisers = optimisers

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimiser in self._optimisers:
            optimiser.step()


class Updater:
    """Turns losses into new weights: scaling, clipping, learning rates. It never waits for the device.

    (Torch itself waits in one place: with fp16 it checks for overflow before Muon's step, which is not fused.)
    """

    def __init__(self, parameters: Iterable[nn.Parameter], recipe: Recipe, device: torch.device) -> None:
        self._parameters, self._recipe = list(parameters), recipe
        self._optimisers = _make(self._parameters, recipe, device)
        # A single optimiser is not wrapped, since it may be fused.
        self._all = self._optimisers[0] if len(self._optimisers) == 1 else _Together(self._optimisers)
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self._fill_momentum()

    def _fill_momentum(self) -> None:
        """Start fused SGD's momentum from zeros, which gives the same first step as torch's own start.

        Torch's memory is uninitialised until the first step fills it, which a step whose gradients overflow does not.
        """
        for optimiser in self._optimisers:
            if self._scaler.is_enabled() and isinstance(optimiser, torch.optim.SGD) and optimiser.defaults["momentum"]:
                for group in optimiser.param_groups:
                    for p in group["params"]:
                        if optimiser.state[p].get("momentum_buffer") is None:
                            optimiser.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @property
    def rate(self) -> float:
        """The learning rate of the last update, of the first optimiser."""
        return float(self._optimisers[0].param_groups[0]["lr"])

    def backward(self, loss: Tensor, batches: int = 1) -> None:
        """Add the gradient of this loss. The next update lowers the mean of `batches` such losses."""
        self._scaler.scale(loss / batches if batches > 1 else loss).backward()  # type: ignore[no-untyped-call]

    def update(self, step: int, steps_per_epoch: int) -> None:
        """Update the weights and clear the gradients. step: the update's number in the whole run, counted from 0."""
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._recipe.rate(step, steps_per_epoch, group["peak"])
        if self._recipe.clip is not None:
            self._scaler.unscale_(self._all)
            nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
        self._scaler.step(self._all)
        self._all.zero_grad(set_to_none=True)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {"optimisers": [o.state_dict() for o in self._optimisers], "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimiser, saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self._scaler.load_state_dict(state["scaler"])
        self._fill_momentum()
