"""What the tests of teachers share."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdcache.tests.helpers.members import BUILD, works


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Files a network of random weights where huggingface_hub keeps downloads, and cuts the network off."""
    timm = pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def fill(name):
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=False)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
        folder = tmp_path / "hub" / f"models--timm--{name}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, snapshot / "model.safetensors")
        return network.eval(), snapshot / "model.safetensors"

    return fill


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The home of a member who has taught a resnet8 on digits and built a cache by it."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("first")
        patch.setenv("KDCACHE_HOME", str(place))
        works("teach --teacher resnet8 --epochs 1")
        works(BUILD)
    return place


@pytest.fixture
def member(tmp_path, monkeypatch):
    """Be another member, whose home is a copy of `like` or empty."""

    def be(name, like=None):
        place = tmp_path / name
        if like is not None and not place.exists():
            shutil.copytree(like, place)
        monkeypatch.setenv("KDCACHE_HOME", str(place))

    return be
