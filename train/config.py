"""What `kdcache train` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.pipeline.data.defaults import DATA
from kdcache.train.loop.optimisers import Amp, Optimiser
from kdcache.train.loop.trainer import SAVE_EVERY


@dataclass(frozen=True)
class TrainConfig:
    """What to train. None means the default for the dataset's kind (defaults.py), or the only one that matches.

    validation: the fraction of the training images that is held out to choose the best weights by. By default they are
    chosen by the validation split of data that have three splits, and by nothing where there is none.
    """

    loss: str | None = None
    cache: str | None = None
    data: str = DATA
    student: str | None = None
    epochs: int | None = None
    out: str | None = None
    resume: bool = False
    seed: int = 0
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup: float = 1.0
    views: int | None = None
    image_size: int | None = None
    online: bool = False
    fresh_views: bool = False
    teacher: str | None = None
    weights: str | None = None
    device: str | None = None
    amp: Amp | None = None
    workers: int | None = None
    allow_renderer: bool = False
    sync_bn: bool = False
    optimiser: Optimiser = "sgd"
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    compile: bool | None = None
    save_every: float = SAVE_EVERY
    evaluate_every: int = 1
    validation: float | None = None
    registry: str | None = None
    local_store_size: int | None = None
