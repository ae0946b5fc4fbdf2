"""A toy dataset and toy teachers for builds that take no time, here and in processes that may be killed."""

import json
import os
import subprocess
import sys

from kdcache.pipeline.build.answers import answers, teacher_renderer, view_parameters
from kdcache.pipeline.build.config import BuildConfig
from kdcache.tests.helpers import warm

# 150 images in parts of 64, 64 and 22; batches of 16, the last of each split short.
TOY = """
import numpy as np, torch
from torch import nn

def images(split):
    rng = np.random.default_rng(split == "train")
    labels = np.arange(150 if split == "train" else 40) * 5 % 12
    patterns = np.random.default_rng(2).integers(0, 256, (12, 10, 10, 3))
    noisy = patterns[labels] + rng.normal(0, 60, (len(labels), 10, 10, 3))
    return np.clip(noisy, 0, 255).astype("u1"), labels, tuple("abcdefghijkl")

def first(count):
    def few(split):
        pixels, labels, names = images(split)
        return (pixels[:count], labels[:count], names) if split == "train" else (pixels, labels, names)
    return few

one, pair, three, seven = first(1), first(2), first(3), first(7)

def net(classes, width=8, stride=2, side=3):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = nn.Sequential(
            nn.Conv2d(3, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(16 * side * side, classes))
        with torch.no_grad():
            found[-1].weight.mul_(8)
        return found

def two():
    return net(2)

def twelve():
    return net(12)

def thousand():
    return net(1000, 4, 8, 2)

def forty():
    return net(40)

def probabilities():
    return nn.Sequential(net(12), nn.Softmax(1))

def constant():
    found = net(12)
    nn.init.zeros_(found[-1].weight)
    return found

def huge():
    found = net(12)
    with torch.no_grad():
        found[-1].weight.mul_(1e5)
    return found

class Careless(nn.Sequential):
    def forward(self, images):
        self[8].train()
        return super().forward(images)

def careless():
    return Careless(*list(net(12))[:-1], nn.Dropout(0.1), net(12)[-1])
"""


# What makes a build one of format 2: of images in memory, and of files, whose views are cut together.
MIXED = {"augment": "crop,flip,gray(0.2),erase(0.25),mixup(0.2),cutmix(1)", "sequence": "spread"}
MIXED_FILES = {"augment": "rrc,flip,gray(0.2),mixup(0.2),cutmix(1)", "sequence": "spread", "teacher_size": 32}

BATCH = 16
PART = 64
PARTS = 3


def settings(**changes):
    return BuildConfig(
        **{
            "teacher": "kd_toy:net",
            "data": "kd_toy:images",
            "augment": "crop,flip",
            "views": 2,
            "topk": 4,
            "temperatures": (1.0, 4.0),
            "batch_size": BATCH,
            "allow_low_accuracy": True,
            "device": "cpu",
            "part": PART,
            **changes,
        }
    )


def quiet(_):
    pass


def of_files(photos, out, **changes):
    """Three views of image files, cut together, in parts of 10, 10 and 4 samples; a part's last batch is short."""
    usual = {
        "teacher": "kd_toy:thousand", "data": f"imagefolder:{photos}", "augment": "rrc,flip", "views": 3, "topk": 3,
        "batch_size": 4, "class_map": str(photos / "map.csv"), "part": 10, "workers": 0, "out": str(out),
    }  # fmt: skip
    return settings(**{**usual, **changes})


def content(path):
    """Every file's bytes, and of commits all but who wrote them; nothing is left of builders.

    But for the temporary files of those that died before they were known: they wait for a minute to pass.
    """
    found = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and not (name.startswith(("leases/.", "scratch/.")) and name.endswith(".tmp")):
            found[name] = file.read_bytes()
            if "commits/" in name:
                about = json.loads(found[name])
                assert set(about.pop("writer")) >= {"host", "torch", "time"}
                found[name] = about
    return found


def spooled(tmp_path):
    return [p for p in (tmp_path / "home" / "spool").rglob("*") if p.is_file() and p.name != "lock"]


def equal(a, b):
    fields = ("classes", "gaps", "target_gap", "tail", "labels", "prior")
    pairs = [(getattr(a, f), getattr(b, f)) for f in fields]
    return all((x is None and y is None) or x.equal(y) for x, y in pairs)


DRIVER = """
import json, os, random, shutil, signal, sys, time, warnings
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork")
import torch
torch.set_num_threads(1)
from pathlib import Path
from kdcache.cache.store.publish import SplitStore
from kdcache.pipeline.build import build as module
from kdcache.pipeline.build import builder, spool
from kdcache.pipeline.teachers.teacher import Teacher
spool.SPOOL_SECONDS = 0.0
builder._POLL_SECONDS = 0.01
quiet = lambda line: None
config = module.BuildConfig(**json.loads(sys.argv[1]) | {"temperatures": (1.0, 4.0)})
source = module.open_source(config, quiet)

def in_child(work):
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def run(path, facts=None):
    from dataclasses import replace
    result = module.build(replace(config, out=str(path)), quiet, source)
    if facts:
        facts.write_text(json.dumps(result.teacher_images))

def killed_at(event, by=signal.SIGKILL):
    # Every step that leaves a trace, and every answer of the teacher, is a moment to die.
    left = [event]
    def counting(function):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                left[0] = 10**9
                os.kill(os.getpid(), by)
            return function(*args, **kwargs)
        return counted
    # What is killed is not the machine: nothing has to reach the disk, which takes most of the time.
    os.fsync, os.link, os.replace = counting(lambda fd: None), counting(os.link), counting(os.replace)
    os.mkdir, os.unlink, Teacher.logits = counting(os.mkdir), counting(os.unlink), counting(Teacher.logits)
    return left
"""


def start_build(toy, script, *arguments, **env):
    return warm.Popen(
        [sys.executable, "-W", "error", "-c", DRIVER + script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(toy), **{k: str(v) for k, v in env.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended_well(process):
    out, err = process.communicate(timeout=200)
    print(err)  # for whoever sees a later assertion fail
    assert process.returncode == 0, err
    return out


def as_json(config):
    return json.dumps(vars(config))


def record_batches(source, split, view, rows, batch):
    """The live teacher's records and logits [B, C] for rows of a view, in the batches that a build takes.

    `split`: "train" or "eval"; `rows` starts on a batch boundary of its shard.
    """
    train = split == "train"
    data, labels = (source.train, source.train_labels) if train else (source.evaluation, source.evaluation_labels)
    parameters = view_parameters(data, source.identity, view, rows)
    renderer = teacher_renderer(data, source, workers=0)
    for answer in answers(source, renderer, labels, [parameters], [rows.start], rows, batch):
        yield answer.records, answer.logits
