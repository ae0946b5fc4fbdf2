"""Parsers of runs, weights and sweeps: config.json, state.pt, safetensors, lines, summaries, checkpoints."""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damages import JSON, LINES
from forgeries import SAFETENSORS, SEALED, ZIP, resaved

from kdcache.cache.identity import TeacherIdentity
from kdcache.cache.sealed import sealed
from kdcache.pipeline.teachers.checkpoints import open_checkpoint
from kdcache.pipeline.teachers.networks import build_network, load_fitting
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.pipeline.teachers.weights import notes_of, saved, weights_hash
from kdcache.pipeline.teachers.weightstore import find_weights
from kdcache.pipeline.views.render import RENDERER
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import open_trained
from kdcache.train.loop.logs.services import Service
from kdcache.train.loop.runfolder import RunFolder, config_of
from kdcache.train.plan.resuming import resumed
from kdcache.train.report.facts.groups import runs_facts
from kdcache.train.report.facts.runs import runs_in
from kdcache.train.sweep import asked_before
from parsers.parser import Parser, Prepared, contents, in_place, quiet

_SETTINGS = {
    "cache": "c" * 64, "cache_path": "/nowhere/c", "data": "digits", "student": "resnet8", "loss": "kd",
    "loss_options": {"temperature": 4.0, "alpha": 0.9}, "epochs": 2, "batch_size": 64, "lr": 0.1,
    "weight_decay": 0.0005,
    "momentum": 0.9, "warmup": 0, "seed": 3, "views": None, "image_size": 8, "crops_per_decode": 1, "online": False,
    "fresh_views": False, "amp": None, "optimiser": "sgd", "sgd_lr": None, "sgd_weight_decay": None, "accumulate": 1,
    "clip": None, "ema": None, "compile": False, "renderer": RENDERER, "ranks": 1, "sync_bn": False,
    "validation": None, "teacher": None, "save_every": 1, "weights": None, "evaluate_every": 1,
    "student_weights": None, "log": None,
}  # fmt: skip
_NOTES = {
    "student": "resnet8", "classes": 10, "input_size": 8, "mean": [0.3] * 3, "std": [0.4] * 3,
    "class_names": list("0123456789"), "class_ids": list(range(10)), "data": "digits", "evaluation": "e" * 64,
    "full_contents": False, "cache": "c" * 64, "cache_path": "/nowhere/c", "beside_teacher": False,
}  # fmt: skip
_HISTORY = [
    {"epoch": e, "loss": 2.0 / e, "seconds": 1.5, "top1": 0.5 * e / 2, "nll": 1.0, "ece": 0.1, "agreement": 0.4}
    for e in (1, 2)
]


def run_folder(path: Path) -> RunFolder:
    """A finished run as training leaves it, with weights that nothing has trained."""
    torch.manual_seed(0)
    run = RunFolder(path, {**_SETTINGS, "loss": path.name.partition("-")[0]}, False)
    model = Classifier(build_network("resnet8", 10, 8), (0.3,) * 3, (0.4,) * 3)
    run.save_weights(model, dict(_NOTES), _HISTORY, "")
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    training = {
        "model": {"a": torch.randn(3, 2)},
        "optimiser": optimiser.state_dict(),
        "epoch": 2,
        "rng": torch.get_rng_state(),
    }
    run.save_state([dict(line) for line in _HISTORY], training)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _HISTORY))
    run.finish(
        {
            **{k: v for k, v in _HISTORY[-1].items() if k != "epoch"},
            "epochs": 2,
            "seconds_an_epoch": 1.5,
            "run": str(path),
        }
    )
    return run


def _sweep_folder(top: Path) -> tuple[Path, Path]:
    """The folders of a sweep and of its first run."""
    runs: list[dict[str, Any]] = []
    for name in ("kd-seed3", "ce-seed3"):
        (top / "sweep").mkdir(exist_ok=True)
        summary = run_folder(top / "sweep" / name).read_summary()
        runs.append({"loss": name[:2], "seed": 3, "run": str(top / "sweep" / name), "summary": summary})
    runs.append({"loss": "nkd", "seed": 3, "run": str(top / "sweep" / "nkd-seed3"), "error": "out of memory"})
    compared = [{"loss": "kd", "seeds": 1, "failed": 0, "figures": {"top1": {"mean": 0.5, "spread": None}}}]
    sweep = {"cache": "c" * 64, "asked": [["kd", "ce", "nkd"], [3]], "runs": runs, "losses": compared}
    (top / "sweep" / "sweep.json").write_bytes(sealed(sweep))
    return top / "sweep", top / "sweep" / "kd-seed3"


def _is_sealed(name: str, content: bytes) -> bool:
    return b'"sha256"' in content


def _texts(top: Path) -> Prepared:
    """All that a report and a resumed run read as text in a sweep's folder."""
    sweep, run = _sweep_folder(top)
    (run / "wandb.json").write_bytes(sealed({"run": "abc", "epoch": 2}))
    files = {
        "config.json": run / "config.json",
        "summary.json": run / "summary.json",
        "sweep.json": sweep / "sweep.json",
    }
    files |= {"wandb.json": run / "wandb.json"}

    def read() -> Any:
        had = config_of(run)
        config = resumed(TrainConfig(out=str(run), resume=True), had, {"out", "resume"}, run, quiet)
        RunFolder(run, had, True).read_summary()
        logged = _Service(run, [], quiet)
        found = runs_in(sweep)
        facts = runs_facts(found, 0, {}, quiet)
        return had, config, facts, [one.state for one in found], asked_before(str(sweep)), logged.state, logged.run

    return Prepared(contents(files), in_place(files, read), SEALED, _is_sealed)


class _Service(Service):
    name, file = "wandb", "wandb.json"


def _lines(top: Path) -> Prepared:
    """metrics.jsonl of a run that has ended and of one that has not."""
    sweep, run = _sweep_folder(top)
    other = sweep / "ce-seed3"
    (other / "summary.json").unlink()
    files = {"finished": run / "metrics.jsonl", "under way": other / "metrics.jsonl"}

    def read() -> Any:
        found = runs_in(sweep)
        return runs_facts(found, 0, {}, quiet), [one.lines for one in found], [one.state for one in found]

    return Prepared(contents(files), in_place(files, read), LINES, lambda name, content: name == "finished")


def _state(top: Path) -> Prepared:
    """state.pt as it is written, and without a checksum as earlier versions wrote it."""
    run = run_folder(top / "kd-seed3")
    sound = (run.path / "state.pt").read_bytes()
    plain = io.BytesIO()
    torch.save(run.load_state(), plain)

    def read(name: str, content: bytes) -> Any:
        (run.path / "state.pt").write_bytes(content)
        kept = io.BytesIO()
        torch.save(run.load_state(), kept)
        return kept.getvalue()

    seeds = {"sealed": sound, "before": plain.getvalue()}
    return Prepared(seeds, read, ZIP, lambda name, content: name == "sealed" and content.endswith(sound[-64:]))


def _student(top: Path) -> Prepared:
    """A student's file of weights, up to the network that it is for."""
    run = run_folder(top / "kd-seed3")
    files = {"last": run.path / "last.safetensors"}
    state = open_checkpoint(files["last"]).tensors

    def read() -> Any:
        trained = open_trained(str(run.path), say=quiet)
        return weights_hash(trained.state), json.dumps(trained.notes, sort_keys=True, default=str), trained.class_names

    forged = resaved(lambda notes: saved(state, notes))
    return Prepared(contents(files), in_place(files, read), (*SAFETENSORS, *[forged] * 20), _has_checksums)


def _has_checksums(name: str, content: bytes) -> bool:
    return b'"weights_sha256"' in content and b'"notes_sha256"' in content


def _filed(top: Path) -> Prepared:
    """A teacher that was filed by its hash, as push, verify and build look for it."""
    os.environ["KDCACHE_HOME"] = str(top)
    network = build_network("resnet8", 10, 8)
    state = network.state_dict()
    notes = {"architecture": "resnet8", "mean": [0.3] * 3, "std": [0.4] * 3, "input_size": 8, "class_names": list("ab")}
    weights = weights_hash(state)
    (top / "teachers").mkdir()
    files = {"filed": top / "teachers" / f"{weights}.safetensors"}
    files["filed"].write_bytes(saved(state, notes))
    identity = TeacherIdentity(
        architecture="resnet8", weights=weights, mean=(0.3,) * 3, std=(0.4,) * 3, input_size=8, numeric="float32"
    )

    def read() -> Any:
        path = find_weights(identity, [], quiet)
        assert path is not None
        checkpoint = open_checkpoint(path)
        return weights_hash(checkpoint.tensors), notes_of(checkpoint)

    return Prepared(contents(files), in_place(files, read), SAFETENSORS, lambda name, content: True)


def _checkpoints(top: Path) -> Prepared:
    """Files as people save them: state dicts, dictionaries around them, torch's old format, a program, NumPy's."""
    torch.manual_seed(0)
    small = torch.nn.Sequential(OrderedDict(conv1=torch.nn.Conv2d(3, 4, 3), fc=torch.nn.Linear(4, 2)))
    state = small.state_dict()
    lightning = {
        "epoch": 3, "state_dict": {f"model.{k}": v for k, v in state.items()}, "lr_schedulers": [{"last": 1.0}],
        "hyper_parameters": {"lr": 0.1, "names": ["a", "b"]},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
    }  # fmt: skip
    averaged = {"model": state, "model_ema": {"module": state}, "epoch": 7, "scale": np.float64(2.0)}

    def written(value: object, **how: Any) -> bytes:
        content = io.BytesIO()
        torch.save(value, content, **how)
        return content.getvalue()

    numpy, script = io.BytesIO(), io.BytesIO()
    np.savez(numpy, **{k: v.numpy() for k, v in state.items()})
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), script)
    seeds = {
        "s.pth": written(state), "l.ckpt": written(lightning), "e.pt": written(averaged), "n.npz": numpy.getvalue(),
        "old.pth": written(state, _use_new_zipfile_serialization=False), "script.pt": script.getvalue(),
        "s.safetensors": saved(state, {})[: 10**6],
    }  # fmt: skip
    names = list(state)

    def read(name: str, content: bytes) -> Any:
        (top / name).write_bytes(content)
        if name in ("n.npz", "script.pt"):  # never read, and so refused also where they are sound
            return _refused(partial(open_checkpoint, top / name))
        checkpoint = open_checkpoint(top / name)
        part = checkpoint.find(names) or checkpoint.unwrapped()
        network = torch.nn.Sequential(OrderedDict(conv1=torch.nn.Conv2d(3, 4, 3), fc=torch.nn.Linear(4, 2)))
        load_fitting(network, part.state, f"the weights in {top / name}")
        return weights_hash(network.state_dict()), str(part)

    return Prepared(seeds, read, (*ZIP, *SAFETENSORS[-12:]))


def _refused(read: Any) -> str:
    from kdcache.cache import KdcacheError

    try:
        read()
    except KdcacheError:
        return "refused"
    return "read"


def _timm_config(top: Path) -> Prepared:
    """The config.json that timm saves beside weights."""
    from kdcache.pipeline.teachers.sources import timm

    config = {
        "architecture": "resnet18", "num_classes": 10, "label_names": ["a", "b"],
        "pretrained_cfg": {
            "input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9,
            "num_classes": 10, "tag": "a1",
        },
    }  # fmt: skip
    files = {"config.json": top / "config.json"}
    files["config.json"].write_text(json.dumps(config))

    def read() -> Any:
        cfg, names, origin = timm.config_of("timm/resnet18", top / "model.safetensors")
        return timm.pixels_of(cfg, "timm/resnet18"), names, origin

    return Prepared(contents(files), in_place(files, read), JSON)


PARSERS = (
    Parser("run folders' JSON", 40, _texts),
    Parser("metrics.jsonl", 20, _lines),
    Parser("state.pt", 40, _state),
    Parser("a student's safetensors", 8, _student),
    Parser("filed teachers", 15, _filed),
    Parser("checkpoints", 60, _checkpoints),
    Parser("timm's config.json", 15, _timm_config, slow=True),
)
