"""What a build does, settled once from what was asked for: whatever runs later reads the plan alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from kdcache.cache.errors import InputError
from kdcache.cache.home import caches_folder
from kdcache.cache.identity import Identity
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.leases import Leases
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import Say, Source
from kdcache.pipeline.process.progress import Progress

WORTH_COMPILING = 1_000_000  # records of a cache


class Builds(Protocol):
    """A build at work, as `Builder` is."""

    def build(self, todo: list[Any]) -> int:
        """As `Builder.build`."""


class Elsewhere(Protocol):
    """Where the teacher answers, if it is not in this process."""

    @property
    def device(self) -> str:
        """The type of the devices there, such as cuda."""

    @property
    def where(self) -> str:
        """What answers there, for people."""

    def probe(self, plan: BuildPlan, images: int, say: Say) -> tuple[float, float]:
        """Try the teacher out there: images/s of all that answer, and the bytes of a record."""

    def builder(
        self, plan: BuildPlan, cache: Cache, leases: Leases, spools: Path, writer: Mapping[str, str],
        progress: Progress, say: Callable[[str], None],
    ) -> Builds:  # fmt: skip
        """What takes shards here and has them computed there."""


@dataclass(frozen=True, eq=False)
class BuildPlan:
    """A build of `views` views of a source, with no setting left open.

    The source holds the data, the teacher, the labels and the identity: view policy, seed, record settings and key.

    batch: images that the teacher gets at once. folder: where the cache is to lie; None: under KDCACHE_HOME, by its
    key. compile: whether the teacher is compiled; "try" does without it where that fails. workers: processes that
    decode; None: by the cores of the machine. views_per_decode: views that are cut from an image file each time it is
    decoded. allow_low_accuracy: build even if the teacher is near chance. any_numeric: a published cache by the same
    teacher in the other numeric type will do. elsewhere: where the teacher answers, if it is not in this process.
    """

    source: Source
    views: int
    batch: int
    folder: Path | None
    compile: Literal["no", "try", "must"]
    workers: int | None
    views_per_decode: int
    allow_low_accuracy: bool
    any_numeric: bool
    elsewhere: Elsewhere | None = None

    @property
    def identity(self) -> Identity:
        return self.source.identity

    @property
    def key(self) -> str:
        return self.identity.key

    @property
    def views_together(self) -> int:
        """How many views are computed from the same decoded images."""
        return 1 if self.source.train.in_memory else min(self.views, self.views_per_decode)

    @property
    def path(self) -> Path:
        """The folder of the cache."""
        return self.folder or caches_folder() / self.key


def plan_build(config: BuildConfig, source: Source, elsewhere: Elsewhere | None = None) -> BuildPlan:
    """The plan of a build of `source`. InputError where no view is asked for."""
    defaults, teacher, samples = source.defaults, source.teacher, len(source.train)
    device = elsewhere.device if elsewhere else teacher.device.type
    views = config.views if config.views is not None else defaults.views
    if views < 1:
        raise InputError(f"--views {views}: at least one view is needed")
    return BuildPlan(
        source=source,
        views=views,
        batch=config.batch_size or defaults.batch_for(device, teacher.input_size, samples),
        folder=Path(config.out) if config.out else None,
        compile=_compile(config, source, device),
        workers=config.workers,
        views_per_decode=config.views_per_decode,
        allow_low_accuracy=config.allow_low_accuracy,
        any_numeric=config.amp is None,
        elsewhere=elsewhere,
    )


def _compile(config: BuildConfig, source: Source, device: str) -> Literal["no", "try", "must"]:
    """Whether to compile the teacher where nothing is asked for: on CUDA, for many records.

    It goes by the usual number of views for the data, not by what is left: the logits of a compiled teacher differ from
    others in their last bits, so ranks, and builds that go on with a cache, have to choose alike.
    """
    if config.compile is not None:
        return "must" if config.compile else "no"
    records = len(source.train) * source.defaults.views
    return "try" if device == "cuda" and records >= WORTH_COMPILING else "no"
