"""A run's folder: its settings, its lines of metrics, its weights, and the state from which it goes on."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from kdcache.cache.errors import CorruptError, InputError, NotFoundError
from kdcache.cache.files import replace_file
from kdcache.pipeline.teachers.teacher import Classifier, file_classifier
from kdcache.pipeline.views.render import RENDERER
from kdcache.train.losses.options import LOSSES

ANEW = "remove it to start the run again"

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


def read_config(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise NotFoundError(f"{path} is no run folder: it has no config.json") from None
    except ValueError as e:  # also where it is no text
        raise CorruptError(f"{file} is not valid JSON ({e}): give another --out") from e
    if not isinstance(config, dict):
        raise CorruptError(f"{file} is not what kdcache writes: give another --out")
    return config


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
            replace_file(file, _json(config))  # it ended before its first whole epoch: nothing to keep
        elif resume:
            raise InputError(f"{path} holds no run to resume: leave --resume out to start one")
        elif path.exists() and any(path.iterdir()):
            raise InputError(f"{path} is not empty and is no run: give another --out")
        else:
            replace_file(file, _json(config))

    def _require_same(self, config: dict[str, Any]) -> None:
        raw, had, wanted = read_config(self.path), config_of(self.path), json.loads(_json(config))
        names = [k for k in {**raw, **wanted} if had.get(k) != wanted.get(k) and k not in FREE]
        if names:
            found = "; ".join(f"{k}: the run has {had.get(k)}, asked for {wanted.get(k)}" for k in names)
            raise InputError(f"{self.path} is another run and is not resumed: {found}")

    def load_state(self) -> dict[str, Any] | None:
        """The state that save_state kept last, or None if there is none. CorruptError if it cannot be read."""
        file = self.path / "state.pt"
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as e:  # bytes that are no pickle raise whatever comes first
            raise CorruptError(f"{file} cannot be read ({type(e).__name__}): {ANEW}") from e
        if not isinstance(state, dict) or state.keys() != {"history", "training"}:
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
        replace_file(self.path / "state.pt", content.getvalue())

    def finish(self, summary: dict[str, Any]) -> None:
        replace_file(self.path / "summary.json", _json(summary))

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None before that."""
        file = self.path / "summary.json"
        if not file.exists():
            return None
        try:
            summary = json.loads(file.read_text())
        except ValueError:  # also where it is no text
            summary = None
        if not isinstance(summary, dict):
            raise CorruptError(f"{file} is not what kdcache writes: remove it, and --resume writes it again")
        return summary


def best_of(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line with the best top-1 on the validation part, of equal ones the last; None without such a part."""
    lines = [line for line in history if "validation_top1" in line]
    return max(reversed(lines), key=lambda line: float(line["validation_top1"]), default=None)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
