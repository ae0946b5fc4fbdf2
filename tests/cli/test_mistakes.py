"""What is mistyped in one option is one clear line with exit status 2, and nothing is written or lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdcache.tests.helpers.commands import Place

# What can be wrong with one option alone: the command line, and what the message must say.

BUILD = "build --teacher resnet8 --data imagefolder:{pics}"
TRAIN = "train --data imagefolder:{pics} --student resnet8 --epochs 1 --batch-size 32"
MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such command": ("biuld", ("'biuld'",)),
    "no such option": (f"{BUILD} --viws 3", ("--viws", "--views")),
    "no teacher": ("build --data imagefolder:{pics}", ("--teacher resnet34",)),
    "a name without its option": ("build resnet8 --data imagefolder:{pics}", ("'resnet8'", "kdcache build --help")),
    "no kind of file to pack into": ("pack {cache}", ("'--to'", "hdf5, ffcv")),
    "no kind of logits to import": ("import", ("tinyvit, fkd",)),
    "unpack of nothing": ("unpack {root}/nowhere.h5", ("there is no {root}/nowhere.h5",)),
    "unknown teacher": ("build --teacher resnt8 --data imagefolder:{pics}", ("'resnt8'", "mean resnet8, ")),
    "unknown teacher to teach": ("teach --teacher wrn_16_3 --data imagefolder:{pics}", ("mean wrn_16_2, ",)),
    "unknown digits teacher": ("build --teacher resnt8", ("mean resnet8, ",)),
    "untaught teacher": ("build --teacher resnet14 --data imagefolder:{pics}", ("kdcache teach", "--weights")),
    "taught already": ("teach --teacher resnet8 --data imagefolder:{pics}", ("{weights}", "--force")),
    "teacher that needs larger images": ("teach --teacher alexnet --data imagefolder:{pics}", ("16x16 pixels",)),
    "teacher's function is not there": ("build --teacher nowhere:net --data imagefolder:{pics}", ("'nowhere'",)),
    "weights missing": (f"{BUILD} --weights {{root}}/nowhere.pt", ("no weights file at {root}/nowhere.pt",)),
    "weights are a folder": (f"{BUILD} --weights {{pics}}", ("{pics} is a folder",)),
    "weights of another network": (
        "build --teacher resnet20 --data imagefolder:{pics} --weights {weights}",
        ("{weights}", "resnet20", "60 missing (stages.0.1.body.0.0.weight, "),
    ),
    "torchvision weights unknown": (
        "build --teacher resnet18 --data imagefolder:{pics} --weights IMAGENET1K_V9",
        ("IMAGENET1K_V9", "IMAGENET1K_V1"),
    ),
    "data missing": ("build --teacher resnet8 --data imagefolder:{root}/nowhere", ("{root}/nowhere: no such folder",)),
    "data without a path": ("build --teacher resnet8 --data imagefolder", ("imagefolder:PATH",)),
    "data a path alone": ("build --teacher resnet8 --data {pics}", ("imagefolder:{pics}",)),
    "data unknown": ("build --teacher resnet8 --data cifar", ("'cifar'", "cifar100")),
    "data of a module that is not there": ("teach --teacher resnet8 --data nowhere:images", ("'nowhere'",)),
    "topk above the classes": (f"{BUILD} --topk 5", ("--topk 5", "4 classes")),
    "topk above the digits": ("build --teacher resnet8 --topk 11", ("--topk 11", "10 classes")),  # not taught first
    "no topk": (f"{BUILD} --topk 0", ("--topk",)),
    "temperatures in words": (f"{BUILD} --temperatures 1,two", ("'1,two'", "1,2,4")),
    "temperature zero": (f"{BUILD} --temperatures 0", ("between 0 and 1000",)),
    "temperature nan": (f"{BUILD} --temperatures nan", ("between 0 and 1000",)),
    "unknown operation": (
        f"{BUILD} --augment crop,flop",
        ("'crop,flop'", "did you mean flip?", "kdcache views --list"),
    ),
    "argument out of range": (f"{BUILD} --augment crop,flip(2)", ("'crop,flip(2)'", "not from 0 to 1")),
    "spread backwards": (f"{BUILD} --sequence even", ("--sequence", "'spread'")),
    "no views": (f"{BUILD} --views 0", ("--views",)),
    "views in words": (f"{BUILD} --views many", ("'many'",)),
    "seed too large": (f"{BUILD} --seed 99999999999999999999", ("--seed",)),
    "seed below zero": (f"{TRAIN} --seed -1", ("--seed",)),
    "device nonsense": (f"{BUILD} --device nonsense", ("'nonsense'",)),
    "device without memory": (f"{TRAIN} --device meta", ("'meta'",)),
    "class map missing": (f"{BUILD} --class-map {{root}}/map.json", ("{root}/map.json",)),
    "out is a file": (f"{BUILD} --out {{weights}}", ("{weights} is a file",)),
    "out below a file": (f"{BUILD} --out {{weights}}/a/b", ("{weights} is a file",)),
    "out is not empty": (f"{BUILD} --out {{pics}}", ("{pics} is not empty and is no cache",)),
    "out is remote": (f"{BUILD} --out s3://bucket/cache", ("s3://bucket/cache",)),
    "out is another cache": (
        f"{BUILD} --augment flip --seed 3 --out {{cache}}",
        ("{cache}", "views.policy: the cache has crop,flip, asked for flip", "views.seed: the cache has 0"),
    ),
    "batch larger than the data to teach": (
        "teach --teacher resnet14 --data imagefolder:{pics} --batch-size 500",
        ("500", "128 samples"),
    ),
    "batch of one": (f"{TRAIN} --batch-size 1", ("--batch-size",)),
    "batch larger than the data": (f"{TRAIN} --batch-size 500", ("500", "128 samples")),
    "learning rate nan": (f"{TRAIN} --lr nan", ("--lr",)),
    "learning rate zero": (f"{TRAIN} --lr 0", ("--lr",)),
    "warm-up without end": (f"{TRAIN} --warmup inf", ("--warmup",)),
    "unknown loss": (f"{TRAIN} --loss nkdd", ("'nkdd'", "ce, kd, nkd")),
    "unknown loss option": (f"{TRAIN} --loss nkd:gama=1", ("'gama'", "gamma, temperature, tail")),
    "loss option in words": (f"{TRAIN} --loss nkd:gamma=much", ("gamma='much'",)),
    "loss option nan": (f"{TRAIN} --loss nkd:gamma=nan", ("gamma=nan",)),
    "loss temperature zero": (f"{TRAIN} --loss kd:temperature=0", ("temperature",)),
    "label smoothing above one": (f"{TRAIN} --loss ce:label_smoothing=7", ("label_smoothing",)),
    "unknown tail": (f"{TRAIN} --loss kd:tail=long", ("'long'", "uniform")),
    "temperature not stored": (
        f"{TRAIN} --cache {{top2}} --loss nkd:temperature=4",
        ("temperature 4", "holds 1,2", "--temperatures 1,2,4"),
    ),
    "unknown student": (f"{TRAIN} --student resnt8", ("mean resnet8, ",)),
    "student that needs larger images": (f"{TRAIN} --student alexnet", ("alexnet", "16x16 pixels")),
    "image size beyond the memory": (f"{TRAIN} --image-size 1000000", ("out of memory", "--image-size")),
    "no cache of this name": (f"{TRAIN} --cache nowhere", ("nowhere", "kdcache ls")),
    "no cache of this key": (f"{TRAIN} --cache 00000000", ("00000000", "kdcache ls")),
    "cache is a folder of images": (f"{TRAIN} --cache {{pics}}", ("{pics} is not a kdcache cache",)),
    "cache is remote": (f"{TRAIN} --cache s3://bucket/cache", ("s3://bucket/cache",)),
    "cache of other data": (
        "train --data digits --cache {cache}",
        ("name: the cache has imagefolder, the data digits", "samples: the cache has 128, the data 1442"),
    ),
    "no cache of these data": (
        "train --data digits",
        ("no cache of digits", "kdcache build --teacher resnet34 --data digits"),
    ),
    "no cache by this teacher": (f"{TRAIN} --teacher resnet50", ("by resnet50",)),
    "cache by another teacher": (f"{TRAIN} --cache {{cache}} --teacher resnet50", ("resnet8, not by resnet50",)),
    "more views than there are": (f"{TRAIN} --views 9", ("2 complete views, not 9",)),
    "more views than there are, online": (f"{TRAIN} --views 9 --online", ("2 complete views, not 9",)),
    "fresh views without a teacher": (f"{TRAIN} --fresh-views", ("--online",)),
    "weights without a teacher": (f"{TRAIN} --weights {{weights}}", ("--online",)),
    "run in a folder of other things": (f"{TRAIN} --out {{pics}}", ("{pics} is not empty and is no run",)),
    "run below a file": (f"{TRAIN} --out {{weights}}/a", ("{weights}/a",)),
    "nothing to resume": (f"{TRAIN} --out {{work}}/new --resume", ("{work}/new",)),
    "eval of nothing": ("eval {root}/nowhere", ("{root}/nowhere",)),
    "eval of a folder that is no run": ("eval {pics}", ("{pics} is no run",)),
    "eval of a teacher": ("eval {weights}", ("{weights} is a taught teacher",)),
    "info of nothing": ("info 00000000", ("00000000", "kdcache ls")),
    "info of a short key": ("info 000", ("000", "four digits", "kdcache ls")),
    "info of a folder": ("info {pics}", ("{pics} is not a kdcache cache",)),
    "verify without the images": ("verify {cache}", ("--data imagefolder:PATH", "--depth contents")),
    "verify with other data": (
        "verify {cache} --data digits",
        ("data.name: the cache has imagefolder, asked for digits", "data.samples"),
    ),
    "verify with weights that are not there": ("verify {cache} --data imagefolder:{pics} --weights x.pt", ("x.pt",)),
    "demo in a folder of other things": ("demo --out {pics}", ("{pics} is not empty",)),
    "demo in a file": ("demo --out {weights}", ("{weights}",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, place: Place, refused: Callable[..., str]) -> None:
    line, parts = MISTAKES[mistake]
    refused(line.format(**vars(place)), *(part.format(**vars(place)) for part in parts))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu(data: str, refused: Callable[..., str]) -> None:
    for command in ("build --teacher resnet8", "teach --teacher resnet14", "train"):
        refused(f"{command} {data} --device cuda", "'cuda'")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_unwritable_places(place: Place, data: str, quick: str, refused: Callable[..., str]) -> None:
    """/proc, because root may write nearly everywhere else."""
    refused(f"build --teacher resnet8 {data} --out /proc/kdcache", "/proc/kdcache")
    refused(f"{quick} --out /proc/kdcache", "/proc/kdcache")
    refused("demo --out /proc/kdcache", "/proc/kdcache")
    for home in ("/proc/kdcache", f"{place.weights}/home"):
        refused(f"teach --teacher resnet14 {data}", home, KDCACHE_HOME=home)
        weights = f"--weights {place.weights}"
        refused(f"build --teacher resnet8 {data} {weights}", home.removesuffix("/home"), KDCACHE_HOME=home)
