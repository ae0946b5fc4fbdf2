"""Makes what tests/data/format-2 holds. It was run once, when that format was new, and never again.

    python -m kdcache.tests.helpers.formats FOLDER

cache, and cache.h5, the same packed: top 4 of 20 classes in uint8 with tail-std, two spread views of 21 samples in two
parts, by a policy with every operation on pixels there was. dense.h5: all classes in float16, five views, so of two
pairings, by rrc, flip and mixup. logits.npz: the logits behind both, and the labels of each view.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from kdcache.cache import Identity
from kdcache.cache.packing import pack_hdf5
from kdcache.pipeline.views.parameters import draw_as, evaluation_view
from kdcache.pipeline.views.render import RENDERER
from kdcache.tests.helpers.caches import Filled, identity

EVERYTHING = (
    "crop,flip,three,trivial,randaugment(2,9),color(0.4,0.3,0.2,0.1),gray(0.2),blur(0.5),solarize(0.2),erase(0.25),"
    "mixup(0.2),cutmix(1)"
)


def described(policy: str, sequence: str, **record: object) -> Identity:
    about = identity(part=12, classes=20, mixed=True, sequence=sequence, **record)
    views = about.views.model_copy(update={"policy": policy, "renderer": RENDERER, "seed": 3})
    return about.model_copy(update={"views": views})


class Drawn(Filled):
    """A cache whose commits hold the digests of view parameters that are really drawn."""

    def digest(self, store, view, part):
        rows = store.rows(part)
        if store.split == "eval":
            return evaluation_view(store.sizes[rows.start : rows.stop], whole=False).digest()
        return draw_as(self.about.views, view, rows, store.sizes).digest()


def make(folder: Path) -> None:
    top = Drawn(folder / "cache", described(EVERYTHING, "spread", precision="uint8", tail_std=True), seed=2)
    with tempfile.TemporaryDirectory() as place:
        dense = Drawn(Path(place) / "c", described("rrc,flip,mixup(1)", "random", k=None), views=5, seed=2)
        pack_hdf5(dense.cache, folder / "dense.h5", range(5))
    assert all(dense.logits[at].equal(z) for at, z in top.logits.items())
    pack_hdf5(top.cache, folder / "cache.h5", (0, 1))
    train = dense.cache.train
    np.savez_compressed(
        folder / "logits.npz",
        evaluation=dense.logits["eval", 0].numpy(),
        evaluation_labels=dense.labels["eval"].numpy().astype("uint8"),
        train=np.stack([dense.logits["train", view].numpy() for view in range(5)]),
        train_labels=np.stack([dense.labels_in(train, view).numpy().astype("uint8") for view in range(5)]),
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
