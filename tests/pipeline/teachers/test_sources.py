"""Each source of teachers keeps to the contract; the last one is a toy, to show what a new source costs."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.pixels import Asked, Found, Pixels, pixels_of_data
from kdcache.pipeline.teachers.teacher import SOURCES
from kdcache.pipeline.teachers.weights import taught_file, write_weights
from kdcache.tests.contracts.teachers import TeacherContract


class TestFile(TeacherContract):
    source = "file"

    def asked(self, data):
        torch.save(build_network("resnet8", 12, 8).state_dict(), "weights.pth")
        return "resnet8", "weights.pth"


class TestTaught(TeacherContract):
    source = "taught"

    def asked(self, data):
        notes = {"input_size": 8, "mean": data.mean, "std": data.std, "class_names": data.class_names}
        write_weights(taught_file("resnet8", data), build_network("resnet8", 12, 8).state_dict(), notes)
        return "resnet8", None


class TestFunction(TeacherContract):
    source = "function"

    def asked(self, data):
        Path("own_of_sources.py").write_text(
            "import torch\ndef net(classes):\n    torch.manual_seed(1)\n"
            "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, classes))\n"
        )
        return "own_of_sources:net", None


class TestTorchvision(TeacherContract):
    source, side, classes = "torchvision", 224, 1000

    def asked(self, data):
        entry = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
        file = Path("torch/hub/checkpoints") / entry.url.rpartition("/")[2]
        file.parent.mkdir(parents=True)
        torch.save(models.squeezenet1_1().state_dict(), file)
        return "squeezenet1_1", "IMAGENET1K_V1"


class TestTimm(TeacherContract):
    source, side, classes = "timm", 160, 1000

    @pytest.fixture(autouse=True)
    def _hub(self, hub):
        self.hub = hub

    def asked(self, data):
        self.hub("test_resnet.r160_in1k")
        return "timm/test_resnet.r160_in1k", None


# ---- a new source: this function, and a line in the table ----


def constant(asked: Asked) -> Found | None:
    """constant/SEED: a linear layer of that seed."""
    family, _, seed = asked.name.partition("/")
    if family != "constant":
        return None
    torch.manual_seed(int(seed))
    pixels: Pixels = pixels_of_data(asked.data)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * pixels.size**2, len(asked.data.class_names)))
    return Found(network, pixels, asked.data.class_names, "", "from the data")


class TestToySource(TeacherContract):
    source = "constant"

    @pytest.fixture(autouse=True)
    def _table(self, monkeypatch):
        monkeypatch.setitem(SOURCES, "constant", constant)

    def asked(self, data):
        return "constant/3", None
