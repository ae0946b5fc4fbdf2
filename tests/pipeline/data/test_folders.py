"""Which folders are splits, which are classes, and what is said of both: nothing is left out without a word."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from kdcache.cache.errors import InputError
from kdcache.cli import main
from kdcache.pipeline.data.dataset import list_unreadable, open_data, open_validation, with_folders
from kdcache.tests.helpers.images import draw


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))


def folder(tmp_path, *splits, classes=("cat", "dog"), each=2) -> Path:
    top = tmp_path / "top"
    for split in splits:
        for name in classes:
            for i in range(each):
                draw(top / split / name / f"{split.replace('/', '-')}{i}.png")
    return top


def opened(spec, split="train", **options):
    return open_data(f"imagefolder:{spec}" if isinstance(spec, Path) else spec, split, **options)


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        ("Training", "Testing"), ("Train", "Val"), ("TRAIN", "VAL"), ("train", "validation"), ("train", "Valid"),
        ("training", "TEST"), ("Train", "dev"), ("train", "Evaluation"),
    ],
)  # fmt: skip
def test_splits_are_known_in_any_case(tmp_path, train, evaluation):
    top = folder(tmp_path, train, evaluation)
    for unlabelled in (False, True):
        data, held = (opened(top, split, unlabelled=unlabelled) for split in ("train", "eval"))
        assert (data.root, held.root) == (top / train, top / evaluation)
        assert data.class_names == (() if unlabelled else ("cat", "dog"))
        assert len(data) == len(held) == 4


def test_of_several_evaluation_splits_the_validation_counts(tmp_path):
    top = folder(tmp_path, "train", "Valid", "test", "eval")
    assert opened(top, "eval").root == top / "Valid"
    assert opened(f"imagenet:{top}", "eval").root == top / "Valid"
    assert opened(with_folders(f"imagefolder:{top}", None, "test"), "eval").root == top / "test"


def test_the_validation_folder_chooses_where_the_test_folder_is_reported(tmp_path):
    top = folder(tmp_path, "train", "Valid", "test")
    spec = with_folders(f"imagefolder:{top}", None, "test")
    third = open_validation(spec)
    assert third.root == top / "Valid" and third.class_names == ("cat", "dog") and len(third) == 4
    assert third.note == f"{top / 'Valid'}: 4 images to choose weights by"
    assert (third.mean, third.std) == (opened(top).mean, opened(top).std)
    assert opened(spec, "eval").note == f"{top / 'test'}: 4 images to evaluate on"
    assert open_validation(f"imagefolder:{top}") is None  # Valid is reported there, and caches' keys say so
    assert opened(top, "eval").note.endswith(
        "test is not read: with --eval-folder test it is reported, and Valid chooses the weights"
    )


@pytest.mark.parametrize(
    ("splits", "named"),
    [
        (("train", "test"), (None, None)), (("train", "val"), (None, None)),
        (("train", "test", "val"), ("val", "test")), (("train", "test", "eval"), (None, "test")), (("",), (None, None)),
    ],
)  # fmt: skip
def test_data_without_a_third_split_have_no_validation(tmp_path, splits, named):
    assert open_validation(with_folders(f"imagefolder:{folder(tmp_path, *splits)}", *named)) is None


def test_data_in_memory_have_no_validation():
    assert open_validation("digits") is None


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("seg_train", "seg_test", "seg_pred"), r"top: seg_test, seg_train look like splits, not classes"),
        (("trainSet", "testSet"), r"--train-folder NAME and --eval-folder NAME .*, give --train-folder \.$"),
        (("train1", "train2"), "look like splits"),
        (
            ("train/Training", "train/Testing", "val"),
            r"top/train: Testing, Training look .*, give --train-folder train$",
        ),
        (("train", "Train", "val"), r"Train and train may each be the split: --train-folder NAME decides"),
        (("train", "test", "Testing"), r"Testing and test may each be the split: --eval-folder NAME decides"),
        (("Testing", "cars"), r"top/train: no such folder.*--train-folder \. says that all folders are classes"),
    ],
)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_what_may_be_a_split_is_refused_with_the_flag_that_decides(tmp_path, splits, message, split):
    top = folder(tmp_path, *splits)
    with pytest.raises(InputError, match=message) as caught:
        opened(top, split)
    assert "\n" not in str(caught.value)


def test_the_flags_decide(tmp_path):
    top = folder(tmp_path, "seg_train/seg_train", "seg_test/seg_test")
    spec = with_folders(f"imagefolder:{top}", "seg_train/seg_train", "seg_test/seg_test")
    assert opened(spec).name == "imagefolder" and opened(spec).class_names == ("cat", "dog")
    assert opened(spec, "eval").root == top / "seg_test/seg_test"
    assert list_unreadable(spec, "eval") == []


def test_folders_with_the_names_of_splits_can_be_classes(tmp_path):
    top = folder(tmp_path, "train", "test", "bus", each=5)
    data, held = (opened(with_folders(f"imagefolder:{top}", ".", None), split) for split in ("train", "eval"))
    assert data.class_names == held.class_names == ("bus", "test", "train") and (len(data), len(held)) == (27, 3)


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        ("gone", None, r"top/gone: no such folder: --train-folder is relative to .*top$"),
        (None, "gone", r"top/gone: no such folder: --eval-folder"),
        (".", "val", "lie in each other"),
        ("train", "train/cat", "lie in each other"),
        ("train", "train", "lie in each other"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, train, evaluation, message):
    top = folder(tmp_path, "train", "val")
    with pytest.raises(InputError, match=message):
        opened(with_folders(f"imagefolder:{top}", train, evaluation), "eval")
    with pytest.raises(InputError, match="are for imagenet and imagefolder, not for digits"):
        with_folders("digits", "train", None)


@pytest.mark.parametrize("command", ["build", "teach", "train", "bench", "pack", "eval", "verify", "import"])
def test_each_command_that_opens_data_has_the_flags(command):
    flags = {option for param in main.commands[command].params for option in param.opts}
    assert {"--data", "--train-folder", "--eval-folder"} <= flags


def test_a_link_upwards_is_refused(tmp_path):
    top = folder(tmp_path, "train", "val")
    (top / "train/cat/up").symlink_to(top / "train")
    with pytest.raises(InputError, match=r"train/cat/up: a link to .*top/train, whose images .* remove it$"):
        opened(top)


def test_a_link_to_another_class_is_refused_and_one_elsewhere_is_followed(tmp_path):
    top = folder(tmp_path, "train", "val")
    draw(tmp_path / "elsewhere/birds/1.png")
    (top / "train/cat/more").symlink_to(tmp_path / "elsewhere")
    (top / "train/owl").symlink_to(tmp_path / "elsewhere/birds")
    assert opened(top).paths[0] == "cat/more/birds/1.png" and opened(top).class_names == ("cat", "dog", "owl")
    (tmp_path / "elsewhere/birds/back").symlink_to("..")  # round in a circle that lies elsewhere
    with pytest.raises(InputError, match=r"birds/back: a link to .*elsewhere, whose images"):
        opened(top)
    (tmp_path / "elsewhere/birds/back").unlink()
    (top / "train/wolf").symlink_to("dog")
    with pytest.raises(InputError, match=r"train/wolf: a link to .*train/dog, whose images"):
        opened(top)


def test_jpegs_of_all_suffixes_are_read_and_other_files_are_counted(tmp_path):
    top = folder(tmp_path, "train", "val")
    for name in ("a.jfif", "b.jpe", "c.JPG"):
        Image.open(top / "train/cat/train0.png").save(top / "train/cat" / name, "JPEG")
    for name in ("1.gif", "2.GIF", "3.avif", "notes.txt", "Makefile", ".hidden"):
        (top / "train/dog" / name).touch()
    data = opened(top)
    assert [path for path in data.paths if not path.endswith("png")] == ["cat/a.jfif", "cat/b.jpe", "cat/c.JPG"]
    assert data.note == (
        f"{top}/train: 7 images to learn from, 2 classes: cat, dog; "
        "5 files are left out, 2 .gif, 1 without a suffix, 1 .avif, 1 .txt"
    )
    assert opened(top, "eval").note == f"{top}/val: 4 images to evaluate on"
    for path in (top / "val").rglob("*.png"):
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(InputError, match=r"holds no images .*; 4 files are left out, 4 \.gif$"):
        opened(top, "eval")


def test_a_build_says_once_which_classes_there_are(tmp_path):
    top = folder(tmp_path, "Learn", "Check", classes=[f"c{i}" for i in range(7)])
    options = ["--train-folder", "Learn", "--eval-folder", "Check", "--data", f"imagefolder:{top}"]
    found = CliRunner().invoke(main, ["build", "--teacher", "resnet8", *options])
    assert found.exit_code == 2  # nobody has taught one
    line = f"{top}/Learn: 14 images to learn from, 7 classes: c0, c1, c2, c3, c4, ... c6\n"
    assert found.stderr.count(line) == 1 and f"{top}/Check: 14 images to evaluate on\n" in found.stderr


def test_a_pipe_in_place_of_an_image_does_not_hang(tmp_path):
    top = folder(tmp_path, "train", "val")
    os.mkfifo(top / "train/cat/pipe.png")
    with pytest.raises(InputError, match=r"cat/pipe\.png: not a plain file"):
        opened(top)
    assert list_unreadable(f"imagefolder:{top}", "train") == [f"{top}/train/cat/pipe.png: not a plain file"]
