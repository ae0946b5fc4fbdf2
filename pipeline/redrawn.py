"""The parameters of a cache's views, drawn again, to check the digests of them that stand in its commits.

They follow from the identity and the sizes of the images. Caches of image files hold these sizes. Images in memory are
all of one size, which stands in no file: it is the one that gives a digest of the commits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice, product

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.errors import ForeignError, KdcacheError
from kdcache.cache.identity import SplitName
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.imports.stored import parameters_digest
from kdcache.pipeline.views.parameters import draw_as, evaluation_view
from kdcache.pipeline.views.policy import policy_of
from kdcache.pipeline.views.render import RENDERER

_Size = tuple[int, int]  # height and width
_SQUARE, _SIDE = 512, 128  # the largest square, and the longest side of other images, that are tried
_TRIED = 3  # commits of training shards, of which some may be damaged


class Redrawn:
    """Compares the view parameters that commits name with those that the identity of their cache gives.

    fitting: how many were the same. unknown: why some cannot be compared.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache, self._identity = cache, cache.identity
        self.fitting = 0
        self.unknown: list[str] = []

    def require(self, store: SplitStore, view: int, part: int) -> None:
        """ForeignError unless the commit of a shard names the parameters of its view, as far as these are known."""
        digest = self._digest(store, view, part)
        if digest is None:
            return
        if store.commit(shard_name(view, part)).parameters == digest:
            self.fitting += 1
            return
        raise ForeignError(
            f"{store.where}: view {view}, part {part} was built with other view parameters than its cache has, or its "
            "commit is damaged"
        )

    def _digest(self, store: SplitStore, view: int, part: int) -> str | None:
        if self._identity.views.imported:
            names = [spec.name for spec in store.layout.view_arrays]
            rows = store.load(shard_name(view, part), only=names)
            return parameters_digest(dict(zip(names, rows, strict=True)))
        sizes = self._sizes[store.split]
        return None if sizes is None else self._drawn(store, view, part, sizes)

    def _drawn(self, store: SplitStore, view: int, part: int, sizes: NDArray[np.int32]) -> str:
        rows = store.rows(part)
        if store.split == "eval":
            return evaluation_view(sizes[rows.start : rows.stop], whole=not self._identity.evaluation.files).digest()
        return draw_as(self._identity.views, view, rows, sizes).digest()

    @cached_property
    def _sizes(self) -> dict[SplitName, NDArray[np.int32] | None]:
        """int32 [N, 2], the sizes of each split's images, or None where parameters are not to be drawn."""
        views, where = self._identity.views, self._cache.where
        reason = f"{where} was rendered by {views.renderer}, not by {RENDERER}" if views.renderer != RENDERER else None
        try:
            policy_of(views, where)
            if reason is None and self._identity.data.files:
                return {store.split: store.sizes for store in self._cache.splits}
        except KdcacheError as e:
            reason = str(e)
        sizes = None if reason else self._in_memory()
        if sizes is None:
            reason = reason or (
                f"no commit tells how large the images of {self._identity.data.name} are; --depth replay compares "
                "some views with the images"
            )
            self.unknown.append(f"the view parameters were not compared: {reason}")
            return {"train": None, "eval": None}
        return {store.split: _all_of(store, size) for store, size in sizes.items()}

    def _in_memory(self) -> dict[SplitStore, _Size] | None:
        """The size of each split's images; None where no commit tells any."""
        train, evaluation = self._cache.train, self._cache.evaluation
        shown = self._identity.teacher.input_size
        squares = [(side, side) for side in (shown, *range(1, _SQUARE + 1))]
        others = product(range(1, _SIDE + 1), range(1, _SIDE + 1))
        of_eval = self._fitting(evaluation, (*squares, *others))
        of_train = self._fitting(train, (*([of_eval] if of_eval else []), *squares))
        size = of_train or of_eval
        # A damaged commit hides the size that it was made with, which then is that of the other split.
        return {train: size, evaluation: of_eval or size} if size else None

    def _fitting(self, store: SplitStore, sizes: Iterable[_Size]) -> _Size | None:
        """The first of these sizes that one of the first few commits of a split's shards was made with."""
        sizes = tuple(sizes)
        for view, part, parameters in islice(self._named(store), _TRIED):
            for size in sizes:
                if self._drawn(store, view, part, _all_of(store, size)) == parameters:
                    return size
        return None

    def _named(self, store: SplitStore) -> Iterator[tuple[int, int, str]]:
        """What the commits of shards name, of those that can be read."""
        for view, parts in sorted(store.committed().items()):
            for part in sorted(parts & set(range(store.parts))):
                try:
                    parameters = store.commit(shard_name(view, part)).parameters
                except KdcacheError:
                    continue
                if parameters is not None:
                    yield view, part, parameters


def _all_of(store: SplitStore, size: _Size) -> NDArray[np.int32]:
    """That size for each image of a split, int32 [N, 2]."""
    return np.broadcast_to(np.array(size, np.int32), (store.samples, 2))
