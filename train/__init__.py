"""Stage 2: students from the cache.

What loops of one's own need is here: CachedLoader and CachedDataset give (images, labels, records), make_loss makes a
loss from its name and options, build_network makes a network by its name, metrics compares logits with labels and
records. docs/own-loops.md shows them at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcache.pipeline.teachers.networks import build_network
    from kdcache.train.evaluation.metrics import metrics
    from kdcache.train.loaders.cached import CachedLoader
    from kdcache.train.loaders.dataset import CachedDataset
    from kdcache.train.losses.options import make_loss
else:
    _HOMES = {
        "CachedDataset": "train.loaders.dataset",
        "CachedLoader": "train.loaders.cached",
        "build_network": "pipeline.teachers.networks",
        "make_loss": "train.losses.options",
        "metrics": "train.evaluation.metrics",
    }

    def __getattr__(name: str) -> object:
        """Import each name when it is first used: they need torch, and the config beside them does not."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"kdcache.{_HOMES[name]}"), name)
        return found


__all__ = ["CachedDataset", "CachedLoader", "build_network", "make_loss", "metrics"]
