"""The images of a report, where they are at hand: hard and ambiguous samples, and a gallery of some in their views."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kdcache.cache.errors import InputError
from kdcache.cache.identity import SplitName
from kdcache.cache.store.cache import Cache
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.stores import Stored
from kdcache.pipeline.trust import images_of
from kdcache.pipeline.views.operations.kinds.mix import label_weights
from kdcache.pipeline.views.parameters import ViewParameters, draw_as, evaluation_view, imported_view
from kdcache.pipeline.views.policy import policy_of
from kdcache.pipeline.views.render import RENDERER, Renderer
from kdcache.train.evaluation.otherdata import class_ids
from kdcache.train.loaders.cached import require_data
from kdcache.train.report.facts.caches import (
    PICKED,
    Samples,
    answers_of,
    distribution,
    mean_distribution,
    shown_temperature,
)

SIDE = 112  # pixels of a picture on the page at most
_LOSSLESS = 64  # pixels: up to here a PNG is smaller than a good JPEG
_QUALITY = 80
GALLERY = (0.1, 0.5, 0.9, 0.99)  # how hard the samples of the gallery are: the shares of samples that are easier
_COLUMNS = 6  # views of each sample
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Images:
    """The images of a split of a cache, found to be those that it was built from."""

    data: Dataset
    renderer: Renderer

    def whole(self, sample: int) -> str:
        """The sample as evaluation shows it, as the address that holds the picture itself."""
        shown = evaluation_view(self.data.sizes[sample : sample + 1], self.data.in_memory)
        return address(next(iter(self.renderer.batches(shown, [np.array([sample])], sample))))

    def view(self, drawn: ViewParameters, sample: int) -> str:
        """The sample with the parameters of one view."""
        return address(next(iter(self.renderer.batches(drawn, [np.array([sample])], sample))))


def open_images(stored: Stored, given: str | None, split: SplitName = "train") -> Dataset:
    """The images that a cache was built from, given by name as in --data or else as the cache names them.

    InputError where nothing says where they are; MismatchError for other images.
    """
    i = stored.identity
    spec = images_of(i.data.name, given, stored.where)
    data = open_data(spec, split, unlabelled=i.record.labels == 0)
    require_data(stored, data)
    return data


def class_names(stored: Stored, data: Dataset | None) -> list[str]:
    """The name of each of the teacher's classes as the data name them; its number where they do not."""
    i = stored.identity
    names = data.class_names if data else ()
    if not names or data is None:
        return [f"class {c}" for c in range(i.record.classes)]
    if i.class_map is None and len(names) == i.record.classes:
        return list(names)
    named = {at: names[c] for c, at in enumerate(class_ids(data, stored.train.labels)) if at is not None}
    return [named.get(c, f"class {c}") for c in range(i.record.classes)]


def told_of(stored: Stored) -> SplitName:
    """The split whose samples are listed: where training images are mixed, an answer is not to one image alone."""
    return "eval" if stored.identity.views.mixed else "train"


def images_in(stored: Stored, data: Dataset) -> Images:
    """A split's images, and what renders them as the teacher was shown them; KdcacheError where this one cannot."""
    i = stored.identity
    renderer = Renderer(data, i.teacher.input_size, _CPU, policy_of(i.views, stored.where), 0, i.teacher.interpolation)
    return Images(data, renderer)


def listed(stored: Stored, samples: Samples, images: Images | None) -> dict[str, Any]:
    """The hardest and the most ambiguous samples, with pictures where the images are at hand."""
    hardest, ambiguous = samples.hardest(PICKED), samples.most_ambiguous(PICKED)
    temperature = shown_temperature(stored)
    answers = answers_of(stored, samples.split, sorted({*hardest, *ambiguous}), samples.views)
    labels = (stored.train if samples.split == "train" else stored.evaluation).labels

    def told(sample: int) -> dict[str, Any]:
        seen = int(samples.seen[sample])
        return {
            "sample": sample,
            "where": images.data.where(sample) if images and not images.data.in_memory else None,
            "image": images.whole(sample) if images else None,
            "labels": labels[sample].tolist(),
            "answers": mean_distribution([answers[view][sample] for view in samples.views], temperature),
            "entropy": float(samples.entropy[sample]) / seen,
            "nll": None if samples.nll is None else float(samples.nll[sample]) / seen,
        }

    return {"hardest": [told(sample) for sample in hardest], "ambiguous": [told(sample) for sample in ambiguous]}


def gallery(stored: Stored, samples: Samples, images: Images) -> list[dict[str, Any]]:
    """Some samples, from easy to very hard ones, each as it is and in some views with what the teacher answers there.

    They are of one part, so that few parameters have to be compared with those of the commits.
    """
    if stored.identity.views.policy == "foreign":
        raise InputError("the views were imported, and only the transforms of their own project can make them")
    part = samples.parts[0]
    rows = stored.train.rows(part) if isinstance(stored, Cache) else range(stored.identity.data.samples)
    means = (samples.entropy if samples.nll is None else samples.nll)[rows.start : rows.stop]
    order = np.argsort(means, kind="stable")
    chosen = list(dict.fromkeys(rows.start + int(order[int(share * (len(order) - 1))]) for share in GALLERY))
    views = stored.views[:_COLUMNS]
    drawn = {view: _drawn(stored, images.data, view, part, rows) for view in views}
    answers = answers_of(stored, "train", chosen, views)
    labels, temperature = stored.train.labels, shown_temperature(stored)
    found = []
    for share, sample in zip(GALLERY, chosen, strict=False):
        cells = []
        for view in views:
            one = drawn[view](sample)
            cells.append(
                {
                    "view": view,
                    "image": images.view(one, sample),
                    "answers": distribution(answers[view][sample], temperature),
                    "mixed": _mixed(one, images.renderer.size, labels),
                }
            )
        about = {"sample": sample, "easier": share, "labels": labels[sample].tolist(), "image": images.whole(sample)}
        found.append({**about, "views": cells})
    return found


def _drawn(stored: Stored, data: Dataset, view: int, part: int, rows: range) -> Callable[[int], ViewParameters]:
    """What gives a sample's parameters in a view, after those of its part were compared with the commit.

    KdcacheError where these are not the pixels that the teacher saw.
    """
    views = stored.identity.views
    if not isinstance(stored, Cache):
        return lambda sample: draw_as(views, view, range(sample, sample + 1), data.sizes)
    if not views.imported and views.renderer != RENDERER:
        raise InputError(f"the views were rendered by {views.renderer}, and this kdcache renders by {RENDERER}")
    if views.imported:
        whole = imported_view(stored.train.view_arrays(view), data.sizes, f"view {view} of {stored.where}")
        of_part = whole[rows.start : rows.stop]
    else:
        of_part = draw_as(views, view, rows, data.sizes)
    if of_part.digest() != stored.train.commit(shard_name(view, part)).parameters:
        raise InputError(f"view {view} was built with other view parameters than this kdcache draws")
    if views.imported:
        return lambda sample: of_part[sample - rows.start : sample - rows.start + 1]
    return lambda sample: draw_as(views, view, range(sample, sample + 1), data.sizes)


def _mixed(one: ViewParameters, size: tuple[int, int], labels: NDArray[Any]) -> dict[str, Any] | None:
    """Whose image a sample's is mixed with in a view, and the shares of both."""
    if one.mixing is None:
        return None
    partner = int(one.mixing.partners[0])
    own, theirs = label_weights(one.mixing.drawn, *size)[0].tolist()
    return {"partner": partner, "own": own, "theirs": theirs, "labels": labels[partner].tolist()}


def address(pixels: torch.Tensor) -> str:
    """A picture uint8 [1, 3, H, W] as a data: address, no larger than the page shows it."""
    image = Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())
    kind = "PNG" if max(image.size) <= _LOSSLESS else "JPEG"
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, kind, **({"optimize": True} if kind == "PNG" else {"quality": _QUALITY}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
