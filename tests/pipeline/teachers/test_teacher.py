"""A teacher is its source's network and sees its source's pixels: torchvision's, timm's, a file's, a user's own."""

import json
import pickle
import sys
import urllib.request
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from kdcache.cache import open_cache
from kdcache.cache.errors import InputError, NotFoundError
from kdcache.cache.identity import TeacherIdentity, canonical
from kdcache.pipeline.build.answers import teacher_renderer
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.data.kinds.base import Described
from kdcache.pipeline.data.kinds.files import FileDataset
from kdcache.pipeline.teachers.networks import build_network, load_fitting
from kdcache.pipeline.teachers.pixels import Pixels, Wanted
from kdcache.pipeline.teachers.sources.files import from_file
from kdcache.pipeline.teachers.sources.torchvision import pixels_of
from kdcache.pipeline.teachers.teacher import Classifier, file_classifier, load_teacher
from kdcache.pipeline.teachers.weights import weights_hash
from kdcache.pipeline.verify import source_of, verify
from kdcache.pipeline.views.parameters import evaluation_view
from kdcache.pipeline.views.render import Renderer, render
from kdcache.tests.helpers.places import bench_script
from kdcache.train.config import TrainConfig
from kdcache.train.run import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    return bench_script("torchvision_weights")


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def data(bench):
    """Three classes of in-memory images of 32 pixels, of a mean and std that no network wants."""
    return bench.any_data()


def quiet(_):
    pass


# ---- torchvision ----


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", "IMAGENET1K_V1"),  # without num_batches_tracked
        ("densenet121", "IMAGENET1K_V1"),  # norm.1 and conv.1
        ("googlenet", "IMAGENET1K_V1"),  # transform_input, auxiliary heads
        ("mnasnet0_5", "IMAGENET1K_V1"),  # which wants to know its version
        ("efficientnet_b0", "IMAGENET1K_V1"),  # bicubic
        ("regnet_y_400mf", "IMAGENET1K_V2"),  # which cannot be built on the meta device
        ("squeezenet1_1", "IMAGENET1K_V1"),
    ],
)
def test_a_name_of_torchvisions_answers_as_torchvisions_network(name, weights, bench):
    # All entries: bench/torchvision_weights.py.
    found = bench.check(name, models.get_model_weights(name)[weights])
    assert found["difference"] < 1e-4 and found["spread"] > 0
    assert found["file_is_the_same"]


def test_transform_input_is_a_mean_and_std(bench):
    """With the weights' own transforms, inception_v3 and googlenet see (value / 255 - 0.5) / 0.5."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name in ("inception_v3", "googlenet"):
        entry = models.get_model_weights(name).IMAGENET1K_V1
        network = models.get_model(name, weights=None, aux_logits=False, init_weights=False, transform_input=True)
        preset, wanted = entry.transforms(), pixels_of(entry)
        theirs = network._transform_input(tv.normalize(tv.to_dtype(images, scale=True), preset.mean, preset.std))
        ours = Classifier(network, wanted.mean, wanted.std).normalise(images)
        assert torch.allclose(ours, theirs, atol=1e-6) and wanted.size == preset.crop_size[0]


def test_files_of_each_family_have_a_place_and_a_size(bench, data):
    """By keys and shapes alone: the size, mean and std of the weights' transforms, and every tensor is read."""
    chosen = ("alexnet", "convnext_tiny", "efficientnet_v2_l", "inception_v3", "maxvit_t", "vgg11_bn", "vit_b_16")
    for name, entry in bench.entries():
        if name not in chosen:
            continue  # the bench has them all, with values
        with torch.device("meta"):
            options = bench.options(name, entry)
            state = models.get_model(name, weights=None, **options).state_dict()
            state = {bench.old_key(name, key): value for key, value in state.items() if "num_batches" not in key}
            file = Path("elsewhere") / bench.file_of(entry).name
            found = from_file(bench.name_for_kdcache(name), file, state, {}, data, Wanted())
        preset = entry.transforms()
        assert found.pixels.size == preset.crop_size[0], name
        assert found.pixels.interpolation == preset.interpolation.value
        if name not in ("inception_v3", "googlenet"):
            assert (list(found.pixels.mean), list(found.pixels.std)) == (preset.mean, preset.std), name
        assert found.class_names == tuple(entry.meta["categories"])


def test_imagenet_takes_torchvisions_weights_without_being_asked(bench, tmp_path, capsys):
    """The mission's own line, with a file as it is published."""
    bench.write("resnet18", models.ResNet18_Weights.IMAGENET1K_V1)
    colours = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3), dtype=np.uint8)
    for place, images in zip(("train", "val"), colours, strict=True):
        for i, image in enumerate(images):
            folder = tmp_path / "images" / place / f"n0144{i % 2}764"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((80, 70)).save(folder / f"{i}.png")
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"n01440764": "tench", "n01441764": "goldfish"}))
    said: list[str] = []
    config = BuildConfig(
        "resnet18", data=f"imagenet:{tmp_path / 'images'}", class_map=str(mapping), views=1, workers=0, batch_size=5,
        allow_low_accuracy=True, device="cpu", out=str(tmp_path / "cache"),
    )  # fmt: skip
    build(config, said.append)
    assert next(line for line in said if line.startswith("teacher: ")) == (
        "teacher: resnet18 IMAGENET1K_V1, 224 px, bilinear, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, from "
        "torchvision's weights"
    )
    assert not any(line.startswith("note: nothing tells the names") for line in said)
    cache = open_cache(tmp_path / "cache")
    assert source_of(cache, config.data, class_map=str(mapping)).identity == cache.identity
    assert capsys.readouterr().out == ""


def test_a_file_of_torchvisions_with_a_name_of_ones_own(bench, data, tmp_path):
    state = bench.published("densenet121", models.DenseNet121_Weights.IMAGENET1K_V1)
    torch.save(state, tmp_path / "mine.pth")
    found = load_teacher("densenet121", data, CPU, weights=str(tmp_path / "mine.pth"))
    assert found.class_names is None and found.input_size == 224  # 1,000 classes, but whose?
    assert "as torchvision's IMAGENET1K_V1 wants it; --teacher-size, --teacher-mean and --teacher-std" in found.about
    few = build_network("squeezenet1_1", 3, 32)
    torch.save(few.state_dict(), tmp_path / "few.pth")
    found = load_teacher("squeezenet1_1", data, CPU, weights=str(tmp_path / "few.pth"))
    assert (found.input_size, found.identity.mean, found.identity.std) == (32, data.mean, data.std)
    assert "from the data; --teacher-size" in found.about


def in_files(data, place):
    """A dataset of the same description, whose three images would be files."""
    described = {field.name: getattr(data, field.name) for field in fields(Described) if field.init}
    return FileDataset(**described, root=place, paths=("a", "b", "c"))


def test_the_stem_in_a_file_decides(data, tmp_path):
    """A resnet's 7x7 stem is not for 32 pixels, nor its 3x3 stem for 224, unless one says so."""
    torch.manual_seed(0)
    for size, other, stem in ((224, 32, ""), (32, 224, " (3x3 stem)")):
        network = build_network("resnet18", 3, size)
        file = tmp_path / f"{size}.pth"
        torch.save(network.state_dict(), file)
        shown = data if other == 32 else in_files(data, tmp_path)
        with pytest.raises(InputError, match=rf"{size}.pth holds resnet18 with the \dx\d stem .* give --teacher-size"):
            load_teacher("resnet18", shown, CPU, weights=str(file))
        teacher = load_teacher("resnet18", shown, CPU, weights=str(file), wanted=Wanted(size=64))
        assert teacher.input_size == 64 and teacher.identity.architecture == f"resnet18{stem}"
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        with torch.inference_mode():
            theirs = Classifier(network, teacher.identity.mean, teacher.identity.std).eval()(images)
        assert torch.allclose(teacher.logits(images), theirs, atol=1e-4)


def test_a_batch_norm_may_lack_its_count_and_nothing_else():
    torch.manual_seed(0)
    network, like = build_network("resnet8", 3, 32), build_network("resnet8", 3, 32)
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_fitting(like, state, "the weights")
    assert weights_hash(like.state_dict()) == weights_hash(network.state_dict())
    del state["fc.bias"]
    with pytest.raises(InputError, match=r"^the weights do not fit: 1 missing \(fc.bias\)$"):
        load_fitting(like, state, "the weights")


def test_a_taught_mnasnet_is_read_back(data, tmp_path):
    """Its class refuses a state dict without a version, and safetensors has none."""
    torch.manual_seed(0)
    model = Classifier(build_network("mnasnet0_5", 3, 32), data.mean, data.std)
    notes = {"input_size": 32, "mean": data.mean, "std": data.std, "class_names": data.class_names}
    file_classifier(tmp_path / "taught.safetensors", model, notes)
    found = load_teacher("mnasnet0_5", data, CPU, weights=str(tmp_path / "taught.safetensors"))
    assert found.identity.weights == weights_hash(model.network.state_dict())
    assert found.class_names == data.class_names and "from its notes" in found.about


def test_what_torchvision_does_not_have(bench, data, monkeypatch):
    for name, weights, problem in (
        ("vgg13", "IMAGENET1K_V1", "torchvision's is torchvision/vgg13: give --weights FILE"),
        ("resnet20", "IMAGENET1K_V1", "no pretrained weights for 'resnet20'"),
        ("resnet18", "IMAGENET1K_V2", "resnet18 has no weights IMAGENET1K_V2: take one of IMAGENET1K_V1"),
        ("vgg16", "IMAGENET1K_FEATURES", "features without a classifier"),
        ("timm/resnet10t", "IMAGENET1K_V1", "part of the teacher's name: timm/resnet10t.c3_in1k"),
    ):
        with pytest.raises(InputError, match=problem):
            load_teacher(name, data, CPU, weights=weights)
    monkeypatch.setattr(urllib.request, "urlopen", _no_network)
    monkeypatch.setattr(torch.hub, "urlopen", _no_network)
    with pytest.raises(
        InputError,
        match=r"^cannot fetch DEFAULT of resnet34 \(OSError: no network\): fetch "
        r"https://download.pytorch.org/models/resnet34-b627a593.pth yourself and give --weights FILE$",
    ):
        load_teacher("resnet34", data, CPU, weights="DEFAULT")


def _no_network(*_args, **_options):
    raise OSError("no network")


class _Evil:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.mkdir, (self.proof,)


def test_code_in_a_file_that_torchvision_fetched_is_not_run(bench, data, tmp_path):
    file = bench.file_of(models.ResNet18_Weights.IMAGENET1K_V1)
    file.parent.mkdir(parents=True)
    torch.save({"fc.bias": torch.zeros(2), "more": _Evil(tmp_path / "proof")}, file)
    with pytest.raises(InputError, match=rf"^{file} cannot be used as IMAGENET1K_V1 of resnet18 .*remove it"):
        load_teacher("resnet18", data, CPU, weights="IMAGENET1K_V1")
    assert not (tmp_path / "proof").exists()
    with file.open("rb") as f, pytest.raises(Exception):  # noqa: B017  the file does hold code
        pickle.load(f)


# ---- timm ----

TIMM = [
    "test_byobnet.r160_in1k", "test_convnext.r160_in1k", "test_convnext2.r160_in1k", "test_efficientnet.r160_in1k",
    "test_nfnet.r160_in1k", "test_resnet.r160_in1k",
    "test_vit.r160_in1k", "test_vit3.r160_in1k", "resnet10t.c3_in1k", "mobilenetv3_small_050.lamb_in1k",
]  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_a_name_of_timms_answers_as_timms_pipeline(name, hub, data):
    import timm

    network, file = hub(name)
    want = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**{**want, "crop_pct": 1.0})
    pixels = np.random.default_rng(0).integers(0, 256, (*want["input_size"][1:], 3), dtype=np.uint8)
    with torch.inference_mode():
        theirs = network(transform(Image.fromarray(pixels))[None])
    teacher = load_teacher(f"timm/{name}", data, CPU)
    ours = teacher.logits(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert teacher.identity.interpolation == want["interpolation"] and teacher.input_size == want["input_size"][1]
    assert teacher.class_names == tuple(models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    by_file = load_teacher(f"timm/{name}", data, CPU, weights=str(file))
    assert by_file.identity == teacher.identity and by_file.class_names is None


def test_what_timm_does_not_have(data, hub):
    with pytest.raises(InputError, match=r"^cannot fetch the weights of timm/resnet10t.c3_in1k .*: fetch model.safe"):
        load_teacher("timm/resnet10t.c3_in1k", data, CPU)
    with pytest.raises(InputError, match="timm has no weights 'c4_in1k' of resnet10t"):
        load_teacher("timm/resnet10t.c4_in1k", data, CPU)
    with pytest.raises(NotFoundError, match=r"or with --class-map one of timm/resnet10t.c3_in1k$"):
        load_teacher("timm/resnet10t", data, CPU)
    with pytest.raises(InputError, match=r"dinov2.lvd142m are features without a classifier: take --weights FILE"):
        load_teacher("timm/vit_small_patch14_dinov2.lvd142m", data, CPU)


def test_imagenet_takes_timms_first_weights(hub, data):
    hub("test_resnet.r160_in1k")
    teacher = load_teacher("timm/test_resnet", replace(data, name="imagenet"), CPU)
    assert teacher.about.startswith("timm/test_resnet r160_in1k, 160 px, bilinear, mean 0.5 0.5 0.5, std 0.5 0.5 0.5, ")


def test_a_fine_tuned_file_says_what_it_wants(data, tmp_path):
    """The config.json that timm saves, else timm's own for that name; and flags over both."""
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet10t", num_classes=3)
    preset = {"pretrained_cfg": {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.25] * 3}}
    told = {**preset, "label_names": ["x", "y", "z"]}
    timm.models.save_for_hf(network, tmp_path / "saved", model_config=told, safe_serialization=True)
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    saved = load_teacher("timm/resnet10t", data, CPU, weights=str(tmp_path / "saved" / "model.safetensors"))
    assert (saved.input_size, saved.identity.mean, saved.identity.std) == (96, (0.5,) * 3, (0.25,) * 3)
    assert saved.class_names == ("x", "y", "z") and "from config.json beside it" in saved.about
    bare = load_teacher("timm/resnet10t", data, CPU, weights=str(tmp_path / "bare.pth"))
    assert (bare.input_size, bare.identity.mean) == (176, (0.485, 0.456, 0.406)) and bare.class_names is None
    assert bare.identity.interpolation == "bicubic" and "--teacher-size" in bare.about
    wanted = Wanted(96, (0.5,) * 3, (0.25,) * 3, saved.identity.interpolation)
    asked = load_teacher("timm/resnet10t", data, CPU, weights=str(tmp_path / "bare.pth"), wanted=wanted)
    assert asked.identity == saved.identity and "(size, mean, std, interpolation as asked for)" in asked.about
    with pytest.raises(InputError, match=r"config.json is of resnet10t, not of timm/resnet18"):
        load_teacher("timm/resnet18", data, CPU, weights=str(tmp_path / "saved" / "model.safetensors"))


def test_position_tables_are_resized_only_when_asked_for(data, tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=96).state_dict(), tmp_path / "96.pth")
    with pytest.raises(InputError, match=r"pos_embed is \(1, 37, 64\), the network has \(1, 101, 64\)"):
        load_teacher("timm/test_vit", data, CPU, weights=str(tmp_path / "96.pth"))
    found = load_teacher("timm/test_vit", data, CPU, weights=str(tmp_path / "96.pth"), wanted=Wanted(96))
    assert found.input_size == 96


# ---- files, functions, and what was asked for ----

OWN = """
import numpy as np, torch
from torch import nn

def images(split):
    rng = np.random.default_rng(split == "train")
    return rng.integers(0, 256, (30, 12, 20, 3), dtype=np.uint8), np.arange(30) % 3, ("a", "b", "c")

def net(classes):
    torch.manual_seed(1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, classes))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_of_teachers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_of_teachers"
    sys.modules.pop("own_of_teachers", None)


def test_non_square_images_are_not_enlarged_to_224(own):
    data = open_data(f"{own}:images", "train")
    teacher = load_teacher(f"{own}:net", data, CPU)
    assert teacher.input_size == 20  # the longer side
    images = next(Renderer(data, 20, CPU).batches(evaluation_view(data.sizes, whole=True), [np.arange(3)]))
    want = tv.resize(data.pixels[:3].permute(0, 3, 1, 2), [20, 20], antialias=True)
    assert torch.equal(images, want)


def test_nobody_knows_the_names_of_a_functions_classes(own, tmp_path):
    said: list[str] = []
    config = BuildConfig(f"{own}:net", data=f"{own}:images", device="cpu", allow_low_accuracy=True)
    source = open_source(config, said.append)
    assert source.teacher.class_names is None
    assert said[0].startswith(f"teacher: {own}:net, 20 px, bilinear, mean ")
    assert said[1].startswith("note: nothing tells the names of the teacher's classes: its class i is taken for")
    with pytest.raises(InputError, match="the names of the teacher's classes are not known: give a file"):
        open_source(replace(config, class_map="auto"))


def test_a_function_may_give_a_network_of_timms(own, tmp_path):
    pytest.importorskip("timm")
    with Path("own_of_teachers.py").open("a") as f:
        f.write("\ndef vit(classes):\n    import timm\n    return timm.create_model('test_vit', num_classes=classes)\n")
    teacher = load_teacher(f"{own}:vit", open_data(f"{own}:images", "train"), CPU)
    assert (teacher.input_size, teacher.identity.mean) == (160, (0.5,) * 3) and "its pretrained_cfg" in teacher.about
    torch.save({"model": teacher.model.network.state_dict()}, tmp_path / "vit.pth")
    by_file = load_teacher(f"{own}:vit", open_data(f"{own}:images", "train"), CPU, weights=str(tmp_path / "vit.pth"))
    assert by_file.identity == teacher.identity and "vit.pth#model, 160 px" in by_file.about


def test_what_was_asked_for_is_replayed(own, tmp_path):
    """verify and train --online show the cache's teacher what its identity says."""
    config = BuildConfig(
        f"{own}:net", data=f"{own}:images", views=1, teacher_size=16, teacher_mean=(0.5, 0.4, 0.3),
        teacher_std=(0.2, 0.3, 0.4), teacher_interpolation="bicubic", device="cpu", workers=0, batch_size=10,
        allow_low_accuracy=True, out=str(tmp_path / "cache"),
    )  # fmt: skip
    build(config, quiet)
    cache = open_cache(tmp_path / "cache")
    had = cache.identity.teacher
    assert (had.input_size, had.mean, had.std) == (16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert had.interpolation == "bicubic"
    source = source_of(cache, data=config.data, teacher=config.teacher)
    report = verify(cache, source)
    assert report.passed and report.total_variation == 0
    data = source.train
    shown = next(teacher_renderer(data, source, 0).batches(evaluation_view(data.sizes, whole=True), [np.arange(4)]))
    pixels = data.pixels[:4].permute(0, 3, 1, 2)
    assert torch.equal(shown, tv.resize(pixels, [16, 16], InterpolationMode.BICUBIC, antialias=True))
    train(
        TrainConfig(
            "kd", cache=str(tmp_path / "cache"), data=config.data, student=f"{own}:net", epochs=1, batch_size=10,
            online=True, teacher=config.teacher, device="cpu", workers=0, out=str(tmp_path / "run"),
        ),
        quiet,
    )  # fmt: skip


def test_the_usual_interpolation_is_no_part_of_a_key():
    plain = TeacherIdentity(
        architecture="a", weights="0" * 64, mean=(0.5,) * 3, std=(0.5,) * 3, input_size=8, numeric="float32"
    )
    assert b"interpolation" not in canonical(plain)
    cubic = plain.model_copy(update={"interpolation": "bicubic"})
    assert TeacherIdentity.model_validate_json(canonical(cubic)) == cubic
    assert TeacherIdentity.model_validate_json(canonical(plain)) == plain


def test_bicubic_cuts_are_torchvisions():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for kind in ("bilinear", "bicubic"):
        got = render(image, (3, 5, 30, 20), False, (17, 17), kind)
        want = tv.resized_crop(image, 3, 5, 30, 20, [17, 17], InterpolationMode(kind), antialias=True)
        assert torch.equal(got, want), kind


def test_a_wanted_size_of_pixels_leaves_the_rest_to_the_source():
    said = Pixels(224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
    assert Wanted(96).over(said) == replace(said, size=96)
    assert str(Wanted(96, std=(1.0, 1.0, 1.0))) == "size, std" and str(Wanted()) == ""


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--teacher-mean", "124,117,104"), "pixels go from 0 to 1 here"),
        (("--teacher-std", "0.2,0,0.2"), "nothing can be divided by 0"),
        (("--teacher-mean", "0.5,0.5"), "three numbers such as 0.485,0.456,0.406"),
        (("--teacher-size", "0"), "1<=x<=4096"),
    ],
)
def test_flags_of_pixels_are_checked(flags, problem):
    from click.testing import CliRunner

    from kdcache.cli import main

    found = CliRunner().invoke(main, ["build", "--teacher", "resnet8", *flags])
    assert found.exit_code == 2 and problem in found.output
