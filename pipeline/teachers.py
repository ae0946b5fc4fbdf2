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
import torchvision
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdcache.cache.errors import InputError, NotFoundError
from kdcache.cache.files import replace_file
from kdcache.cache.home import teachers_folder
from kdcache.cache.identity import TeacherIdentity
from kdcache.pipeline.datasets import Dataset
from kdcache.pipeline.networks import build_network, small_stem
from kdcache.pipeline.ranks import this_rank
from kdcache.pipeline.render import normalised

RGB = tuple[float, float, float]
IMAGENET_SIZE = 224


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
    """A network that only answers. class_names: by class id where known; compiled: the model, where it is."""

    identity: TeacherIdentity
    model: Classifier
    classes: int
    class_names: tuple[str, ...] | None
    device: torch.device
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
                f"{network} cannot be compiled here: {_first_sentence(e)}; --no-compile does without"
            ) from e
        return found


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or cuda where there is one, else cpu; of torchrun's ranks, each takes its own GPU.

    InputError for one that cannot be used, or that ranks of one machine would share.
    """
    here = this_rank().local_world
    if here > 1 and name not in (None, "cpu", "cuda"):
        raise InputError(f"--device {name} is one device, and torchrun started {here} ranks: give cpu or cuda")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device == torch.device("cuda") and this_rank().local_world > 1:
            device = torch.device("cuda", this_rank().local_rank)
        torch.zeros(1, device=device).item()  # meta makes tensors, but holds nothing
    except (RuntimeError, AssertionError, ImportError) as e:
        raise InputError(f"device {name or 'cuda'!r} cannot be used here: {_first_sentence(e)}; {_instead()}") from e
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # for streams and events, which are made without naming one
    return device


def _instead() -> str:
    """What to ask for, where torchrun started more ranks than there are GPUs too."""
    here, gpus = this_rank().local_world, torch.cuda.device_count()
    if here > gpus > 0:
        return f"{here} ranks were started here and there are {gpus} GPUs: --nproc-per-node {gpus}"
    return "take cpu, cuda or cuda:N"


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
            f"{path} is damaged, or neither a state dict of tensors nor .safetensors ({_first_sentence(e)})"
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


def _first_sentence(error: Exception) -> str:
    """The error's kind and the beginning of its message, which torch's can be pages of."""
    text = " ".join(str(error).split()).split(". ")[0][:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load_fitting(network: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load every tensor, or an InputError that names the layers that do not fit."""
    own = network.state_dict()
    problems = [
        f"{k} is {tuple(state[k].shape)}, the network has {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    for title, names in (("missing", own.keys() - state.keys()), ("not in the network", state.keys() - own.keys())):
        if names:
            problems.append(f"{len(names)} {title} ({', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)})")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{what} do not fit: {'; '.join(problems[:5])}{more}")
    network.load_state_dict(state)


def load_teacher(
    name: str, data: Dataset, device: torch.device, *, weights: str | None = None, amp: str | None = None
) -> Teacher:
    """The teacher `name` for a dataset's train split.

    weights: a file (safetensors or a state dict), a torchvision weights name such as IMAGENET1K_V1, or None: the
    teacher that `kdcache teach` filed for this dataset, else, for imagenet, torchvision's IMAGENET1K_V1.
    NotFoundError where there is none; InputError where weights do not fit.
    """
    size = data.image_size or IMAGENET_SIZE
    mean, std = data.mean, data.std
    names: tuple[str, ...] | None = data.class_names or None
    notes: dict[str, Any] = {}
    if ":" in name and weights is None:
        network = build_network(name, len(data.class_names), size)
    else:
        if weights is None:
            taught = taught_file(name, data)
            if not taught.exists() and data.name == "imagenet" and not name.startswith("timm/"):
                weights = "IMAGENET1K_V1"
            elif not taught.exists():
                with torch.device("meta"):
                    build_network(name, 2, size)  # a name that no network has is an error of its own
                raise NotFoundError(_untaught(name, data))
            else:
                weights = str(taught)
        if weights.isidentifier() and weights.upper() == weights and not Path(weights).exists():
            network, mean, std, size, names = _pretrained(name, weights)
        else:
            state, notes = read_weights(Path(weights))
            if not state:
                raise InputError(f"{weights} holds no tensors")
            size, names = notes.get("input_size", size), notes.get("class_names")
            mean, std = notes.get("mean", mean), notes.get("std", std)
            network = build_network(name, _count_classes(name, size, state, len(data.class_names)), size)
            load_fitting(network, state, f"the weights in {weights} and {name}")
    model = Classifier(network, mean, std).eval().to(device)
    model.to(memory_format=torch.channels_last)
    identity = TeacherIdentity(
        architecture=architecture(name, size),
        weights=weights_hash(network.state_dict()),
        mean=mean,
        std=std,
        input_size=size,
        numeric="bf16" if amp == "bf16" else "float32",
    )
    return Teacher(identity, model, try_out(model, name, size), names, device)


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
        raise InputError(f"{name} does not take images of {size}x{size} pixels: {_first_sentence(e)}") from e
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        raise InputError(f"{name} does not answer with logits [B, C]")
    return logits.shape[1]


def _untaught(name: str, data: Dataset) -> str:
    if not data.labels.shape[1]:
        return f"no {name} is filed for the unlabelled {data.name}: give --weights FILE"
    pretrained = name in torchvision.models.list_models(module=torchvision.models)
    return (
        f"no {name} has been taught on this {data.name} data: run kdcache teach with the same --teacher and --data "
        "first, or give --weights FILE" + (", or --weights IMAGENET1K_V1 with --class-map" if pretrained else "")
    )


def architecture(name: str, image_size: int) -> str:
    """The network's name in an identity: with its stem, which the name alone does not tell."""
    return f"{name} (3x3 stem)" if ":" not in name and small_stem(name, image_size) else name


def _count_classes(name: str, size: int, state: dict[str, Tensor], default: int) -> int:
    """How many classes the weights answer for: the length of the tensors that change with the class count."""
    with torch.device("meta"):
        two, three = (build_network(name, classes, size).state_dict() for classes in (2, 3))
    for layer in two:
        if two[layer].shape != three[layer].shape and layer in state:
            return int(state[layer].shape[0])
    return default


def _pretrained(name: str, weights: str) -> tuple[nn.Module, RGB, RGB, int, tuple[str, ...]]:
    try:
        enum = torchvision.models.get_model_weights(name)
    except ValueError as e:
        raise InputError(f"torchvision has no pretrained weights for {name!r}: give --weights FILE") from e
    if weights not in enum.__members__:
        raise InputError(f"{name} has no weights {weights}: take one of {', '.join(enum.__members__)}")
    chosen = enum[weights]
    try:
        state = chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as e:
        raise InputError(
            f"cannot fetch {weights} of {name} ({e}): fetch {chosen.url} yourself and give --weights FILE"
        ) from e
    presets = chosen.transforms()
    network = torchvision.models.get_model(name)
    load_fitting(network, state, f"{weights} and {name}")
    size = presets.crop_size[0]
    return network, tuple(presets.mean), tuple(presets.std), size, tuple(chosen.meta["categories"])
