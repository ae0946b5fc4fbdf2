"""Exported students: they answer as they did, by what the JSON beside them tells, without kdcache."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from kdcache.cache import KdcacheError
from kdcache.cache.errors import InputError, MismatchError
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.weights import read_weights
from kdcache.tests.helpers.commands import invoke, works
from kdcache.tests.helpers.places import ROOT
from kdcache.tests.helpers.training import quiet
from kdcache.train.config import TrainConfig
from kdcache.train.evaluate import evaluate_run, student_of
from kdcache.train.export import formats
from kdcache.train.export.config import ExportConfig
from kdcache.train.export.export import export, images_of, preprocessing
from kdcache.train.run import train

SUFFIX = {"onnx": ".onnx", "torchscript": ".pt"}
CANNOT = [("onnx", "branching"), ("torchscript", "branching"), ("torchscript", "counting")]
STUDENTS = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.one, self.other = nn.Linear(192, classes), nn.Linear(192, classes)
    def forward(self, x):
        x = x.flatten(1)
        return self.one(x) if x.sum() > 50 else self.other(x)

class Counting(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.last = nn.Linear(192, classes)
    def forward(self, x):
        return self.last(x.flatten(1)) + 0.01 * torch.tensor(float(len(x.tolist())))

branching, counting = Branching, Counting
"""


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(TrainConfig("nkd", str(home / "default"), epochs=1, batch_size=128, out=str(out)), quiet)
    return out


def logits_of(file, images):
    """What the file answers for float32 images [B, 3, S, S], by its format's own runtime."""
    if file.suffix == ".pt":
        with formats.quietly():
            return torch.jit.load(file)(images).numpy()
    import onnxruntime

    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})[
        0
    ]


def notes_in(file):
    if file.suffix == ".pt":
        found = {"kdcache.json": ""}
        with formats.quietly():
            torch.jit.load(file, _extra_files=found)
        return json.loads(found["kdcache.json"])
    import onnx

    return json.loads({p.key: p.value for p in onnx.load(file).metadata_props}["kdcache.json"])


def prepared(pixels, about):
    """uint8 [B, H, W, 3] of the right size, normalised as the JSON says, in float64."""
    how = about["preprocessing"]
    x = (pixels.astype(np.float64) / 255 - how["mean"]) / how["std"]
    return torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("to", "traced"), [("onnx", False), ("onnx", True), ("torchscript", True)])
def test_an_exported_student_answers_as_it_did(run, tmp_path, monkeypatch, to, traced):
    """Also ONNX by way of tracing, as with torch before 2.9."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
        monkeypatch.setattr(formats, "_by_export", lambda: not traced)
    file = tmp_path / f"out/student{SUFFIX[to]}"
    result = works(["export", str(run), "--to", to, "--out", str(file), "--json"])
    facts, about = json.loads(result.stdout), json.loads((tmp_path / f"out/student{SUFFIX[to]}.json").read_text())
    assert result.stderr.splitlines() == [f"exporting resnet8 to {to}"]  # nothing of the exporters
    assert facts["check"] == about["check"] and facts["file"] == str(file)
    assert about["check"]["images"] == about["check"]["same_top1"] == 355
    assert 0 < about["check"]["max_logit_difference"] < 1e-4 < about["check"]["max_logit"]
    assert about["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert notes_in(file) == {k: v for k, v in about.items() if k not in ("sha256", "check")}
    assert (about["class_names"], about["settings"]["loss"]) == ([str(c) for c in range(10)], "nkd")
    assert about["preprocessing"]["input_size"] == [3, 8, 8] and about["input"]["shape"] == ["batch", 3, 8, 8]
    assert str(run.parent) not in json.dumps(about)  # where things lay on this machine is nobody's business
    evaluation = open_data("digits", "eval")
    x = prepared(evaluation.pixels.numpy(), about)
    got = np.concatenate([logits_of(file, x[:1]), logits_of(file, x[1:8]), logits_of(file, x[8:])])
    model = student_of(run, *read_weights(run / "last.safetensors")).eval()
    with torch.no_grad():
        want = model(evaluation.pixels.permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert (got.argmax(1) == evaluation.labels[:, 0]).mean() == pytest.approx(evaluate_run(str(run))["top1"])
    works(["export", str(run), "--to", to, "--out", str(file)])  # again, over what it wrote


def test_the_file_needs_no_kdcache(run, tmp_path):
    export(ExportConfig(str(run), "torchscript", out=str(tmp_path / "s.pt")), quiet)
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import torch; "
        "found = any(name.split('.')[0] == 'kdcache' for name in sys.modules); "
        "print(torch.jit.load('s.pt')(torch.zeros(3, 3, 8, 8)).shape, found)"
    )
    found = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["torch.Size([3,", "10])", "False"]


def test_the_steps_for_image_files_give_the_pixels_of_the_evaluation(tmp_path):
    """Bit by bit, if they are resized by torchvision; Pillow resizes a level or two off."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 3)):
        for c in "ab":
            (tmp_path / "pics" / split / c).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (30 + i, 41, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pics" / split / c / f"{i}.png")
    data = open_data(f"imagefolder:{tmp_path / 'pics'}", "eval")
    one, rest = images_of(data, ExportConfig("run", "onnx", images=6, workers=0), 20)
    how = preprocessing({"input_size": 20, "mean": [0.5] * 3, "std": [0.2] * 3}, data.in_memory)
    assert (how["crop_pct"], how["crop_mode"]) == (0.875, "center") and "7/8 of the shorter side" in how["steps"][0]
    for i, got in enumerate(torch.cat([one, rest])):
        image = torch.from_numpy(np.array(Image.open(data.file(i)))).permute(2, 0, 1)
        side = min(image.shape[1:]) * 7 // 8
        top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
        square = image[:, top : top + side, left : left + side]
        assert torch.equal(got, tv.resize(square, [20, 20], antialias=True))


@pytest.mark.parametrize(("to", "name"), CANNOT)
def test_a_student_that_cannot_be_exported_is_refused_and_nothing_is_written(home, tmp_path, monkeypatch, to, name):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("students_of_test.py").write_text(STUDENTS)
    student = f"students_of_test:{name}"
    options = {"student": student, "epochs": 1, "batch_size": 512}
    train(TrainConfig("ce", str(home / "default"), out=f"run-{name}", **options), quiet)
    config = ExportConfig(f"run-{name}", to, student=student)
    with pytest.raises((InputError, MismatchError), match=f"{student}") as refused:
        export(config, quiet)
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 500
    left = {path.name for path in Path(f"run-{name}").iterdir()}
    assert not left & {"last.onnx", "last.onnx.json", "last.pt", "last.pt.json"}
    sys.modules.pop("students_of_test")


def test_what_is_there_already_is_not_written_over(run, tmp_path):
    state = (run / "state.pt").read_bytes()
    refused = [
        (["--out", str(run / "state.pt")], "kdcache export has not written it"),
        (["--out", str(run / "last.safetensors")], "the name has to end in .pt"),
        (["--out", str(run / "last.onnx")], "the name has to end in .pt"),
        (["--data", "nothing-of-that-name"], "unknown dataset"),
        (["--student", "resnet20"], "do not fit"),
    ]
    (tmp_path / "x.pt.json").write_text("[]")
    refused.append((["--out", str(tmp_path / "x.pt")], "x.pt.json exists"))
    for options, reason in refused:
        result = invoke(["export", str(run), "--to", "torchscript", *options])
        assert result.exit_code == 2 and reason in result.stderr and "Traceback" not in result.output
    assert (run / "state.pt").read_bytes() == state and not (run / "last.pt").exists()


def test_a_disk_that_is_full_leaves_no_file_without_its_json(run, tmp_path, monkeypatch):
    written = []

    def once(path, content):
        written.append(path.name)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(content)

    monkeypatch.setattr("kdcache.train.export.export.replace_file", once)
    with pytest.raises(OSError, match="No space"):
        export(ExportConfig(str(run), "torchscript", out=str(tmp_path / "s.pt")), quiet)
    assert written == ["s.pt.json", "s.pt"] and not (tmp_path / "s.pt").exists()


def test_onnx_without_its_packages_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(KdcacheError, match=r"--to onnx(: onnxruntime cannot be imported| needs)"):
        export(ExportConfig(str(run), "onnx"), quiet)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The modules of docs/students.md, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "students.md").read_text(), re.DOTALL):
        (tmp_path / re.match(r"# (\w+\.py): ", block)[1]).write_text(block)


def test_the_program_in_the_docs_answers_as_the_student_does(run, page):
    """For images of data in memory, which it takes whole, and for those of image files, whose middle it takes."""
    pytest.importorskip("onnxruntime")
    works(["export", str(run), "--to", "onnx", "--out", "s.onnx"])
    evaluation = open_data("digits", "eval")
    names = [f"{i}.png" for i in range(30)]
    for name, pixels in zip(names, evaluation.pixels.numpy()[::12], strict=True):
        Image.fromarray(pixels).save(name)
    found = subprocess.run([sys.executable, "answer.py", "s.onnx", *names], capture_output=True, text=True, check=True)
    model = student_of(run, *read_weights(run / "last.safetensors")).eval()
    with torch.no_grad():
        want = model(evaluation.pixels[::12].permute(0, 3, 1, 2)).argmax(1).tolist()
    assert found.stdout.splitlines() == [f"{name} {c}" for name, c in zip(names, want, strict=True)]
    about = json.loads(Path("s.onnx.json").read_text())
    about["preprocessing"].update(crop_pct=0.875, crop_mode="center")
    Path("s.onnx.json").write_text(json.dumps(about))
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[1:9, 11:19] = evaluation.pixels.numpy()[0]
    Image.fromarray(wide).save("wide.png")
    cut = subprocess.run(
        [sys.executable, "answer.py", "s.onnx", "wide.png"], capture_output=True, text=True, check=True
    )
    assert cut.stdout.split() == ["wide.png", str(want[0])]


def test_the_pretrained_student_in_the_docs_is_one(page, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(".")
    from pretrained import student

    assert student(7, pretrained=False).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    sys.modules.pop("pretrained")
