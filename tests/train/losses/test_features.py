"""Which map uskd's features are taken from, and along which of its sides they are averaged."""

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2

from kdcache.cache import KdcacheError
from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.tests.helpers.lazily import Lazily
from kdcache.train.losses.features import FeatureTap

timm = Lazily("timm.models")


def swin(width, **more):
    heads = [1, 1, 2, 2]
    return SwinTransformer([4, 4], width, [1, 1, 1, 1], heads, [2, 2], stochastic_depth_prob=0.0, num_classes=5, **more)


def maxvit():
    return MaxVit((64, 64), 8, 2, [8, 16, 24, 32], [1, 1, 1, 1], 8, 0.0, num_classes=5)


def timm_swin():
    return timm.SwinTransformer(
        64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2, num_classes=5
    )


def convnext():
    return timm.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5)


def plain_resnet():
    """With its last map a single pixel at 32 px, as the global average of it is."""
    return models.resnet18(num_classes=5)


# Network, pixels, the module whose output is meant, its channels, and the sides that are space.
NCHW, NHWC = (2, 3), (1, 2)
CASES = {
    "swin_t": (lambda: build_network("swin_t", 5, 64), 64, "features.5", 384, NHWC),
    "swin": (lambda: swin(8), 64, "features.5", 32, NHWC),
    "swin v2": (lambda: swin(8, block=SwinTransformerBlockV2), 64, "features.5", 32, NHWC),
    "swin, one pixel": (lambda: swin(8), 32, "features.5", 32, NHWC),
    "swin, a cube": (lambda: swin(4), 256, "features.5", 16, NHWC),
    "timm's swin": (timm_swin, 64, "layers.2", 32, NHWC),
    "timm's convnext": (convnext, 64, "stages.2", 24, NCHW),
    "maxvit": (maxvit, 64, "blocks.2", 24, NCHW),
    "resnet20": (lambda: build_network("resnet20", 5, 32), 32, "stages.1", 32, NCHW),
    "resnet20, a cube": (lambda: build_network("resnet20", 5, 64), 64, "stages.1", 32, NCHW),
    "resnet18": (plain_resnet, 64, "layer3", 256, NCHW),
    "resnet18, one pixel": (plain_resnet, 32, "layer3", 256, NCHW),
}


@pytest.mark.parametrize("name", CASES)
def test_features_are_those_of_the_stage_before_the_last(name):
    make, size, place, channels, space = CASES[name]
    torch.manual_seed(0)
    model = Classifier(make(), (0.5,) * 3, (0.25,) * 3)
    tap = FeatureTap(model, size)
    assert tap.channels == channels and model.training
    maps = []
    model.network.get_submodule(place).register_forward_hook(lambda *given: maps.append(given[2]))
    with torch.no_grad():
        model.eval()(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    (found,) = maps
    assert found.shape[space[0]] == found.shape[space[1]] > 1
    want = found.double().mean(space)
    assert want.shape == (2, channels)
    torch.testing.assert_close(tap.features.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.VisionTransformer(32, 16, embed_dim=8, depth=1, num_heads=2, num_classes=5),
        lambda: models.VisionTransformer(32, 16, 1, 2, 8, 8, num_classes=5),
        lambda: timm.MlpMixer(num_classes=5, img_size=32, patch_size=16, num_blocks=1, embed_dim=8),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)),
    ],
    ids=["timm's vit", "vit", "mixer", "linear"],
)
def test_a_network_without_stages_is_refused_in_one_line(make):
    with pytest.raises(KdcacheError, match="uskd needs a student with a stage before its last map") as caught:
        FeatureTap(Classifier(make(), (0.5,) * 3, (0.25,) * 3), 32, "uskd")
    assert "\n" not in str(caught.value)
