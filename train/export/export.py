"""`kdcache export`: a student as one file that runs without kdcache, checked on evaluation images."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache import __version__
from kdcache.cache.errors import InputError, KdcacheError, MismatchError, first_sentence
from kdcache.cache.files import read_plain, replace_file
from kdcache.pipeline.data.dataset import Dataset, open_data
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.teachers.weights import weights_hash
from kdcache.pipeline.trust import stored_data
from kdcache.pipeline.views.parameters import evaluation_view
from kdcache.pipeline.views.render import Renderer
from kdcache.train.evaluate import Trained, open_trained
from kdcache.train.export.config import ExportConfig
from kdcache.train.export.formats import FORMATS, INPUT, OUTPUT, Format, quietly
from kdcache.train.loop.runfolder import config_of

KIND = "kdcache export 1"
_BATCH = 64
_MOST_ABOUT_BYTES = 1 << 26
_TOLERANCE = 1e-3  # of the largest logit, or of 1 where that is less
# Settings of a run that tell nothing of the student but where things lay, or how the run was kept.
_PLACES = {"cache_path", "data", "evaluate_every", "ranks", "save_every", "student_weights", "teacher", "weights"}


@dataclass(frozen=True)
class Check:
    """The exported network beside the student itself, on images.

    images: how many. same_top1: for how many both have the same most probable class. max_logit_difference: over all
    images and classes. max_logit: the largest absolute logit of the student, for comparison. runtime: what ran it.
    """

    images: int
    same_top1: int
    max_logit_difference: float
    max_logit: float
    runtime: str


@dataclass(frozen=True)
class Exported:
    """file: the network. about: the JSON beside it, which tells how to prepare images for it. check: how it did."""

    file: Path
    about: Path
    check: Check

    def __str__(self) -> str:
        c = self.check
        top1 = "every top-1 equal" if c.same_top1 == c.images else f"{c.same_top1:,} top-1 equal (the others are ties)"
        return (
            f"{self.file}: on {c.images:,} images {top1}, logits at most {c.max_logit_difference:.1e} apart "
            f"(they go to {c.max_logit:.1f}), by {c.runtime}; {self.about.name} tells how to prepare images"
        )


def export(config: ExportConfig, say: Callable[[str], None] = print) -> Exported:
    """Export a student, check the file on evaluation images and put it and its JSON in place, or neither.

    InputError for a student that cannot be exported, MismatchError where the exported network answers otherwise.
    """
    kind = FORMATS[config.to]
    trained = open_trained(config.run, config.student, "export", say)
    out = Path(config.out) if config.out else trained.path.with_suffix(kind.suffix)
    about = out.with_name(f"{out.name}.json")
    _require_free(out, about, kind)
    model = trained.model.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    kind.require(model.network)
    data = open_data(config.data or stored_data(trained.notes["data"], trained.path), "eval", unlabelled=True)
    notes = described(trained, config.to, data)
    say(f"exporting {trained.notes['student']} to {config.to}")
    with tempfile.TemporaryDirectory(prefix="kdcache-export-") as folder:
        file = Path(folder) / f"student{kind.suffix}"
        run = _written(kind, model.network, trained, file, json.dumps(notes))
        check = _checked(run, model, data, config, trained, kind)
        content = file.read_bytes()
    beside = {**notes, "sha256": hashlib.sha256(content).hexdigest(), "check": vars(check)}
    replace_file(about, (json.dumps(beside, indent=2) + "\n").encode())
    replace_file(out, content)  # last: where the file is, all is there
    return Exported(out, about, check)


def _require_free(out: Path, about: Path, kind: Format) -> None:
    """InputError for a file of another kind, and unless there is nothing, or what was exported before."""
    if out.suffix != kind.suffix:
        raise InputError(f"--out {out}: the name has to end in {kind.suffix}")
    try:
        ours = json.loads(read_plain(about, _MOST_ABOUT_BYTES))["kind"] == KIND
    except (KdcacheError, ValueError, RecursionError, LookupError, TypeError):
        ours = False
    for path in (out, about):
        if os.path.lexists(path) and not ours:
            raise InputError(f"{path} exists, and kdcache export has not written it: give another --out")


def described(trained: Trained, to: str, data: Dataset) -> dict[str, Any]:
    """What the JSON beside an exported network tells, but for its check; see docs/students.md."""
    notes, size, classes = trained.notes, trained.notes["input_size"], trained.notes["classes"]
    return {
        "kind": KIND, "format": to, "network": notes["student"], "classes": classes,
        "class_names": list(trained.class_names),
        "input": {"name": INPUT, "dtype": "float32", "shape": ["batch", 3, size, size]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", classes]},
        "preprocessing": preprocessing(notes, data.in_memory),
        "data": notes["data"].partition(":")[0], "cache": notes["cache"], "metrics": notes.get("metrics"),
        "weights": weights_hash(trained.state), "settings": _settings(trained.path.parent),
        "kdcache": __version__, "torch": str(torch.__version__),
    }  # fmt: skip


def preprocessing(notes: dict[str, Any], in_memory: bool) -> dict[str, Any]:
    """How an image becomes the network's input, as kdcache does it in evaluation; by the names of timm's configs.

    in_memory: whether the images are of data that are held in memory, which are never cropped.
    """
    size = notes["input_size"]
    whole = "the whole image"
    square = "the central square, whose sides are 7/8 of the shorter side, rounded down"
    return {
        "input_size": [3, size, size],
        "crop_pct": 1.0 if in_memory else 0.875,
        "crop_mode": "squash" if in_memory else "center",
        "interpolation": notes.get("interpolation", "bilinear"),
        "antialias": True,
        "mean": notes["mean"],
        "std": notes["std"],
        "channels": "RGB",
        "steps": [
            f"take {whole if in_memory else square}",
            f"resize it to {size} x {size} pixels, bilinear and antialiased, in uint8",
            "divide by 255, subtract mean, divide by std, by channel; channels first, in the order RGB",
        ],
    }


def _settings(run: Path) -> dict[str, Any] | None:
    """What distinguishes the run, without places of the machine that it ran on; None for a file outside of a run."""
    if not (run / "config.json").exists():
        return None
    return {name: value for name, value in config_of(run).items() if name not in _PLACES}


def _written(kind: Format, network: nn.Module, trained: Trained, file: Path, notes: str) -> Callable[[Tensor], Tensor]:
    """Write the network into the file, and open that. InputError for a network that cannot be exported."""
    size = trained.notes["input_size"]
    images = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))
    try:
        with quietly(), torch.no_grad():
            kind.write(network, images, file, notes)
            run = kind.run(file)
            run(images[:1]), run(torch.cat([images, images[:1]]))  # a batch may have any size
    except (MemoryError, OSError, InputError):
        raise
    except Exception as e:  # exporters and runtimes raise anything
        other = next(name for name in FORMATS if FORMATS[name] is not kind)
        raise InputError(
            f"{trained.notes['student']} cannot be exported to {file.suffix.removeprefix('.')}: {first_sentence(e)}; "
            f"--to {other} may do"
        ) from e
    return run


def _checked(
    run: Callable[[Tensor], Tensor],
    model: Classifier,
    data: Dataset,
    config: ExportConfig,
    trained: Trained,
    kind: Format,
) -> Check:
    """Compare the exported network with the student. MismatchError if their logits differ by more than rounding."""
    same = count = 0
    apart = largest = 0.0
    mean, std = (np.array(trained.notes[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    for pixels in images_of(data, config, trained.notes["input_size"]):
        # By the formula of the JSON, not by the classifier's own.
        prepared = torch.from_numpy((pixels.numpy().astype(np.float32) / 255 - mean) / std).contiguous()
        with torch.inference_mode(), quietly():
            own, theirs = model(pixels), run(prepared)
        if theirs.shape != own.shape or not theirs.isfinite().all():
            raise MismatchError(f"the exported {trained.notes['student']} does not answer with finite logits [B, C]")
        same += int((own.argmax(1) == theirs.argmax(1)).sum())
        count += len(pixels)
        apart, largest = max(apart, float((own - theirs).abs().max())), max(largest, float(own.abs().max()))
    if apart > _TOLERANCE * max(1.0, largest):
        raise MismatchError(
            f"the exported {trained.notes['student']} answers with other logits, up to {apart:.2g} apart where they go "
            f"to {largest:.2g}: its network does what {config.to} cannot express; nothing was written"
        )
    return Check(count, same, apart, largest, kind.runtime())


def images_of(data: Dataset, config: ExportConfig, size: int) -> Iterator[Tensor]:
    """Yield batches of images uint8 [B, 3, S, S] as in evaluation; the first has one image, so that sizes differ."""
    samples = np.unique(np.linspace(0, len(data) - 1, min(config.images, len(data))).round().astype(np.int64))
    batches = [samples[:1], *np.split(samples[1:], range(_BATCH, len(samples) - 1, _BATCH))]
    renderer = Renderer(data, size, torch.device("cpu"), workers=config.workers)
    view = evaluation_view(data.sizes, whole=data.in_memory)
    with Progress("check", len(samples), "images") as progress:
        for images in renderer.batches(view, [batch for batch in batches if len(batch)]):
            yield images
            progress.advance(len(images))
    renderer.close()
