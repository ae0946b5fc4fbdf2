"""A student's features one stage before the last, for losses that learn from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdcache.cache.errors import UnservedError
from kdcache.cache.records import Records
from kdcache.pipeline.teachers import Classifier
from kdcache.train.losses import USKD, Needs


class FeatureLoss:
    """A loss that reads features, called by the trainer like any other; its head is trained beside the student."""

    name: ClassVar[str] = USKD.name

    def __init__(self, loss: USKD, model: Classifier, image_size: int, classes: int) -> None:
        self._loss, self._tap = loss, FeatureTap(model, image_size)
        loss.make_head(self._tap.channels, classes, next(model.parameters()).device)

    @property
    def needs(self) -> Needs:
        return self._loss.needs

    def __call__(
        self, logits: Tensor, labels: Tensor, records: Records | None, weights: Tensor | None = None
    ) -> Tensor:
        return self._loss(logits, labels, records, weights, features=self._tap.features)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._loss.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self._loss.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._loss.load_state_dict(state)


class FeatureTap:
    """After each forward pass, `features` [B, F] of the last map that is larger than the network's final one.

    That is the output of the stage before the last: layer3 of torchvision's ResNets, stages.1 of the CIFAR ones.
    `channels`: F. UnservedError for a network without such maps (a vision transformer).
    """

    features: Tensor

    def __init__(self, model: Classifier, image_size: int) -> None:
        stages = list(_stages(model.network))
        sizes: list[tuple[nn.Module, torch.Size]] = []

        def note(module: nn.Module, _: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] > 1:
                sizes.append((module, output.shape))

        hooks = [stage.register_forward_hook(note) for stage in stages]
        training = model.training
        with torch.no_grad():
            device = next(model.parameters()).device
            model.eval()(torch.zeros((1, 3, image_size, image_size), dtype=torch.uint8, device=device))
        model.train(training)
        for hook in hooks:
            hook.remove()
        larger = [(module, shape) for module, shape in sizes if shape[2] > sizes[-1][1][2]]
        if not larger:
            raise UnservedError("this student has no stage before its last map; choose a convolutional one")
        module, shape = larger[-1]
        self.channels = int(shape[1])
        module.register_forward_hook(self._take)

    def _take(self, module: nn.Module, _: object, output: Tensor) -> None:
        self.features = output.mean((2, 3))


def _stages(network: nn.Module) -> list[nn.Module]:
    """The network's parts and, where a part is a list of parts, those."""
    out = []
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            out += list(child.children())
        out.append(child)
    return out
