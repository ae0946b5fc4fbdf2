"""Teachers: a network, its weights, and how it wants its pixels, found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.cache.errors import InputError, NotFoundError, first_sentence
from kdcache.cache.identity import TeacherIdentity
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.teachers.networks import SMALL_STEM_UP_TO, canonical_name, is_torchvision, outline, small_stem
from kdcache.pipeline.teachers.pixels import RGB, Asked, Found, Wanted, pixels_of_data
from kdcache.pipeline.teachers.sources import files, functions, timm, torchvision
from kdcache.pipeline.teachers.weights import weights_hash, write_weights
from kdcache.pipeline.views.render import normalised

# Sources in the order in which they are asked. A source gives None for a teacher that is not its own.
SOURCES: dict[str, Callable[[Asked], Found | None]] = {
    "file": files.given,
    "function": functions.find,
    "taught": files.taught,
    "timm": timm.find,
    "torchvision": torchvision.find,
}
WHAT_THE_SOURCE_SAYS = Wanted()


class Classifier(nn.Module):
    """A network that takes uint8 images [B, 3, H, W] and normalises them itself; logits [B, C]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: RGB, std: RGB) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise to zero mean and unit variance over the dataset: float32 of the same shape and memory format."""
        return normalised(images, self.mean, self.std)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalise(images))
        return logits


@contextmanager
def _no_tf32() -> Iterator[None]:
    """float32 means float32 within, so that a cache depends neither on the card nor on what its surroundings have set.

    NVIDIA's containers, for one, set TF32 for products of matrices.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network that only answers.

    class_names: by class id, where its source tells them. about: a line that tells what it is, and how it wants its
    images and why. compiled: the compiled model, or None.
    """

    identity: TeacherIdentity
    model: Classifier
    classes: int
    class_names: tuple[str, ...] | None
    device: torch.device
    about: str = ""
    compiled: Callable[[Tensor], Tensor] | None = None

    @property
    def input_size(self) -> int:
        return self.identity.input_size

    def logits(self, images: Tensor) -> Tensor:
        """Answer images uint8 [B, 3, S, S] of the teacher's input size with logits float32 [B, C].

        The network is always in eval() and in inference_mode.
        """
        assert not self.model.training
        bf16 = self.identity.numeric == "bf16"
        with torch.inference_mode(), _no_tf32(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            if self.compiled is None:
                return self.model(images).float()  # type: ignore[no-any-return]
            # Views that were cut together have gaps in memory, for which it would be compiled again.
            images = images.contiguous(memory_format=torch.channels_last)
            # The next answer overwrites what a CUDA graph gives.
            return self.compiled(images).float().clone()

    def compile(self, batch: int) -> Teacher:
        """The same teacher, compiled for batches of so many images; logits equal to rounding. InputError if it fails.

        On CUDA the whole network becomes one CUDA graph.
        """
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        found = replace(self, compiled=torch.compile(self.model, mode=mode, dynamic=False))
        size = (batch, 3, self.input_size, self.input_size)
        images = torch.zeros(size, dtype=torch.uint8, device=self.device).to(memory_format=torch.channels_last)
        try:
            for _ in range(3):  # to compile, to record, to replay
                found.logits(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # the network and the compiler may raise anything, and there may be no compiler
            network = self.identity.architecture
            raise InputError(
                f"{network} cannot be compiled here: {first_sentence(e)}; --no-compile does without"
            ) from e
        return found


def file_classifier(path: Path, model: Classifier, notes: dict[str, Any]) -> None:
    """Write the network's weights as safetensors, with notes that load_teacher reads back."""
    write_weights(path, model.network.state_dict(), notes)


def load_teacher(
    name: str,
    data: Dataset,
    device: torch.device,
    *,
    weights: str | None = None,
    amp: str | None = None,
    wanted: Wanted = WHAT_THE_SOURCE_SAYS,
) -> Teacher:
    """Load the teacher `name` for a dataset's train split.

    weights: a file (safetensors or a state dict), or a name of torchvision's weights such as IMAGENET1K_V1. None takes
    the teacher that `kdcache teach` filed for this dataset; else the weights that a timm name tells
    (timm/resnet50.a1_in1k); else, for imagenet, torchvision's IMAGENET1K_V1 or timm's first. wanted: how its images
    are prepared, where that is not as the source of the weights says.

    NotFoundError where there is none; InputError where weights do not fit, or cannot be fetched.
    """
    name = canonical_name(name)
    found = _find(Asked(name, data, weights, wanted))
    pixels = wanted.over(found.pixels)
    model = Classifier(found.network, pixels.mean, pixels.std).eval().to(device)
    model.to(memory_format=torch.channels_last)
    identity = TeacherIdentity(
        architecture=architecture(name, found.network),
        weights=weights_hash(found.network.state_dict()),
        mean=pixels.mean,
        std=pixels.std,
        input_size=pixels.size,
        numeric="bf16" if amp == "bf16" else "float32",
        interpolation=pixels.interpolation,
    )
    classes = try_out(model, name, pixels.size)
    names = found.class_names if found.class_names and len(found.class_names) == classes else None
    asked = f" ({wanted} as asked for)" if str(wanted) else ""
    about = f"{' '.join(filter(None, (name, found.label)))}, {pixels}, {found.origin}{asked}"
    return Teacher(identity, model, classes, names, device, about)


def _find(asked: Asked) -> Found:
    """Return what the first source gives that has the teacher. NotFoundError where none has it."""
    for source in SOURCES.values():
        if (found := source(asked)) is not None:
            return found
    outline(asked.name, 2, pixels_of_data(asked.data).size)  # raises an error of its own for a name that no network has
    raise NotFoundError(_untaught(asked.name, asked.data))


def try_out(model: Classifier, name: str, size: int) -> int:
    """Count the classes that the model answers for. InputError unless it takes images of this size and gives logits."""
    images = torch.zeros((2, 3, size, size), dtype=torch.uint8, device=model.mean.device)
    was_training = model.training
    try:
        with torch.inference_mode():
            logits = model.eval()(images)  # as in evaluation: nothing is drawn, no statistics change
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # other people's networks; most often one that halves a small image once too often
        raise InputError(f"{name} does not take images of {size}x{size} pixels: {first_sentence(e)}") from e
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        raise InputError(f"{name} does not answer with logits [B, C]")
    return logits.shape[1]


def _untaught(name: str, data: Dataset) -> str:
    if not data.labels.shape[1]:
        return f"no {name} is filed for the unlabelled {data.name}: give --weights FILE"
    pretrained = ""
    if is_torchvision(name):
        pretrained = ", or --weights IMAGENET1K_V1 with --class-map"
    elif name.startswith("timm/") and (tags := timm.weights_of(name)):
        pretrained = f", or with --class-map one of {tags}"
    return (
        f"no {name} has been taught on this {data.name} data: run kdcache teach with the same --teacher and --data "
        f"first, or give --weights FILE{pretrained}"
    )


def architecture(name: str, network: nn.Module) -> str:
    """The network's name in an identity: with its stem, which the name alone does not tell."""
    stem = getattr(network, "conv1", None)
    small = isinstance(stem, nn.Conv2d) and stem.kernel_size == (3, 3) and small_stem(name, SMALL_STEM_UP_TO)
    return f"{name} (3x3 stem)" if small else name
