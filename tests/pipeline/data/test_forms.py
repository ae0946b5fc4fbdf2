"""Images as people have them: each form gives the right pixels or is refused by name, in all kinds and both stages."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.cache.errors import InputError
from kdcache.pipeline.build.build import build
from kdcache.pipeline.data.dataset import list_unreadable, open_data
from kdcache.pipeline.ffcv.pack import pack_ffcv
from kdcache.pipeline.ffcv.read import FFCVFile
from kdcache.pipeline.views.parameters import draw
from kdcache.pipeline.views.render import Renderer
from kdcache.tests.helpers.building import content, quiet, settings
from kdcache.tests.helpers.commands import invoke, works
from kdcache.tests.helpers.containers import CLASSES, WRITERS, Sample, write_tar
from kdcache.tests.helpers.ffcv import Drawn
from kdcache.tests.helpers.forms import Form, bad, good, photo, saved

KINDS = [kind for kind in WRITERS if kind not in ("tensors", "tars with json")]  # of those, other tests are enough


@pytest.fixture(autouse=True)
def _place(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(str(toy))


def samples_of(forms: tuple[Form, ...]) -> list[Sample]:
    """A sample for each form, in its order, and two to evaluate on."""
    train = [Sample("train", CLASSES[2 * i // len(forms)], f"{i:02} {f.name}", f.content) for i, f in enumerate(forms)]
    return [*train, *(Sample("val", label, "x.png", saved(photo())) for label in CLASSES)]


def written(kind: str, top: Path, samples: list[Sample], patch: pytest.MonkeyPatch) -> str:
    top.mkdir()
    patch.syspath_prepend(str(top))
    return WRITERS[kind](top, samples)


@pytest.mark.parametrize("kind", KINDS)
def test_forms_that_are_taken(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = written(kind, tmp_path / "data", samples_of(good()), monkeypatch)
    data = open_data(spec, "train")
    assert len(data) == len(good()) and data.unreadable() == [] and list_unreadable(spec, "train") == []
    for i, form in enumerate(good()):
        assert form.pixels is not None and data.sizes[i].tolist() == list(form.pixels.shape[:2]), form.name
        assert np.array_equal(data.decode(i).permute(1, 2, 0), form.pixels), form.name


@pytest.mark.parametrize("kind", KINDS)
def test_forms_that_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = tuple(form for form in bad() if kind != "PIL images" or not form.by_pil)
    if kind.startswith("hf"):  # the index itself refuses rows that are empty
        empty = next(form for form in forms if not form.content)
        spec = written(kind, tmp_path / "empty", samples_of((good()[0], empty)), monkeypatch)
        with pytest.raises(InputError, match="row 1: its image is empty"):
            open_data(spec, "train")
        forms = tuple(form for form in forms if form is not empty)
    samples = samples_of(forms)
    spec = written(kind, tmp_path / "data", samples, monkeypatch)
    named = {"folder": "{0}", "csv": "{0}", "jsonl": "{0}", "parquet": "{0}", "tars": "{0}", "paths": "{0}"}.get(
        kind, " {1}"
    )
    with pytest.raises(InputError) as caught:
        open_data(spec, "train")
    assert "\n" not in str(caught.value) and "--list-unreadable" in str(caught.value)
    lines = list_unreadable(spec, "train")
    assert len(lines) == len(forms)
    for i, (form, line) in enumerate(zip(forms, lines, strict=True)):
        assert named.format(samples[i].name, i) in line.partition(": ")[0] + line and "\n" not in line
        assert kind == "PIL images" or re.search(form.refusal, line), line


def plain_copies(samples: list[Sample]) -> list[Sample]:
    """The same pixels as plain RGB PNGs."""
    pixels = {form.content: form.pixels for form in good()}
    plain = [saved(Image.fromarray(pixels[s.content])) if s.content in pixels else s.content for s in samples]
    return [Sample(s.split, s.label, f"{s.name}.png", new) for s, new in zip(samples, plain, strict=True)]


def test_both_stages_see_the_pixels_of_plain_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of(good())
    caches, views, sheets = [], [], []
    for name, these in (("forms", samples), ("plain", plain_copies(samples))):
        spec = written("folder", tmp_path / name, these, monkeypatch)
        out = tmp_path / f"{name} cache"
        kinds = {"teacher": "kd_toy:two", "augment": "rrc,flip", "topk": None, "teacher_size": 24, "workers": 0}
        build(settings(data=spec, out=str(out), **kinds), quiet)
        caches.append({path: found for path, found in content(out).items() if "/c/" in f"/{path}"})
        data = open_data(spec, "train")
        renderer = Renderer(data, 40, torch.device("cpu"), workers=1)
        drawn = [draw("rrc,flip", 0, 0, range(len(data)), data.sizes)]
        views.append([images.clone() for *_, images in renderer.views(drawn, [(np.arange(len(data)), range(1))])])
        works(f"views --data {spec} --augment rrc,flip --size 40 --out {tmp_path}/{name}.png --json".replace("'", ""))
        sheets.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert len(caches[0]) > 8 and caches[0] == caches[1]
    assert all(torch.equal(a, b) for a, b in zip(*views, strict=True))
    assert np.array_equal(*sheets)


@pytest.mark.parametrize("kind", ["folder", "tars", "PIL images"])
def test_a_packed_file_holds_the_same_pixels(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(written(kind, tmp_path / "data", samples_of(good()), monkeypatch), "train")
    cache = Drawn(tmp_path / "c", data, "rrc,flip").cache
    file = FFCVFile(pack_ffcv(cache, data, tmp_path / "x.beton", None, quiet))
    for i, form in enumerate(good()):
        assert np.array_equal(file.image(i).permute(1, 2, 0), form.pixels), form.name


# ---- names of files and folders ----

NAMES = (
    "a b.jpg", "é 猫.JPG", "new\nline.jpg", "tab\t.JpEg", "narrow\u202fspace.jpg", "-rf.jpg", "%2f.jpg", "x{0..3}.jpg",
    "q?*[1].jpg", "'\".jpg", "\udcff\udcfe.jpg", "a\\b.jpg", "👩\u200d💻.jpg",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "csv", "jsonl", "tars", "paths"])
def test_names_of_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A csv file is UTF-8. A tar's samples go by the name up to its first dot, and the second ends in "jpg" alone.
    left_out = {"csv": "\udcff", "tars": "{"}.get(kind, "\0")
    names = [name for name in NAMES if left_out not in name]
    contents = [saved(photo().resize((70 + i, 80)), "JPEG") for i in range(len(names))]
    samples = [
        Sample("train", CLASSES[i % 2], name, blob) for i, (name, blob) in enumerate(zip(names, contents, strict=True))
    ]
    val = [Sample("val", label, names[2], contents[0]) for label in CLASSES]
    spec = written(kind, tmp_path / "data", [*samples, *val], monkeypatch)
    data = open_data(spec, "train")
    assert sorted(data.sizes[:, 1].tolist()) == list(range(70, 70 + len(names)))
    assert all("\n" not in data.where(i) for i in range(len(data)))
    assert len(data.fingerprint()) == 64
    if kind != "tars":
        place = tmp_path / "data" / samples[2].path
        place.write_bytes(b"no image")
        with pytest.raises(InputError, match=r"new\\nline\.jpg: not a JPEG") as caught:
            open_data(spec, "train")
        assert "\n" not in str(caught.value)
        (line,) = list_unreadable(spec, "train")
        assert "\n" not in line and "new\\nline.jpg: not a JPEG" in line


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Class folders of images that are too large to be held in memory."""
    for split in ("train", "val"):
        for i in range(4):
            path = tmp_path / "pics" / split / CLASSES[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(saved(photo().rotate(i), "JPEG"))
    return tmp_path / "pics"


def add(path: Path, blob: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(blob)


def linked(path: Path, to: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


LEFT_OUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "hidden files": (lambda cls: (add(cls / ".DS_Store"), add(cls / "._0.jpg"), add(cls / ".cache/0.jpg")), ""),
    "what macOS adds": (lambda cls: add(cls.parent / "__MACOSX" / "bloom" / "._0.jpg"), ""),
    "what macOS adds to a class": (lambda cls: add(cls / "__MACOSX" / "0.jpg"), ""),
    "what Windows adds": (lambda cls: add(cls / "Thumbs.db"), "1 files are left out, 1 .db"),
    "other files": (lambda cls: add(cls / "notes.txt"), "1 files are left out, 1 .txt"),
    "images that are not read": (lambda cls: add(cls / "0.heic"), "1 files are left out, 1 .heic"),
    "a link to nothing": (lambda cls: linked(cls / "gone", "nowhere"), "1 without a suffix"),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_is_left_out(what: str, top: Path) -> None:
    before = open_data(f"imagefolder:{top}", "train")
    change, note = LEFT_OUT[what]
    change(top / "train" / "bloom")
    data = open_data(f"imagefolder:{top}", "train")
    assert data.fingerprint() == before.fingerprint() and data.class_names == CLASSES
    assert note in str(data.note) and ("left out" in str(data.note)) == bool(note)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty file": (lambda cls: add(cls / "9.jpg", b""), r"9\.jpg: not a JPEG.*an empty file"),
    "a format that is not read": (lambda cls: add(cls / "9.bmp"), r"9\.bmp: .* formats that cannot be decoded"),
    "a broken link": (lambda cls: linked(cls / "9.jpg", "nowhere.jpg"), r"9\.jpg: cannot be read: No such file"),
    "a link to itself": (lambda cls: linked(cls / "9.jpg", "9.jpg"), r"9\.jpg: cannot be read: Too many levels"),
    "a link upwards": (lambda cls: linked(cls / "up", ".."), r"up: a link to .*counted here again"),
    "an empty class folder": (lambda cls: (cls.parent / "none").mkdir(), "none: holds no images"),
    "a class folder with hidden files": (lambda cls: add(cls.parent / "none/.DS_Store"), "none: holds no images"),
    "a class name that is no text": (
        lambda cls: add(cls.parent / "\udcff/1.jpg"),
        r"class name '\\udcff' is not UTF-8",
    ),
    "an image above the classes": (lambda cls: add(cls.parent / "1.jpg"), r"train/1\.jpg: lies in no class folder"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_by_name(what: str, top: Path) -> None:
    change, message = REFUSED[what]
    change(top / "train" / "bloom")
    with pytest.raises(InputError, match=message) as caught:
        open_data(f"imagefolder:{top}", "train")
    assert "\n" not in str(caught.value)


def test_links_to_files_and_folders_are_followed_and_case_tells_classes_apart(top: Path, tmp_path: Path) -> None:
    (top / "train" / "bloom").rename(tmp_path / "elsewhere")
    linked(top / "train" / "bloom", str(tmp_path / "elsewhere"))
    linked(top / "train" / "Roof" / "1.jpg", str(top / "train" / "roof" / "1.jpg"))
    data = open_data(f"imagefolder:{top}", "train")
    assert data.class_names == ("Roof", "bloom", "roof") and data.labels[:, 0].tolist() == [0, 1, 1, 2, 2]
    assert torch.equal(data.decode(0), data.decode(3))


def test_a_line_for_each_image_on_the_command_line(top: Path) -> None:
    (top / "train" / "bloom" / "new\nline.jpg").write_bytes(b"")
    listed = invoke(f"build --data imagefolder:{top} --list-unreadable")
    assert listed.exit_code == 1 and len(listed.stdout.splitlines()) == 1
    as_json = json.loads(invoke(f"build --data imagefolder:{top} --list-unreadable --json").stdout)
    assert as_json == listed.stdout.splitlines()


def test_names_in_tars_and_class_names_that_are_no_text(tmp_path: Path) -> None:
    blob = saved(photo(), "JPEG")
    write_tar(tmp_path / "a.tar", [("0.jpg", blob), ("0.json", b'{"label": "\\ud800"}')])
    with pytest.raises(InputError, match=r"class name '\\ud800' is not UTF-8"):
        open_data(f"wds:{tmp_path}/a.tar", "train")
    numbers = [("0.jpg", blob), ("0.json", b'{"label": 3}')]
    write_tar(tmp_path / "b.tar", [*numbers, ("1.jpg", blob), ("1.json", b'{"label": "cat"}')])
    with pytest.raises(InputError, match=r"1\.json: its label is text, and that of .*0\.json is a number"):
        open_data(f"wds:{tmp_path}/b.tar", "train")
