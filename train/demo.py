"""`kdcache demo`: the whole of kdcache on the embedded digits, in a few minutes on a laptop."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcache.cache.errors import InputError
from kdcache.cache.home import home_at
from kdcache.cache.store.cache import Cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.process.progress import duration, percent, size
from kdcache.train.config import TeachConfig, TrainConfig
from kdcache.train.run import train
from kdcache.train.teach import teach

TEACHER, STUDENT, LOSSES = "resnet20", "resnet8", ("ce", "kd", "nkd")
VIEWS, TEACHER_EPOCHS, STUDENT_EPOCHS = 10, 20, 20


def demo(
    out: str | None, say: Callable[[str], None] = print, show: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Teach, build and train with every loss; returns the figures that the last screen shows.

    out: an empty folder to keep everything in; None means a temporary one. show: takes the lines of the last screen, in
    place of `say`.
    """
    show = show or say
    if out is None:
        with tempfile.TemporaryDirectory(prefix="kdcache-demo-") as folder:
            return _demo(Path(folder), say, show)
    Path(out).mkdir(parents=True, exist_ok=True)
    if any(Path(out).iterdir()):
        raise InputError(f"{out} is not empty: give another --out")
    return _demo(Path(out), say, show)


def _demo(folder: Path, say: Callable[[str], None], show: Callable[[str], None]) -> dict[str, Any]:
    # The demo's own home: it starts from nothing and leaves the user's caches alone.
    with home_at(folder / "home"):
        return _run(folder, say, show)


def _run(folder: Path, say: Callable[[str], None], show: Callable[[str], None]) -> dict[str, Any]:
    say(f"1. teach a {TEACHER} on digits (8x8 pixels, embedded)")
    started = time.monotonic()
    _, top1 = teach(TeachConfig(TEACHER, epochs=TEACHER_EPOCHS), _indented(say))
    teaching = time.monotonic() - started
    say("2. build the cache: the teacher runs once over every view")
    built = build(BuildConfig(TEACHER, views=VIEWS), _indented(say))
    say(f"3. train {STUDENT} from the cache: no teacher in the loop")
    runs = {
        loss: train(
            TrainConfig(
                loss, cache=str(built.path), student=STUDENT, epochs=STUDENT_EPOCHS, out=str(folder / "runs" / loss)
            ),
            _indented(say),
        )
        for loss in LOSSES
    }
    records = Cache(built.path).train.samples * built.views
    show("")
    show(f"{'':18}{'top-1':>8}{'nll':>8}{'time an epoch':>16}")
    show(f"{'teacher ' + TEACHER:18}{percent(top1):>8}{'':8}{teaching / TEACHER_EPOCHS:14.2f} s")
    for loss, run in runs.items():
        line = f"{'student, ' + loss:18}{percent(run['top1']):>8}{run['nll']:8.3f}{run['seconds_an_epoch']:14.2f} s"
        show(line)
    show("")
    show(f"teach: {duration(teaching)}; build: {duration(built.seconds)} for {records:,} records, {size(built.bytes)}")
    show(f"train: {duration(sum(r['seconds'] for r in runs.values()))} for {len(runs)} students")
    show(f"one seed; {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    say("")
    say("next, with images of your own in FOLDER/CLASS/*.jpg:")
    for step in ("teach --teacher resnet34", "build --teacher resnet34", "train --loss nkd"):
        say(f"  kdcache {step} --data imagefolder:FOLDER")
    return {"teacher_top1": top1, "teach_seconds": teaching, "build": vars(built), "runs": runs}


def _indented(say: Callable[[str], None]) -> Callable[[str], None]:
    return lambda text: say(type(text)(f"   {text}"))
