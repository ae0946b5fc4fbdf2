"""Seeded noise as images, for `make bench` and the scripts here: times do not depend on the pixels."""

import numpy as np

IMAGES = {"train": 50_000, "eval": 1_000}


def images(count: int, classes: int = 10, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, side, side, 3], other ones for another count, and labels that take the classes in turn."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, side, side, 3), np.uint8)
    return pixels, np.arange(count) % classes


def noise(split: str) -> tuple[np.ndarray, np.ndarray]:
    """For --data pixels:noise, which is as large as CIFAR-10."""
    return images(IMAGES[split])
