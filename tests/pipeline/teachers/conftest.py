"""What the tests of teachers share."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn


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
