"""What a training asks of each kind of store: its labels, how it renders, and a loader.

A store that is read as a `Cache` needs nothing here. Another one is a class like these and a row in `FEEDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.stores import Stored
from kdcache.pipeline.views.render import RENDERER
from kdcache.train.loaders.cached import CachedLoader
from kdcache.train.loaders.ffcv import FFCVLoader


class Feed(Protocol):
    """A store that is open, as a training sees it. renderer: that of the images that its loader gives."""

    @property
    def renderer(self) -> str: ...

    def labels(self) -> NDArray[np.int64]:
        """int64 [N, L] the classes of the training samples, as the teacher counts them."""

    def live(self) -> Cache:
        """The cache whose views a live teacher answers. InputError where none can stand in for these records."""

    def loader(
        self, data: Dataset, batch: int, allow_renderer: bool, say: Callable[[str], None], **options: Any
    ) -> CachedLoader | FFCVLoader:
        """The loader of the store's records beside the pixels of `data`; options are those of CachedLoader.

        InputError for options that the store's loader does not have.
        """


class CacheFeed:
    """A cache in a folder, a bucket or an HDF5 file: the images are those of the dataset."""

    renderer = RENDERER

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def labels(self) -> NDArray[np.int64]:
        return self._cache.train.labels.astype(np.int64)

    def live(self) -> Cache:
        if reason := self._cache.identity.without_teacher:
            raise InputError(f"{self._cache.where} {reason}: train without --online")
        return self._cache

    def loader(
        self, data: Dataset, batch: int, allow_renderer: bool, say: Callable[[str], None], **options: Any
    ) -> CachedLoader:
        return CachedLoader(self._cache, data, batch, **options)


class FFCVFeed:
    """A packed file, which holds the training images itself."""

    def __init__(self, file: FFCVFile) -> None:
        self._file = file

    @property
    def renderer(self) -> str:
        return self._file.renderer

    def labels(self) -> NDArray[np.int64]:
        return self._file.labels.astype(np.int64)

    def live(self) -> Cache:
        raise InputError(f"--online renders as the cache was built: give the cache itself, not {self._file.where}")

    def loader(
        self, data: Dataset, batch: int, allow_renderer: bool, say: Callable[[str], None], **options: Any
    ) -> FFCVLoader:
        file = self._file
        if options.pop("crops_per_decode", 1) > 1:
            raise InputError(
                f"--crops-per-decode is of no use for {file.where}, which FFCV decodes once for every crop: leave it "
                "out, or train from the cache itself"
            )
        loader = FFCVLoader(file, batch, allow_renderer=allow_renderer, **options)
        if allow_renderer and not file.raw:
            say(
                f"note: rendered by {file.renderer}, the cache by {file.identity.views.renderer}: on average "
                f"{loader.difference():.1f} levels of 255 apart"
            )
        return loader


FEEDS: dict[type, Callable[[Any], Feed]] = {Cache: CacheFeed, FFCVFile: FFCVFeed}


def feed_of(store: Stored) -> Feed:
    """An open store as a training sees it."""
    return next(FEEDS[kind] for kind in type(store).__mro__ if kind in FEEDS)(store)
