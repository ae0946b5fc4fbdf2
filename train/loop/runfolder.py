"""A run's folder: its settings, its lines of metrics, its weights, and the state from which it goes on."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic import BaseModel, ConfigDict

from kdcache.cache.errors import CorruptError, InputError, NotFoundError
from kdcache.cache.files import read_plain, replace_file, sha256
from kdcache.cache.identity import first_problem
from kdcache.cache.sealed import inflates, read_sealed, seal_holds, sealed, sealed_zip
from kdcache.pipeline.teachers.teacher import Classifier, file_classifier
from kdcache.pipeline.views.render import RENDERER
from kdcache.train.losses.options import LOSSES

ANEW = "remove it to start the run again"
_OTHER_OUT = "give another --out"
METRICS, METRICS_SEAL = "metrics.jsonl", "metrics_sha256"
_MOST_LINES_BYTES = 1 << 30

# The values that settings had before they existed: a run whose config.json lacks one was made with this value.
_BEFORE: dict[str, Any] = {
    "accumulate": 1, "amp": None, "clip": None, "compile": False, "crops_per_decode": 1, "ema": None,
    "fresh_views": False, "log": None, "optimiser": "sgd", "renderer": RENDERER, "sgd_lr": None,
    "sgd_weight_decay": None, "stream": "views", "student_weights": None, "sync_bn": False, "validation": None,
}  # fmt: skip
# What may differ when a run is resumed: where things lie (the cache's key says what it and the data are), how many
# ranks share a batch, where it is logged, and how often the student is evaluated and the state is kept.
FREE = {"cache_path", "data", "evaluate_every", "log", "ranks", "save_every", "teacher", "weights"}


def config_of(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder. Those that its version did not have yet are at what held then."""
    config = {**_BEFORE, **read_config(path)}
    if isinstance(config.get("loss_options"), dict):
        loss = LOSSES.get(str(config.get("loss")))
        config["loss_options"] = {**(loss.options_before() if loss else {}), **config["loss_options"]}
    return config


class _Config(BaseModel):
    """What the settings must be where a run has them; there are more."""

    model_config = ConfigDict(extra="allow", strict=True)
    loss: str | None = None
    loss_options: dict[str, Any] = {}
    student: str | None = None
    teacher: str | None = None
    cache: str | None = None
    cache_path: str | None = None
    data: str | None = None
    seed: int = 0
    epochs: int = 1
    batch_size: int = 1
    lr: float = 0.0
    views: int | None = None
    image_size: int | None = None


def read_config(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder. CorruptError where they are not those that were written."""
    file = path / "config.json"
    try:
        config = read_sealed(file, _OTHER_OUT)
        _Config.model_validate(config)
    except NotFoundError:
        raise NotFoundError(f"{path} is no run folder: it has no config.json") from None
    except pydantic.ValidationError as e:
        raise CorruptError(f"{file} is not what kdcache writes ({first_problem(e)}): {_OTHER_OUT}") from e
    return config


def read_lines(path: Path, summary: dict[str, Any] | None) -> bytes:
    """The content of metrics.jsonl in a run's folder; b"" where there is none.

    CorruptError where it is not what a finished run's `summary`, as `summary_of` gives it, was written with.
    """
    file = path / METRICS
    content = read_plain(file, _MOST_LINES_BYTES) if os.path.lexists(file) else b""
    had = (summary or {}).get(METRICS_SEAL)
    if had is not None and had != sha256(content):
        raise CorruptError(f"{file} is not what was written, by the checksum in summary.json: leave this run out")
    return content


def summary_of(path: Path, advice: str) -> dict[str, Any] | None:
    """What summary.json of a run's folder holds, with the checksum of metrics.jsonl; None before the run is finished.

    CorruptError where it is not what was written, which ends with `advice`.
    """
    file = path / "summary.json"
    return read_sealed(file, advice) if os.path.lexists(file) else None


def goes_on(path: Path, resume: bool) -> bool:
    """Whether a run that is resumed has a state to go on with, so that what it started from is not needed again."""
    return resume and (path / "state.pt").exists()


class RunFolder:
    """config.json, metrics.jsonl, summary.json, the last weights, TensorBoard events, and the state to resume.

    Also the best weights, where a part of the training images was held out to choose them by. Where the teacher learns
    too, its weights are teacher-last and teacher-best.
    """

    def __init__(self, path: Path, config: dict[str, Any], resume: bool) -> None:
        self.path = path
        file = path / "config.json"
        if path.exists() and not os.access(path, os.W_OK):  # before TensorBoard's thread meets it
            raise InputError(f"{path} cannot be written: give another --out")
        if any((path / name).exists() for name in ("metrics.jsonl", "state.pt", "summary.json")):
            if not resume:
                raise InputError(f"{path} holds a run already: give --resume to go on with it, or another --out")
            self._require_same(config)
        elif file.exists():
            replace_file(file, sealed(config, sort=True))  # it ended before its first whole epoch: nothing to keep
        elif resume:
            raise InputError(f"{path} holds no run to resume: leave --resume out to start one")
        elif path.exists() and any(path.iterdir()):
            raise InputError(f"{path} is not empty and is no run: give another --out")
        else:
            replace_file(file, sealed(config, sort=True))

    def _require_same(self, config: dict[str, Any]) -> None:
        raw, had, wanted = read_config(self.path), config_of(self.path), json.loads(json.dumps(config))
        names = [k for k in {**raw, **wanted} if had.get(k) != wanted.get(k) and k not in FREE]
        if names:
            found = "; ".join(f"{k}: the run has {had.get(k)}, asked for {wanted.get(k)}" for k in names)
            raise InputError(f"{self.path} is another run and is not resumed: {found}")

    def load_state(self, say: Callable[[str], None] = lambda line: None) -> dict[str, Any] | None:
        """The state that save_state kept last, or None if there is none. CorruptError if it is not what was kept.

        `say` gets a note where it has no checksum, as those of earlier versions.
        """
        file = self.path / "state.pt"
        if not os.path.lexists(file):
            return None
        content = read_plain(file)
        if (holds := seal_holds(content)) is False:
            raise CorruptError(f"{file} is damaged, by the checksum in it: {ANEW}")
        if holds is None:
            say(
                f"note: {file} has no checksum, since an earlier version wrote it: only a part of what could have been "
                "damaged in it would be found"
            )
        try:
            if inflates(content):
                raise CorruptError(f"{file} is compressed, as none of kdcache's is: {ANEW}")
            if (damaged := zipfile.ZipFile(io.BytesIO(content)).testzip()) is not None:
                raise CorruptError(f"{file} is damaged, in {damaged}: {ANEW}")
            state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except CorruptError:
            raise
        except Exception as e:  # bytes that are no pickle raise whatever comes first
            raise CorruptError(f"{file} cannot be read ({type(e).__name__}): {ANEW}") from e
        if not isinstance(state, dict) or state.keys() != {"history", "training"} or not _are_lines(state["history"]):
            raise CorruptError(f"{file} is not what this kdcache writes: {ANEW}")
        return state

    def save_weights(self, model: Classifier, notes: dict[str, Any], history: list[dict[str, Any]], of: str) -> None:
        """The last weights, and the best where the history's last line is; `of` stands before the files' names.

        Best on the part that was held out for it; without one there are none, for the evaluation split is reported.
        """
        notes = {**notes, "metrics": history[-1]}
        file_classifier(self.path / f"{of}last.safetensors", model, notes)
        if best_of(history) is history[-1]:
            file_classifier(self.path / f"{of}best.safetensors", model, notes)

    def save_state(self, history: list[dict[str, Any]], training: dict[str, Any]) -> None:
        """After the weights and metrics of a whole epoch, so that a kill in between repeats only its end."""
        content = io.BytesIO()
        torch.save({"history": history, "training": training}, content)
        replace_file(self.path / "state.pt", sealed_zip(content.getvalue()))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary of a finished run, with the checksums of itself and of metrics.jsonl."""
        replace_file(
            self.path / "summary.json",
            sealed({**summary, METRICS_SEAL: sha256(read_lines(self.path, None))}, sort=True),
        )

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, as `finish` was given it; None before that."""
        summary = summary_of(self.path, "remove it, and --resume writes it again")
        if summary is not None:
            summary.pop(METRICS_SEAL, None)
        return summary


def best_of(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line with the best top-1 on the validation part, of equal ones the last; None without such a part."""
    lines = [line for line in history if "validation_top1" in line]
    return max(reversed(lines), key=lambda line: float(line["validation_top1"]), default=None)


def _are_lines(history: object) -> bool:
    return isinstance(history, list) and all(isinstance(x, dict) and isinstance(x.get("epoch"), int) for x in history)
