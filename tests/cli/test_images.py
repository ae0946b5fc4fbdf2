"""Images that cannot be read, are missing, few or without labels, and images in three splits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from kdcache.tests.helpers.commands import Place, invoke, paint, works


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
