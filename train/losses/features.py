"""A student's features one stage before the last, and how a loss that learns from them gets them in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdcache.cache.errors import UnservedError
from kdcache.pipeline.teachers.teacher import Classifier
from kdcache.train.losses.base import Batch, ByParts, Featured, Needs, Paced, Parts


class FeatureLoss(ByParts):
    """A loss that needs features, as a trainer calls it: without them, since they are tapped from its student.

    The loss's head is made here, and is trained beside the student.
    """

    def __init__(self, loss: Featured, model: Classifier, image_size: int, classes: int) -> None:
        self._loss, self._tap = loss, FeatureTap(model, image_size, loss.name)
        self.name = loss.name  # type: ignore[misc]  # of the class elsewhere
        loss.make_head(self._tap.channels, classes, next(model.parameters()).device)

    @property
    def needs(self) -> Needs:
        return self._loss.needs

    def terms(self, batch: Batch) -> Parts:
        return self._loss.terms(replace(batch, features=self._tap.features))

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self._loss, Paced):
            self._loss.set_epoch(epoch)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._loss.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self._loss.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._loss.load_state_dict(state)


class FeatureTap:
    """After each forward pass, `features` [B, F] of the last map that is larger than the network's final one.

    That is the output of the stage before the last: layer3 of torchvision's ResNets, stages.1 of the CIFAR ones,
    features.5 of Swin. Maps are [B, F, H, W] or, as Swin's, [B, H, W, F]. `channels` is F. UnservedError, which names
    the loss that asks, for a network without such maps (a vision transformer).
    """

    features: Tensor

    def __init__(self, model: Classifier, image_size: int, asked_by: str = "a loss that reads features") -> None:
        maps: list[_Map] = []
        pooled = False  # what follows the global average is no map any more

        def note(module: nn.Module, _: object, output: object) -> None:
            nonlocal pooled
            pooled = pooled or _is_pool(module, output)
            if not pooled and isinstance(output, Tensor) and (found := _map_of(module, output)):
                maps.append(found)

        hooks = [stage.register_forward_hook(note) for stage in _stages(model.network)]
        training = model.training
        with torch.no_grad():
            device = next(model.parameters()).device
            model.eval()(torch.zeros((1, 3, image_size, image_size), dtype=torch.uint8, device=device))
        model.train(training)
        for hook in hooks:
            hook.remove()
        larger = [i for i, one in enumerate(maps) if one.side > maps[-1].side]
        if not larger:
            raise UnservedError(
                f"{asked_by} needs a student with a stage before its last map, such as a convolutional network or "
                "Swin; this one has none"
            )
        chosen = maps[larger[-1]]
        # A cube does not show its layout; the maps around it do, since a network has one kind of them.
        near = sorted((abs(i - larger[-1]), one.channels_last) for i, one in enumerate(maps) if not one.cubic)
        channels_last = near[0][1] if chosen.cubic and near else chosen.channels_last
        self.channels = chosen.shape[3 if channels_last else 1]
        self._space = (1, 2) if channels_last else (2, 3)
        chosen.module.register_forward_hook(self._take)

    def _take(self, module: nn.Module, _: object, output: Tensor) -> None:
        self.features = output.mean(self._space)


@dataclass(frozen=True)
class _Map:
    """A module's output for one square image: [1, F, S, S], or [1, S, S, F] with the channels last."""

    module: nn.Module
    shape: tuple[int, int, int, int]

    @property
    def side(self) -> int:
        return self.shape[2]

    @property
    def cubic(self) -> bool:
        return self.shape[1] == self.shape[2] == self.shape[3]

    @property
    def channels_last(self) -> bool:
        return self.shape[1] == self.shape[2] != self.shape[3]


def _map_of(module: nn.Module, output: Tensor) -> _Map | None:
    """The module's output as a map, if it is one: images are square, so two neighbouring sides are equal."""
    if output.ndim != 4 or output.shape[2] not in (output.shape[1], output.shape[3]):
        return None
    _, a, b, c = output.shape
    return _Map(module, (1, a, b, c))


def _is_pool(module: nn.Module, output: object) -> bool:
    """Whether this averages a map: a stage has parameters, also where its own map is a single pixel."""
    single = isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:] == (1, 1)
    return single and not any(True for _ in module.parameters())


def _stages(network: nn.Module) -> list[nn.Module]:
    """The network's parts; where a part is a list of parts, those too."""
    out = []
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            out += list(child.children())
        out.append(child)
    return out
