"""Teachers: a network, its weights, and how it wants its pixels, found by name."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdcache.cache.choices import Interpolation
from kdcache.cache.errors import InputError, NotFoundError, first_sentence
from kdcache.cache.files import replace_file
from kdcache.cache.home import teachers_folder
from kdcache.cache.identity import TeacherIdentity
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.teachers.networks import SMALL_STEM_UP_TO, is_torchvision, outline, small_stem
from kdcache.pipeline.teachers.pixels import RGB, Found, Wanted, pixels_of_data
from kdcache.pipeline.teachers.sources import from_file, from_function, from_name, names_weights
from kdcache.pipeline.teachers.timm_source import weights_of as timm_weights_of
from kdcache.pipeline.views.render import normalised

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
        """float32 of the same shape and memory format, zero mean and unit variance over the dataset."""
        return normalised(images, self.mean, self.std)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalise(images))
        return logits


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network that only answers.

    class_names: by class id, where its source tells. about: what it is, and what says how it wants its images.
    compiled: the model, where it is.
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
        """float32 [B, C] for uint8 [B, 3, S, S] at the teacher's input size: eval() and inference_mode, always."""
        assert not self.model.training
        bf16 = self.identity.numeric == "bf16"
        # float32 means float32: no TF32, so that a cache does not depend on the card.
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False),
            torch.autocast(self.device.type, torch.bfloat16, enabled=bf16),
        ):
            if self.compiled is None:
                return self.model(images).float()  # type: ignore[no-any-return]
            # What a CUDA graph gives is overwritten by the next answer.
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
        except Exception as e:  # of the network, the compiler, or for want of one
            network = self.identity.architecture
            raise InputError(
                f"{network} cannot be compiled here: {first_sentence(e)}; --no-compile does without"
            ) from e
        return found


def weights_hash(state: dict[str, Tensor]) -> str:
    """sha256 over the tensors' names, types, shapes and bytes, in order of name."""
    h = hashlib.sha256()
    for name in sorted(state):
        t = state[name].detach().cpu().contiguous()
        h.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def taught_file(name: str, data: Dataset) -> Path:
    """Where `kdcache teach` files a teacher for this dataset."""
    folder = f"{data.name.replace(':', '-')}-{data.fingerprint()[:12]}"
    return teachers_folder() / folder / f"{name.replace('/', '-').replace(':', '-')}.safetensors"


def file_classifier(path: Path, model: Classifier, notes: dict[str, Any]) -> None:
    """Write the network's weights as safetensors, with notes that load_teacher reads back."""
    # safetensors refuses shared memory and channels_last.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.network.state_dict().items()}
    replace_file(path, save(state, {"kdcache": json.dumps(notes)}))


class _Notes(BaseModel):
    """What must stand in kdcache's notes in a weights file; there may be more."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    input_size: int = Field(ge=1)
    mean: RGB
    std: RGB
    interpolation: Interpolation = "bilinear"
    class_names: tuple[str, ...]
    # Of a student:
    student: str | None = None
    classes: int | None = Field(None, ge=1)
    data: str | None = None
    cache: str | None = None
    cache_path: str | None = None


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and kdcache's notes (empty for a foreign file), without running code from the file."""
    if not path.is_file():
        raise InputError(f"{path} is a folder, not a weights file" if path.is_dir() else f"no weights file at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickle's protocol and the like, before the error that counts
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # bytes that are no pickle raise whatever comes first: KeyError, EOFError, ...
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise InputError(
                f"{path} holds {code[1]} besides tensors, which could be any code: nothing of it was run. "
                "Save its state_dict() alone, best as .safetensors"
            ) from e
        raise InputError(
            f"{path} is damaged, or neither a state dict of tensors nor .safetensors ({first_sentence(e)})"
        ) from e
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} is not a state dict of tensors")
    return {str(k).removeprefix("module."): v for k, v in state.items()}, {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as f:
            text = (f.metadata() or {}).get("kdcache")
            state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise InputError(f"{path} is damaged, or no safetensors file: {e}") from e
    if text is None:
        return state, {}
    try:
        return state, _Notes.model_validate_json(text).model_dump(exclude_none=True)
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{path}: its notes are not what kdcache writes: {where}: {first['msg']}") from e


def load_teacher(
    name: str,
    data: Dataset,
    device: torch.device,
    *,
    weights: str | None = None,
    amp: str | None = None,
    wanted: Wanted = WHAT_THE_SOURCE_SAYS,
) -> Teacher:
    """The teacher `name` for a dataset's train split.

    weights: a file (safetensors or a state dict), a torchvision weights name such as IMAGENET1K_V1, or None: the
    teacher that `kdcache teach` filed for this dataset; else those that a name of timm's tells (timm/resnet50.a1_in1k);
    else, for imagenet, torchvision's IMAGENET1K_V1 or timm's first. wanted: how its images are prepared, where that is
    not as the source of the weights says.

    NotFoundError where there is none; InputError where weights do not fit, or cannot be fetched.
    """
    found = _find(name, data, weights, wanted)
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


def _find(name: str, data: Dataset, weights: str | None, wanted: Wanted) -> Found:
    """The network with its weights, by the rules of load_teacher."""
    if weights is not None and names_weights(weights):
        return from_name(name, weights, wanted)
    if weights is None:
        if ":" in name:
            return from_function(name, data, wanted)
        taught = taught_file(name, data)
        if not taught.exists():
            timms = name.startswith("timm/")
            if (timms and "." in name) or (data.name == "imagenet" and (timms or is_torchvision(name))):
                return from_name(name, None, wanted)
            outline(name, 2, pixels_of_data(data).size)  # a name that no network has is an error of its own
            raise NotFoundError(_untaught(name, data))
        weights = str(taught)
    path = Path(weights)
    state, notes = read_weights(path)
    return from_file(name, path, state, notes, data, wanted)


def try_out(model: Classifier, name: str, size: int) -> int:
    """How many classes the model answers for; InputError unless it takes images of this size and gives logits."""
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
    elif name.startswith("timm/") and (tags := timm_weights_of(name)):
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
