"""What `kdcache build` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.cache.identity import Interpolation
from kdcache.cache.records import TEMPERATURES, Precision
from kdcache.pipeline.data.defaults import DATA
from kdcache.pipeline.teachers.pixels import RGB

PART = 262_144
VIEWS_PER_DECODE = 4


@dataclass(frozen=True)
class BuildConfig:
    """What to build. None means the default for the kind of data (defaults.py); for teacher_*, what its source says."""

    teacher: str
    weights: str | None = None
    data: str = DATA
    augment: str | None = None
    views: int | None = None
    topk: int | None = None
    temperatures: tuple[float, ...] = TEMPERATURES
    precision: Precision | None = None
    tail_std: bool = False
    class_map: str | None = None
    unlabelled: bool = False
    out: str | None = None
    seed: int = 0
    batch_size: int | None = None
    device: str | None = None
    amp: str | None = None
    workers: int | None = None
    allow_low_accuracy: bool = False
    full_fingerprint: bool = False
    views_per_decode: int = VIEWS_PER_DECODE
    compile: bool | None = None
    part: int = PART
    teacher_size: int | None = None
    teacher_mean: RGB | None = None
    teacher_std: RGB | None = None
    teacher_interpolation: Interpolation | None = None
