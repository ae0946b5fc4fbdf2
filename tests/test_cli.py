"""The command line as users meet it: what they mistype is one clear line, exit status 2, nothing written or lost."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file

from kdcache.cache import open_cache
from kdcache.cli import main
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier, file_classifier

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 220), (200, 200, 50))
COMMANDS = sorted(main.commands)


def paint(top: Path, classes: int = 4, each: int = 40, side: int = 16, seed: int = 0) -> Path:
    """Noisy images, one colour a class; every fifth goes to the evaluation split."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        for i in range(each):
            pixels = np.clip(COLOURS[c] + rng.normal(0, 60, (side, side, 3)), 0, 255).astype(np.uint8)
            path = top / ("train" if i % 5 else "val") / f"c{c}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return top


@dataclass(frozen=True)
class Place:
    """Everything lies below root: images, a teacher taught on them, two caches by it, one in KDCACHE_HOME."""

    root: Path
    home: Path
    work: Path  # the current directory
    pics: Path
    weights: Path
    cache: Path
    top2: Path

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change by path. Not what was learnt from image headers: it is no result."""
        found = (p for p in self.root.rglob("*") if p.is_file() and p.parent.name != "datasets")
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def invoke(line: str | list[str], **env: str) -> Result:
    """Run a command; what follows in the line replaces what it repeats, so that tests can vary one (--loss adds up)."""
    args: list[str] = []
    for word in shlex.split(line) if isinstance(line, str) else line:
        if word.startswith("--") and word != "--loss" and word in args:
            del args[args.index(word) : args.index(word) + 2]
        args.append(word)
    return CliRunner().invoke(main, args, env=dict(env), catch_exceptions=False)


def works(line: str | list[str], **env: str) -> Result:
    result = invoke(line, **env)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("place")
    work, pics, home = root / "work", paint(root / "pics"), root / "home"
    work.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks of this size gain nothing by more, and lose much on a busy machine
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("KDCACHE_")]:
            patch.delenv(variable)
        patch.setenv("KDCACHE_HOME", str(home))
        patch.chdir(work)
        data = f"--data imagefolder:{pics}"
        taught = json.loads(works(f"teach --teacher resnet8 {data} --epochs 3 --batch-size 32 --json").stdout)
        built = json.loads(works(f"build --teacher resnet8 {data} --views 2 --json").stdout)
        assert taught["top1"] > 0.9 and built["teacher_top1"] == taught["top1"]
        works(f"build --teacher resnet8 {data} --views 1 --topk 2 --temperatures 1,2 --out {root}/top2")
        yield Place(root, home, work, pics, Path(taught["weights"]), Path(built["path"]), root / "top2")
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def clean(place: Place) -> Iterator[None]:
    """Each test finds the current directory empty."""
    yield
    shutil.rmtree(place.work)
    place.work.mkdir()
    os.chdir(place.work)


@pytest.fixture
def data(place: Place) -> str:
    return f"--data imagefolder:{place.pics}"


@pytest.fixture
def quick(place: Place) -> str:
    """A training of a second."""
    return f"train --data imagefolder:{place.pics} --student resnet8 --epochs 2 --batch-size 32"


@pytest.fixture
def refused(place: Place) -> Callable[..., str]:
    """Run what must be refused; its one line. `parts` must stand in it."""

    def run(line: str | list[str], *parts: str, **env: str) -> str:
        before = place.files()
        result = invoke(line, **env)
        lines = result.stderr.splitlines()
        assert result.exit_code == 2, result.output
        assert [text.startswith("Error: ") for text in lines].count(True) == 1, result.stderr
        assert lines[-1].startswith("Error: ") and len(lines[-1]) < 2000
        assert "Traceback" not in result.output and not result.stdout
        for part in parts:
            assert part in lines[-1]
        assert place.files() == before
        return lines[-1]

    return run


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
    "unknown policy": (f"{BUILD} --augment crop,flop", ("'crop,flop'", "crop,flip")),
    "no views": (f"{BUILD} --views 0", ("--views",)),
    "views in words": (f"{BUILD} --views many", ("'many'",)),
    "seed too large": (f"{BUILD} --seed 99999999999999999999", ("--seed",)),
    "seed below zero": (f"{TRAIN} --seed -1", ("--seed",)),
    "device nonsense": (f"{BUILD} --device nonsense", ("'nonsense'",)),
    "device without memory": (f"{TRAIN} --device meta", ("'meta'",)),
    "class map missing": (f"{BUILD} --class-map {{root}}/map.json", ("{root}/map.json",)),
    "out is a file": (f"{BUILD} --out {{weights}}", ("{weights} is a file",)),
    "out below a file": (f"{BUILD} --out {{weights}}/a/b", ("{weights} is a file",)),
    "out is not empty": (f"{BUILD} --out {{pics}}", ("{pics} is not empty and no cache",)),
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
    "run in a folder of other things": (f"{TRAIN} --out {{pics}}", ("{pics} is not empty and no run",)),
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


# Weights


class _Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.proof),)


def test_code_in_weights_is_not_run(place: Place, data: str, refused: Callable[..., str]) -> None:
    proof, file = place.work / "proof", place.work / "evil.pt"
    for content in ({"state_dict": load_file(place.weights), "more": _Evil(proof)}, _Evil(proof)):
        torch.save(content, file)
        refused(f"build --teacher resnet8 {data} --weights {file}", str(file), "posix.mkdir", "nothing of it was run")
        refused(f"eval {file}", str(file))
    assert not proof.exists()


@pytest.mark.parametrize(
    "content", ["cut.safetensors", "cut.pt", "empty.safetensors", "empty.pt", "text.pt", "image.pt", "list.pt"]
)
def test_damaged_weights(content: str, place: Place, data: str, refused: Callable[..., str]) -> None:
    whole, file = place.weights.read_bytes(), place.work / content
    torch.save([1, 2] if content == "list.pt" else load_file(place.weights), file)
    match content:
        case "cut.safetensors":
            file.write_bytes(whole[: len(whole) // 2])
        case "cut.pt":
            file.write_bytes(file.read_bytes()[:3000])
        case "empty.safetensors" | "empty.pt":
            file.write_bytes(b"")
        case "text.pt":
            file.write_text("hello world, this is text\n" * 9)
        case "image.pt":
            file.write_bytes((place.pics / "val/c0/00.png").read_bytes())
    refused(f"build --teacher resnet8 {data} --weights {file}", str(file))
    refused(f"eval {file}", str(file))


def test_layers_that_do_not_fit_are_named(place: Place, data: str, refused: Callable[..., str]) -> None:
    state = load_file(place.weights)
    state["fc.weight"] = torch.zeros(4, 32)
    state["extra"] = state.pop("fc.bias")
    torch.save(state, "odd.pt")
    wrong = ("fc.weight is (4, 32), the network has (4, 64)", "1 missing (fc.bias)", "1 not in the network (extra)")
    refused(f"build --teacher resnet8 {data} --weights odd.pt", *wrong)


@pytest.mark.parametrize("notes", ["no json", "[1]", '{"student": 1}', '{"input_size": "x"}'])
def test_notes_of_others_in_safetensors(notes: str, place: Place, data: str, refused: Callable[..., str]) -> None:
    save_file(load_file(place.weights), "foreign.safetensors", {"kdcache": notes})
    refused(f"build --teacher resnet8 {data} --weights foreign.safetensors", "foreign.safetensors")
    refused("eval foreign.safetensors", "foreign.safetensors")
    save_file(load_file(place.weights), "foreign.safetensors", {"format": "pt"})
    refused("eval foreign.safetensors", "was not written by kdcache")


def test_a_teacher_near_chance(place: Place, data: str, refused: Callable[..., str]) -> None:
    """Classes in another order; with --allow-low-accuracy the same builds."""
    state = load_file(place.weights)
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name].roll(1, 0)
    torch.save(state, "rolled.pt")
    line = f"build --teacher resnet8 {data} --weights rolled.pt --views 1 --out {place.work}/low"
    refused(line, "images of c0 are answered as c1", "--class-map", "--allow-low-accuracy")
    assert json.loads(works(f"{line} --allow-low-accuracy --json").stdout)["teacher_top1"] < 0.1


def test_classes_that_do_not_fit(place: Place, refused: Callable[..., str]) -> None:
    three, one = (paint(place.work / str(n), classes=n, each=10) for n in (3, 1))
    line = f"build --teacher resnet8 --weights {place.weights} --data imagefolder:{three}"
    refused(line, "the teacher has 4 classes, imagefolder has 3", "--class-map")
    works(f"{line} --views 1 --out {place.work}/mapped --class-map auto")
    (place.work / "map.csv").write_text("c0,0\nc1,7\nc2,2\n")
    refused(f"{line} --class-map map.csv", "7", "0 to 3")
    refused(f"teach --teacher resnet8 --data imagefolder:{one}", "1 class")


# Images


def test_unreadable_images(place: Place, refused: Callable[..., str]) -> None:
    pics = shutil.copytree(place.pics, place.work / "pics")
    bad = [pics / "train/c1/02.png", pics / "train/c3/03.png", pics / "val/c0/05.png"]
    bad[0].write_text("no image")
    for path in bad[1:]:
        path.write_bytes(path.read_bytes()[:100])
    for command in ("build --teacher resnet8", "teach --teacher resnet14", "train"):
        refused(f"{command} --data imagefolder:{pics}", str(bad[0]), "--list-unreadable")
    before = place.files()
    listed = invoke(f"build --data imagefolder:{pics} --list-unreadable")
    assert listed.exit_code == 1 and [line.split(": ")[0] for line in listed.stdout.splitlines()] == list(map(str, bad))
    as_json = invoke(f"build --data imagefolder:{pics} --list-unreadable --json")
    assert as_json.exit_code == 1 and json.loads(as_json.stdout) == listed.stdout.splitlines()
    whole = invoke(f"build --data imagefolder:{place.pics} --list-unreadable")
    assert whole.exit_code == 0 and whole.stdout == "every file can be read\n"
    assert place.files() == before


def test_folders_without_images(place: Place, refused: Callable[..., str]) -> None:
    empty, bare = place.work / "empty", place.work / "bare"
    (bare / "train/c0").mkdir(parents=True)
    empty.mkdir()
    refused(f"build --teacher resnet8 --data imagefolder:{empty}", str(empty), "no class folders")
    refused(f"build --teacher resnet8 --data imagefolder:{bare}", str(bare))


def test_data_smaller_than_the_default_batch(place: Place) -> None:
    few = f"--data imagefolder:{paint(place.work / 'few', each=5)}"
    home = {"KDCACHE_HOME": str(place.work / "home")}
    works(f"teach --teacher resnet8 {few} --epochs 1", **home)
    works(f"build --teacher resnet8 {few} --views 1 --allow-low-accuracy", **home)
    works(f"train {few} --epochs 1", **home)


def test_without_labels(place: Place, data: str, refused: Callable[..., str]) -> None:
    refused(f"build --teacher resnet8 {data} --unlabelled", "unlabelled", "--weights")
    works(f"build --teacher resnet8 {data} --weights {place.weights} --unlabelled --views 1 --out cache")
    for online in ("", f"--online --weights {place.weights}"):
        train = f"train {data} --cache cache --student resnet8 --epochs 1 {online}"
        refused(f"{train} --loss nkd", "nkd needs labels", "--unlabelled")
        works(f"{train} --loss kd:alpha=0 --out run{len(online)}")


# Which cache


def test_several_caches_that_match_are_listed(place: Place, quick: str, refused: Callable[..., str]) -> None:
    home = place.work / "home"
    keys = [open_cache(path).key for path in (place.cache, place.top2)]
    for path, key in zip((place.cache, place.top2), keys, strict=True):
        shutil.copytree(path, home / "caches" / key)
    lines = (
        f"{keys[0][:12]}  resnet8 on imagefolder (128), crop,flip, 2 views, dense, float16, ",
        f"{keys[1][:12]}  resnet8 on imagefolder (128), crop,flip, 1 views, top 2 of 4, uint8, ",
    )
    refused(quick, "2 caches", "--cache", *lines, KDCACHE_HOME=str(home))
    works(f"{quick} --epochs 1 --cache {keys[0][:8]} --out run", KDCACHE_HOME=str(home))
    # A run keeps its cache.
    works(f"{quick} --epochs 1 --out run --resume", KDCACHE_HOME=str(home))


def test_without_a_cache_the_command_that_is_named_builds_one(place: Place, quick: str) -> None:
    home = str(place.work / "home")
    shutil.copytree(place.home / "teachers", place.work / "home" / "teachers")
    line = f"{quick} --epochs 1 --teacher resnet8 --out run"
    said = invoke(line, KDCACHE_HOME=home).stderr
    command = re.search(r"with a complete view: run kdcache (build --teacher resnet8 .*) first$", said.strip())
    assert command, said
    works(f"{command[1]} --views 1", KDCACHE_HOME=home)
    works(line, KDCACHE_HOME=home)


def test_an_ambiguous_key(place: Place, refused: Callable[..., str]) -> None:
    key, home = place.cache.name, place.work / "home"
    for name in (key, key[:20] + "0" * 44):
        shutil.copytree(place.cache, home / "caches" / name)
    refused(f"info {key[:12]}", key[:12], "several", KDCACHE_HOME=str(home))


def test_a_cache_of_other_data(place: Place, refused: Callable[..., str]) -> None:
    other = paint(place.work / "other", seed=1)
    fingerprint = open_cache(place.cache).identity.data.fingerprint
    refused(f"train --data imagefolder:{other} --cache {place.cache}", f"fingerprint: the cache has {fingerprint}")
    refused(
        f"train --data imagefolder:{other}",
        "no cache of",
        f"kdcache build --teacher resnet34 --data imagefolder:{other}",
    )
    refused(f"verify {place.cache} --data imagefolder:{other}", f"data.fingerprint: the cache has {fingerprint}")


def test_of_three_splits_val_chooses_the_weights_and_test_is_reported(place: Place) -> None:
    three = place.work / "three"
    shutil.copytree(place.pics, three)
    (three / "val").rename(three / "test")
    shutil.copytree(paint(place.work / "more", seed=1) / "val", three / "val")
    line = f"train --student resnet8 --epochs 3 --batch-size 32 --cache {place.cache} --out run"
    done = works(f"{line} --data imagefolder:{three} --eval-folder test")
    assert f"{three / 'val'}: 32 images to choose weights by" in done.stderr
    assert "best on the validation images: epoch " in done.stdout
    lines = [json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()]
    best = max(reversed(lines), key=lambda at: float(at["validation_top1"]))
    assert json.loads(Path("run/summary.json").read_text())["best"]["epoch"] == best["epoch"]
    for file, at in (("last", lines[-1]), ("best", best)):
        weights = f"eval run/{file}.safetensors --json"
        assert json.loads(works(weights).stdout)["top1"] == at["top1"]
        chosen = json.loads(works(f"{weights} --data imagefolder:{three}").stdout)
        assert chosen["images"] == 32 and chosen["top1"] == at["validation_top1"]


def test_another_teacher_online(place: Place, data: str, quick: str, refused: Callable[..., str]) -> None:
    state = load_file(place.weights)
    state["fc.bias"] = state["fc.bias"] + 1
    torch.save(state, "other.pt")
    hashed = open_cache(place.cache).identity.teacher.weights
    refused(f"{quick} --online --weights other.pt", f"weights: the cache has {hashed}, found ")
    refused(
        f"build --teacher resnet8 {data} --weights other.pt --out {place.cache}",
        f"teacher.weights: the cache has {hashed}",
    )


def test_a_damaged_cache(place: Place, data: str, quick: str, refused: Callable[..., str]) -> None:
    cache = shutil.copytree(place.cache, place.work / "cache")
    chunk = next((cache / "views/v00001/gaps/c").rglob("0"))
    while chunk.is_dir():
        chunk /= "0"
    content = bytearray(chunk.read_bytes())
    content[-9] ^= 1
    chunk.write_bytes(content)
    result = invoke(f"verify {cache} --depth contents")
    assert result.exit_code == 1 and str(chunk) in result.stdout and "FAILED" in result.stdout
    result = invoke(f"verify {cache} --depth contents --json")
    assert result.exit_code == 1 and json.loads(result.stdout)["passed"] is False
    (cache / "identity.json").write_text("{}")
    for line in (
        f"info {cache}",
        f"verify {cache}",
        f"{quick} --cache {cache}",
        f"build --teacher resnet8 {data} --out {cache}",
    ):
        refused(line, f"{cache}/identity.json")


# Settings


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("vews = 3", ("vews", "mean views?")),
        ("[build]\nvews = 3", ("[build] vews", "mean views?")),
        ("[biuld]\nviews = 3", ("[biuld]", "mean build?")),
        ("build = 3", ("build",)),
        ("views = ", ("not valid TOML",)),
        ('[build.augment]\nname = "crop"', ("[build] augment",)),
        ("data = 1979-05-27", ("data",)),
        ('views = "many"', ("'many'", "from kdcache.toml: views")),
        ("[build]\nviews = 2.5", ("'2.5'", "from kdcache.toml: [build] views")),
        ("views = [1, 2]", ("'1,2'",)),
        ("views = true", ("'true'",)),
        ("views = -1", ("-1",)),
        ("unlabelled = 3", ("'3'",)),
        ('precision = "float8"', ("'float8'", "float32")),
        ("augment = 3", ("'3'", "crop,flip")),
        ('temperatures = [1, "two"]', ("'1,two'",)),
    ],
)
def test_mistakes_in_the_settings_file(
    toml: str, parts: tuple[str, ...], data: str, refused: Callable[..., str]
) -> None:
    Path("kdcache.toml").write_text(toml)
    refused(f"build --teacher resnet8 {'' if toml.startswith('data') else data}", *parts)


def test_a_settings_file_that_is_no_text(place: Place, refused: Callable[..., str]) -> None:
    Path("kdcache.toml").write_bytes(b"\xff\xfe")
    refused("ls", "kdcache.toml", "not valid TOML")
    Path("kdcache.toml").unlink()
    Path("kdcache.toml").mkdir()
    refused("ls", "kdcache.toml")


@pytest.mark.parametrize(
    ("variable", "value", "parts"),
    [
        ("KDCACHE_VEWS", "3", ("mean views?",)),
        ("KDCACHE_BUILD_VEWS", "3", ("build", "mean views?")),
        ("KDCACHE_VIEWS", "many", ("'many'", "from KDCACHE_VIEWS")),
        ("KDCACHE_BUILD_VIEWS", "0", ("0", "from KDCACHE_BUILD_VIEWS")),
        ("KDCACHE_ALLOW_LOW_ACCURACY", "perhaps", ("'perhaps'",)),
        ("KDCACHE_DATA", "nowhere", ("'nowhere'",)),
    ],
)
def test_mistakes_in_the_environment(
    variable: str, value: str, parts: tuple[str, ...], refused: Callable[..., str]
) -> None:
    env = {variable: value}
    parts = (variable, *parts) if "VEWS" in variable else parts
    refused("build --teacher resnet8", *parts, **env)


def test_flags_come_before_the_environment_before_the_file(data: str, refused: Callable[..., str]) -> None:
    """Shown by which of several unknown policies the message names."""
    line, file = f"build --teacher resnet8 {data}", Path("kdcache.toml")
    file.write_text('augment = "top"')
    refused(line, "'top'")
    file.write_text('augment = "top"\n[build]\naugment = "table"\n[teach]\naugment = "other"')
    refused(line, "'table'")
    refused(line, "'all'", KDCACHE_AUGMENT="all")
    refused(line, "'build'", KDCACHE_AUGMENT="all", KDCACHE_BUILD_AUGMENT="build")
    refused(line, "'build'", KDCACHE_BUILD_AUGMENT="build", KDCACHE_AUGMENT="all")
    refused(line, "'table'", KDCACHE_AUGMENT="")
    refused(f"{line} --augment flag", "'flag'", KDCACHE_AUGMENT="all", KDCACHE_BUILD_AUGMENT="build")


def test_settings_do_what_flags_do(place: Place) -> None:
    Path("kdcache.toml").write_text(
        f'data = "imagefolder:{place.pics}"\n[build]\nteacher = "resnet8"\ntopk = 2\ntemperatures = [1, 2]\n'
        f'augment = ["crop", "flip"]\nfull-fingerprint = false\nout = "{place.top2}"\n'
    )
    built = json.loads(works("build", KDCACHE_BUILD_VIEWS="1", KDCACHE_JSON="1").stdout)
    assert built["teacher_images"] == 0 and built["path"] == str(place.top2)


# Runs


@pytest.fixture
def run(place: Place, quick: str) -> Path:
    """A copy of a whole run of two epochs."""
    whole = place.root / "whole"
    if not whole.exists():
        works(f"{quick} --out {whole}")
    return shutil.copytree(whole, place.work / "run")


def test_a_run_is_not_overwritten(run: Path, quick: str, refused: Callable[..., str]) -> None:
    refused(f"{quick} --out {run}", str(run), "--resume", "--out")
    different = "lr: the run has 0.025, asked for 0.3", "student: the run has resnet8, asked for resnet14"
    refused(f"{quick} --out {run} --resume --lr 0.3 --student resnet14", "another run", *different)
    refused(f"{quick} --out {run} --resume --loss kd", "loss: the run has nkd, asked for kd")


def test_damaged_runs(run: Path, quick: str, refused: Callable[..., str]) -> None:
    state = (run / "state.pt").read_bytes()
    for content in (b"", b"no pickle" * 30, state[:2000]):
        (run / "state.pt").write_bytes(content)
        refused(f"{quick} --out {run} --resume", f"{run}/state.pt", "remove it")
    whole = torch.load(io.BytesIO(state))
    for odd in ({}, [1], {**whole, "model": {}}, {**whole, "optimiser": {}}, {**whole, "random": None, "x": 1}):
        torch.save(odd, run / "state.pt")
        refused(f"{quick} --out {run} --resume", f"{run}/state.pt", "remove it")
    (run / "state.pt").write_bytes(state)
    for text in (b"", b"{", b"[]", b"\xff\xfe"):
        (run / "config.json").write_bytes(text)
        refused(f"{quick} --out {run} --resume", f"{run}/config.json")
    (run / "last.safetensors").write_bytes(b"")
    refused(f"eval {run}", f"{run}/last.safetensors")


def test_a_run_that_never_had_an_epoch_is_started_again(quick: str, refused: Callable[..., str]) -> None:
    """The loss is not finite, the user corrects it: the folder must not be in the way."""
    result = invoke(f"{quick} --lr 1e30 --out run")
    assert result.exit_code == 2 and "lower --lr" in result.stderr
    refused("eval run", "no run with a whole epoch")
    works(f"{quick} --epochs 1 --out run")
    refused(f"{quick} --epochs 1 --out run", "holds a run already")


def test_eval(run: Path, place: Place, refused: Callable[..., str]) -> None:
    found = json.loads(works(f"eval {run} --json").stdout)
    summary = json.loads((run / "summary.json").read_text())
    assert found["top1"] == summary["top1"] and found["weights"] == f"{run}/last.safetensors"
    assert re.search(r"^top1 +\d+\.\d\d%$", works(f"eval {run}/last.safetensors").stdout, re.M)
    refused(f"eval {run} --data digits", "was not trained on digits's classes '0', '1'")
    refused(f"eval {run} --cache {place.pics}", f"{place.pics} is not a kdcache cache")


# What is printed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_explains_every_option(command: str) -> None:
    text = works([command, "--help"]).stdout
    assert f"Example: kdcache {command}" in text and text == works([command, "-h"]).stdout
    assert "--json" in text
    assert all(p.help for p in main.commands[command].params if isinstance(p, click.Option))


def test_the_list_of_commands_and_the_version() -> None:
    text = works("--help").stdout
    assert all(re.search(rf"^  {command} ", text, re.M) for command in COMMANDS)
    assert re.fullmatch(r"kdcache, version \S+\n", works("--version").stdout)
    assert invoke("").exit_code == 2


def test_facts_as_json(place: Place, data: str, quick: str) -> None:
    """Nothing but JSON on standard output."""
    key = place.cache.name
    listed = json.loads(works("ls --json").stdout)
    assert [c["key"] for c in listed] == [key]
    told = json.loads(works(f"info {key[:6]} --json").stdout)
    assert told.items() >= listed[0].items() and told["under_way"] == []
    fidelity = told["fidelity"]
    assert 0.25 < fidelity["evaluation_top1"] <= 1 and set(fidelity["view_top1"]) == {"0", "1"}
    assert fidelity["mass"] == {}
    assert set(json.loads(works(f"info {place.top2} --json").stdout)["fidelity"]["mass"]["2"]) == {"head", "tail"}
    assert listed[0]["views"] == 2 and listed[0]["samples"] == 128
    checked = json.loads(works(f"verify {key} {data} --replay 8 --json").stdout)
    assert checked["passed"] is True and checked["replayed"] == 24 and checked["problems"] == []
    trained = json.loads(works(f"{quick} --epochs 1 --json").stdout)
    assert trained["epochs"] == 1 and Path(trained["run"]).is_dir()
    built = json.loads(works(f"build --teacher resnet8 {data} --views 2 --json").stdout)
    assert built["key"] == key and built["teacher_images"] == 0
    assert json.loads(works(f"build {data} --list-unreadable --json").stdout) == []


def test_facts_as_text(place: Place, data: str) -> None:
    key = place.cache.name
    assert re.fullmatch(
        rf"{key[:12]}  resnet8 on imagefolder \(128\), crop,flip, 2 views, dense, float16, \d+\.\d kB\n",
        works("ls").stdout,
    )
    text = works(f"info {place.top2}").stdout
    for line in (
        f"path +{place.top2}",
        "views +1 complete",
        r"teacher +top-1 \d+\.\d\d% on the evaluation split$",
        r"mass +\d+\.\d\d% stored, \d+\.\d\d% in the tail, at temperature 1",
        "record.k = 2",
    ):
        assert re.search(rf"^{line}", text, re.M), line
    assert "3 shards of 2 complete views read" in works(f"verify {key} --depth contents").stdout
    text = works(f"verify {key} {data} --replay 20").stdout
    assert "60 records replayed" in text and text.endswith("passed\n")


def test_ls_of_an_empty_home_and_of_one_with_other_things(place: Place) -> None:
    home = place.work / "home"
    assert "no caches" in works("ls", KDCACHE_HOME=str(home)).stdout
    assert json.loads(works("ls --json", KDCACHE_HOME=str(home)).stdout) == []
    assert not home.exists()
    (home / "caches/junk").mkdir(parents=True)
    result = works("ls", KDCACHE_HOME=str(home))
    assert "no caches" in result.stdout and f"not a cache: {home}/caches/junk" in result.stderr


# What the machine does


def test_a_full_disk(place: Place, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says where, and the same command goes on afterwards."""

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = f"build --teacher resnet8 {data} --views 1 --out {place.work}/cache"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = invoke(line)
    assert result.exit_code == 2 and "No space left" in result.stderr.splitlines()[-1]
    assert f"{place.work}/cache" in result.stderr.splitlines()[-1] and "free some space" in result.stderr
    works(line)


def test_a_reader_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """kdcache ls | head -1: no error is printed."""

    def gone(*args: object, **options: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(click, "echo", gone)
    result = invoke("ls")
    assert result.exit_code == 1 and not result.output


@pytest.fixture(scope="module")
def large(place: Place) -> Path:
    """Images that stay in files, and a cache of them."""
    folder = place.root / "large"
    pics = paint(folder / "pics", each=10, side=80)
    model = Classifier(build_network("resnet8", 4, 32), (0.5,) * 3, (0.3,) * 3)
    names = [f"c{i}" for i in range(4)]
    notes = {"input_size": 32, "mean": [0.5] * 3, "std": [0.3] * 3, "class_names": names}
    file_classifier(folder / "teacher.safetensors", model, notes)
    works(
        f"build --teacher resnet8 --weights {folder}/teacher.safetensors --data imagefolder:{pics} --views 1 "
        f"--workers 0 --allow-low-accuracy --out {folder}/cache"
    )
    return folder


def start(line: str, **env: str) -> subprocess.Popen[str]:
    """`python -m kdcache.cli` in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "kdcache.cli", *shlex.split(line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def on_small_places(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount: what it mounts is its own, and gone with it."""
    line = ["unshare", "--map-root-user", "--mount", "bash", "-c", script]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("mount", "reason"), [("size=120k", "No space left"), ("ro", "Read-only file system")])
def test_a_run_on_a_full_or_read_only_disk_is_one_line(place: Place, quick: str, mount: str, reason: str) -> None:
    done = on_small_places(
        f"mkdir disk && mount -t tmpfs -o {mount} tmpfs disk && {sys.executable} -m kdcache.cli {quick} --loss kd "
        f"--cache {place.cache} --out disk/run"
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: disk/run/") and reason in last and "Traceback" not in done.stderr


def test_image_files_where_shared_memory_is_short(place: Place, large: Path) -> None:
    """As in a container, whose /dev/shm has 64 MB: here 1 MB, for small images. The records are the same."""
    data = f"--data imagefolder:{large}/pics --workers 2"
    cli = f"{sys.executable} -m kdcache.cli"
    done = on_small_places(
        "mount -t tmpfs -o size=1m tmpfs /dev/shm && "
        f"{cli} build --teacher resnet8 --weights {large}/teacher.safetensors {data} --views 1 --allow-low-accuracy "
        f"--out cache && {cli} train {data} --cache cache --student resnet8 --loss kd --epochs 1 --out run"
    )
    assert done.returncode == 0, done.stderr
    built = open_cache(place.work / "cache"), open_cache(large / "cache")
    assert torch.equal(*(cache.read(0).gaps for cache in built))


def test_an_absurd_identity_is_refused_by_every_reader(place: Place, data: str, refused: Callable[..., str]) -> None:
    cache = shutil.copytree(place.cache, place.work / "cache")
    identity = json.loads((cache / "identity.json").read_text())
    identity["teacher"]["input_size"] = 2**40
    (cache / "identity.json").write_text(json.dumps(identity, sort_keys=True, separators=(",", ":")))
    for line in (f"info {cache}", f"verify {cache} {data}", f"train {data} --loss kd --cache {cache}"):
        refused(line, "identity.json is not what kdcache writes: teacher.input_size")


def test_ctrl_c(place: Place, large: Path) -> None:
    """In a build and in a training with workers: one line, status 130, no process left, and it goes on."""
    data = f"--data imagefolder:{large}/pics --workers 2"
    build = f"build --teacher resnet8 --weights {large}/teacher.safetensors {data} --allow-low-accuracy --out cache"
    train = f"train {data} --cache {large}/cache --student resnet8 --image-size 32 --batch-size 8 --out run"
    under_way = {
        start(f"{build} --views 500"): lambda: len(list(Path("cache/commits").glob("v*.json"))) > 1,
        start(f"{train} --epochs 500"): Path("run/state.pt").exists,
    }
    try:
        for process, ready in under_way.items():
            until = time.monotonic() + 120
            while not ready():
                assert process.poll() is None and time.monotonic() < until, process.communicate()
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 130, out
            assert "Traceback" not in out and "Error" not in out, out
            assert out.splitlines()[-1].startswith("stopped; nothing is lost"), out
            gone = time.monotonic() + 20
            while is_there(process.pid):  # one that has ended waits a moment for the system to take note
                assert time.monotonic() < gone
                time.sleep(0.02)
    finally:
        for process in under_way:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    done = len(list(Path("cache/commits").glob("v*.json")))
    built = json.loads(works(f"{build} --views {done + 1} --workers 0 --json").stdout)
    assert built["views"] == done + 1 and 0 < built["teacher_images"] <= 32 * 2


@pytest.mark.parametrize("stage", ["build", "train"])
def test_ctrl_c_while_a_network_is_compiled(place: Place, large: Path, quick: str, stage: str) -> None:
    """At a terminal the compiler gets it too: no complaint of it, nor is it left."""
    teacher = f"--teacher resnet8 --weights {large}/teacher.safetensors --data imagefolder:{large}/pics"
    line = f"{quick} --loss kd" if stage == "train" else f"build {teacher} --allow-low-accuracy"
    process = start(f"{line} --compile --out run", TORCHINDUCTOR_CACHE_DIR=str(Path("inductor").absolute()))
    try:
        until = time.monotonic() + 120
        while "cc1plus" not in (names := commands(process.pid)) and "clang++" not in names:
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130, out
    assert "Traceback" not in out and "Error" not in out, out
    assert out.splitlines()[-1].startswith("stopped; nothing is lost"), out
    gone = time.monotonic() + 20
    while is_there(process.pid):
        assert time.monotonic() < gone
        time.sleep(0.02)


def commands(group: int) -> set[str]:
    """What the processes of a group run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it ended meanwhile
            continue
        if int(rest.split()[2]) == group:
            found.add(name)
    return found


def test_the_short_form_on_a_fresh_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path / "home")
    for line in ("build --teacher resnet8", "train --loss nkd"):
        process = start(line, KDCACHE_HOME=home)
        out, _ = process.communicate(timeout=250)
        assert process.returncode == 0, out
        if line.startswith("build"):
            assert "data: digits" in out and "teaching one first" in out
    summary = json.loads(Path("runs/digits-resnet8-nkd-seed0/summary.json").read_text())
    assert summary["top1"] > 0.95
    listed = json.loads(works("ls --json", KDCACHE_HOME=home).stdout)
    assert len(listed) == 1 and listed[0]["identity"]["data"]["name"] == "digits"
