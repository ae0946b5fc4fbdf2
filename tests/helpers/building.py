"""A toy dataset and toy teachers, for builds that take no time."""

from kdcache.pipeline.build.config import BuildConfig

# 150 images in parts of 64, 64 and 22; batches of 16, the last of each split short.
TOY = """
import numpy as np, torch
from torch import nn

def images(split):
    rng = np.random.default_rng(split == "train")
    labels = np.arange(150 if split == "train" else 40) * 5 % 12
    patterns = np.random.default_rng(2).integers(0, 256, (12, 10, 10, 3))
    noisy = patterns[labels] + rng.normal(0, 60, (len(labels), 10, 10, 3))
    return np.clip(noisy, 0, 255).astype("u1"), labels, tuple("abcdefghijkl")

def net(classes, width=8, stride=2, side=3):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = nn.Sequential(
            nn.Conv2d(3, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(16 * side * side, classes))
        with torch.no_grad():
            found[-1].weight.mul_(8)
        return found

def twelve():
    return net(12)

def thousand():
    return net(1000, 4, 8, 2)

def forty():
    return net(40)

def probabilities():
    return nn.Sequential(net(12), nn.Softmax(1))

def constant():
    found = net(12)
    nn.init.zeros_(found[-1].weight)
    return found

def huge():
    found = net(12)
    with torch.no_grad():
        found[-1].weight.mul_(1e5)
    return found

class Careless(nn.Sequential):
    def forward(self, images):
        self[8].train()
        return super().forward(images)

def careless():
    return Careless(*list(net(12))[:-1], nn.Dropout(0.1), net(12)[-1])
"""


BATCH = 16


PART = 64


PARTS = 3


def settings(**changes):
    return BuildConfig(
        **{
            "teacher": "kd_toy:net",
            "data": "kd_toy:images",
            "augment": "crop,flip",
            "views": 2,
            "topk": 4,
            "temperatures": (1.0, 4.0),
            "batch_size": BATCH,
            "allow_low_accuracy": True,
            "device": "cpu",
            "part": PART,
            **changes,
        }
    )
