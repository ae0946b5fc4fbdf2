"""timm/NAME:KEY=VALUE,...: one spelling in identities, one line for each mistake, and the network that timm builds."""

import json
from pathlib import Path

import pytest
import torch

from kdcache.cache import open_cache
from kdcache.cache.errors import InputError
from kdcache.pipeline.data.dataset import open_data
from kdcache.pipeline.teachers.networks import build_network, built_for, canonical_name, split_arguments
from kdcache.pipeline.teachers.pixels import Wanted
from kdcache.pipeline.teachers.teacher import load_teacher
from kdcache.pipeline.teachers.weights import taught_file
from kdcache.pipeline.trust import stored_network
from kdcache.tests.helpers.images import arrays_data
from kdcache.tests.helpers.lazily import Lazily
from kdcache.tests.helpers.members import works

timm = Lazily("timm", optional=True)
CPU = torch.device("cpu")


@pytest.fixture
def data():
    return arrays_data(6, 8, 8)


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("written", "canonical", "arguments"),
    [
        ("resnet18", "resnet18", {}),
        ("timm/vit_tiny_patch16_224", "timm/vit_tiny_patch16_224", {}),
        ("timm/test_vit.r160_in1k:img_size=096", "timm/test_vit.r160_in1k:img_size=96", {"img_size": 96}),
        (
            "timm/test_vit:global_pool=avg,class_token=FALSE,img_size=96,drop_path_rate=1e-1",
            "timm/test_vit:class_token=false,drop_path_rate=0.1,global_pool=avg,img_size=96",
            {"class_token": False, "drop_path_rate": 0.1, "global_pool": "avg", "img_size": 96},
        ),
        ("nets:timm", "nets:timm", {}),
    ],
)
def test_a_name_has_one_spelling(written, canonical, arguments):
    assert canonical_name(written) == canonical == canonical_name(canonical)
    assert split_arguments(written)[1] == arguments and built_for(written) == arguments.get("img_size")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("timm/test_vit:", "'' is no argument such as img_size=96"),
        ("timm/test_vit:img_size", "'img_size' is no argument such as img_size=96"),
        ("timm/test_vit:img_size=", "'img_size=' is no argument such as img_size=96"),
        ("timm/test_vit:img_size=96,img_size=64", "img_size is given twice"),
        ("timm/test_vit:img_size=big", "img_size is a number of pixels from 1 to 4096, as in img_size=96"),
        ("timm/test_vit:img_size=99999", "img_size is a number of pixels from 1 to 4096, as in img_size=96"),
        ("timm/test_vit:num_classes=5", "num_classes is not for a name to say: kdcache gives it, or cannot use it"),
        ("timm/test_vit:checkpoint_path=a.pth", "checkpoint_path is not for a name to say"),
        ("timm/test_vit:pretrained=true", "pretrained is not for a name to say"),
        ("timm/test_vit:imgsize=96", "cannot be built: TypeError: "),
        ("timm/test_vit:act_layer=nothing", "cannot be built: "),
    ],
)
def test_mistakes_are_one_line(name, problem):
    with pytest.raises(InputError) as caught:
        build_network(name, 3, 32)
    message = str(caught.value)
    assert message.startswith(f"network {name!r}") and problem in message and "\n" not in message


def test_the_network_is_timms():
    torch.manual_seed(0)
    ours = build_network("timm/test_vit:img_size=32,global_pool=avg", 5, 32).eval()
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=5, img_size=32, global_pool="avg").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs(images))


def test_drop_path_is_active_in_training_alone():
    torch.manual_seed(0)
    network = build_network("timm/test_vit:img_size=32,drop_path_rate=0.5", 5, 32)
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(network.train()(images), network(images))
        assert torch.equal(network.eval()(images), network(images))


def test_a_teacher_in_a_file(data):
    network = timm.create_model("test_vit", num_classes=12, img_size=96).eval()
    torch.save({"state_dict": network.state_dict()}, "vit.pth")
    teacher = load_teacher("timm/test_vit:img_size=+96", data, CPU, weights="vit.pth")
    assert teacher.identity.architecture == teacher.identity.network == "timm/test_vit:img_size=96"
    assert teacher.input_size == 96 and teacher.about.startswith("timm/test_vit:img_size=96 vit.pth#state_dict, 96 px")
    plain = load_teacher("timm/test_vit", data, CPU, weights="vit.pth", wanted=Wanted(size=96))
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    assert torch.equal(teacher.logits(images), plain.logits(images))
    assert plain.identity == teacher.identity.model_copy(update={"architecture": "timm/test_vit"})


def test_weights_that_timm_publishes(hub, data):
    hub("test_vit.r160_in1k")
    teacher = load_teacher("timm/test_vit.r160_in1k:img_size=96", data, CPU)
    assert teacher.input_size == 96 and teacher.classes == 1000 and "r160_in1k, 96 px" in teacher.about


def test_a_file_may_name_arguments_and_no_function():
    assert stored_network("timm/test_vit:img_size=96", "a cache", "--teacher") == "timm/test_vit:img_size=96"
    with pytest.raises(InputError, match="is never called"):
        stored_network("test_vit:img_size", "a cache", "--teacher")


def test_from_teaching_to_a_student():
    """All commands know the teacher by its name, however its arguments are written."""
    name, other = "timm/test_vit:img_size=32,class_token=true", "timm/test_vit:class_token=True,img_size=32"
    works(f"teach --teacher {name} --epochs 1")
    taught = taught_file(other, open_data("digits", "train"))
    assert taught.exists() and taught.name == "timm-test_vit-class_token=true,img_size=32.safetensors"
    works(f"build --teacher {other} --views 1 --allow-low-accuracy --out cache")
    assert open_cache("cache").identity.teacher.input_size == 32
    works(f"train --cache cache --teacher {name} --student {name} --epochs 1 --out run")
    config = json.loads(Path("run/config.json").read_text())
    assert config["student"] == "timm/test_vit:class_token=true,img_size=32" and config["image_size"] == 32
    works("eval run")
    works(f"train --resume --out run --student {other}")
