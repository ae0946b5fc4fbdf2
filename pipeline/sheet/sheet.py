"""`kdcache views`: some samples in some views, drawn and rendered as a build does it, as one picture.

Every cell is what the teacher would be shown. The first column has each sample as evaluation shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.errors import InputError
from kdcache.cache.files import read_range, replace_file
from kdcache.cache.records.pairs import VIEWS_A_PAIRING
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.data.defaults import defaults_for
from kdcache.pipeline.sheet.config import ViewsConfig
from kdcache.pipeline.sheet.listing import known, listing
from kdcache.pipeline.sheet.picture import Layout, sheet_png
from kdcache.pipeline.teachers.pixels import IMAGENET_SIZE
from kdcache.pipeline.views.operations.kinds.mix import label_weights
from kdcache.pipeline.views.parameters import Mixing, ViewParameters, draw, evaluation_view
from kdcache.pipeline.views.policy import Policy, parse_policy
from kdcache.pipeline.views.render import Renderer

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST = 100_000_000  # pixels of a sheet
Size = tuple[int, int]


@dataclass(frozen=True)
class Sheet:
    """A sheet that was written. facts: everything about it, for programs. text: what people want to know of it."""

    path: Path
    facts: dict[str, Any]
    text: str


def views(config: ViewsConfig, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Do what is asked for: facts for programs, and text for people. InputError as in `draw_sheet`."""
    if config.list_all:
        found = known()
        return found, listing(found)
    sheet = draw_sheet(config, say)
    return sheet.facts, sheet.text


def draw_sheet(config: ViewsConfig, say: Callable[[str], None]) -> Sheet:
    """Draw and render what is asked for, and write the picture.

    InputError for a policy, data or a place that cannot be had, and for a sheet that would be too large.
    """
    path, asked = _place(config.out), config.policy or config.augment
    policy = parse_policy(asked) if asked else None
    data = open_data(config.data, "train", unlabelled=config.unlabelled)
    if data.note:
        say(data.note)
    policy = policy or parse_policy(defaults_for(data).augment)
    count = min(config.samples, len(data))
    samples = [i * len(data) // count for i in range(count)]
    side = config.size or data.image_size or IMAGENET_SIZE
    spread = ", spread views" if config.sequence == "spread" else ""
    title = f"{policy}\n{data.name}, {side} pixels, seed {config.seed}{spread}"
    layout = Layout(count, 1 + config.views, side, side, title)
    _require_small(layout)
    renderer = Renderer(data, side, torch.device("cpu"), str(policy), 0, config.interpolation)
    rows = [_row(data, renderer, policy, config, sample) for sample in samples]
    heads = ["evaluation", *(f"view {view}" for view in range(config.views))]
    captions = [_captions(data, sample, views, renderer.size) for sample, (_, views) in zip(samples, rows, strict=True)]
    replace_file(path, sheet_png(layout, np.stack([images for images, _ in rows]), heads, captions))
    of_samples = [
        {"sample": sample, "views": [_facts(one, renderer.size) for one in views]}
        for sample, (_, views) in zip(samples, rows, strict=True)
    ]
    facts = {
        "path": str(path), "policy": str(policy), "data": data.name, "sequence": config.sequence, "seed": config.seed,
        "size": side, "interpolation": config.interpolation, "scale": layout.scale, "samples": of_samples,
    }  # fmt: skip
    return Sheet(path, facts, _told(asked, facts, config.views))


def _require_small(layout: Layout) -> None:
    """InputError for a sheet of more pixels than one can look at."""
    if (pixels := layout.size[0] * layout.size[1]) > _MOST:
        raise InputError(
            f"the sheet would have {pixels // 1_000_000} million pixels, more than {_MOST // 1_000_000} million: "
            "take fewer --samples or --views, or a smaller --size"
        )


def _place(out: str) -> Path:
    """Where to write the sheet; InputError where that is no file, or a file of another kind."""
    path = Path(out)
    if path.is_dir():
        raise InputError(f"--out {out} is a folder, not a file")
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {out}: the sheet is a PNG file, whose name ends in .png")
    if not path.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {path.parent}")
    if path.exists() and read_range(path, 0, len(_PNG), short=True) != _PNG:
        raise InputError(f"--out {out} is there already and is no PNG: give another name")
    return path


def _row(
    data: Dataset, renderer: Renderer, policy: Policy, config: ViewsConfig, sample: int
) -> tuple[NDArray[np.uint8], list[ViewParameters]]:
    """A sample as evaluation shows it and in all views, uint8 [1 + V, H, W, 3], and the parameters of the views."""
    one, just = range(sample, sample + 1), np.array([sample])
    unaugmented = evaluation_view(data.sizes[sample : sample + 1], data.in_memory)
    images = list(renderer.batches(unaugmented, [just], sample))
    drawn = [draw(policy, config.seed, view, one, data.sizes, sequence=config.sequence) for view in range(config.views)]
    for first in range(0, config.views, VIEWS_A_PAIRING):  # a file is decoded once for these
        some = drawn[first : first + VIEWS_A_PAIRING]
        images += [pixels for *_, pixels in renderer.views(some, [(just, range(len(some)))], sample)]
    return torch.cat(images).permute(0, 2, 3, 1).contiguous().numpy(), drawn


def _captions(data: Dataset, sample: int, views: Sequence[ViewParameters], size: Size) -> list[list[str]]:
    """What stands below the images of a row: the sample, and whose image it is mixed with."""
    lines = [[f"sample {sample}", _classes(data, sample)]]
    for one in views:
        if (mixing := one.mixing) is None:
            lines.append([])
        elif (partner := int(mixing.partners[0])) == sample:
            lines.append(["no partner"])
        else:
            own, theirs = _shares(mixing, size)
            lines.append([f"{own:.0%} + {theirs:.0%} of {partner}", _classes(data, partner)])
    return lines


def _classes(data: Dataset, sample: int) -> str:
    """The names of a sample's classes; empty for one without labels."""
    return ", ".join(data.class_names[label] for label in data.labels[sample].tolist())


def _shares(mixing: Mixing, size: Size) -> list[float]:
    """The shares of a sample and its partner in their mixed image of that height and width."""
    shares: list[float] = label_weights(mixing.drawn, *size)[0].tolist()
    return shares


def _facts(one: ViewParameters, size: Size) -> dict[str, Any]:
    """The parameters of a view of one sample, as numbers and lists."""
    found = _unmixed(one)
    if (mixing := one.mixing) is not None:
        theirs = one if mixing.theirs is None else mixing.theirs  # the only sample of the data is its own partner
        found["mixing"] = {
            "partner": int(mixing.partners[0]),
            **{name: rows[0].tolist() for name, rows in mixing.drawn.items()},
            "shares": _shares(mixing, size),
            "theirs": _unmixed(theirs),
        }
    return found


def _unmixed(one: ViewParameters) -> dict[str, Any]:
    drawn = {name: {what: rows[0].tolist() for what, rows in of.items()} for name, of in one.drawn.items()}
    return {"box": one.boxes[0].tolist(), "flip": bool(one.flips[0]), "drawn": drawn}


def _told(asked: str | None, facts: dict[str, Any], views: int) -> str:
    """The facts in two lines."""
    policy, scale = facts["policy"], facts["scale"]
    if asked is None:
        policy += f" (the default for {facts['data']})"
    elif asked != policy:
        policy += f" (given as {asked})"
    many = f"{_count(len(facts['samples']), 'sample')} of {facts['data']} in {_count(views, 'view')}"
    enlarged = f", enlarged {scale} times" if scale > 1 else ""
    return f"policy {policy}\n{facts['path']}: {many}, {facts['size']} pixels{enlarged}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)
