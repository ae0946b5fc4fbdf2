"""Teachers: a network, its weights, and how it wants its pixels, found by name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdcache.cache.errors import InputError, NotFoundError
from kdcache.cache.files import replace_file
from kdcache.cache.home import home
from kdcache.cache.identity import TeacherIdentity
from kdcache.pipeline.datasets import Dataset
from kdcache.pipeline.networks import build_network, small_stem

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
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalise(images))
        return logits


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network that only answers. class_names: by class id where known; accuracy: as filed by teach, 0..1."""

    identity: TeacherIdentity
    model: Classifier
    classes: int
    class_names: tuple[str, ...] | None
    device: torch.device

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
            return self.model(images).float()  # type: ignore[no-any-return]


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or cuda where there is one, else cpu."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here: {reason}") from e
    return device


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
    return home() / "teachers" / folder / f"{name.replace('/', '-').replace(':', '-')}.safetensors"


def file_classifier(path: Path, model: Classifier, notes: dict[str, Any]) -> None:
    """Write the network's weights as safetensors, with notes that load_teacher reads back."""
    # safetensors refuses shared memory and channels_last.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.network.state_dict().items()}
    replace_file(path, save(state, {"kdcache": json.dumps(notes)}))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and kdcache's notes (empty for a foreign file), without running code from the file."""
    if not path.is_file():
        raise InputError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                notes = json.loads((f.metadata() or {}).get("kdcache", "{}"))
                return {k: f.get_tensor(k) for k in f.keys()}, notes  # noqa: SIM118
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as e:
        raise InputError(f"{path} is not a safetensors file or state dict: {str(e).splitlines()[0]}") from e
    except Exception as e:
        if type(e).__name__ != "UnpicklingError":
            raise
        raise InputError(f"{path} holds more than tensors; it is not loaded. Save its state_dict()") from e
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} is not a state dict of tensors")
    return {str(k).removeprefix("module."): v for k, v in state.items()}, {}


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
                raise NotFoundError(
                    f"no {name} has been taught on this {data.name}: run kdcache teach --teacher {name} first, "
                    "or give --weights FILE or, with --class-map, --weights IMAGENET1K_V1"
                )
            else:
                weights = str(taught)
        if weights.isidentifier() and weights.upper() == weights and not Path(weights).exists():
            network, mean, std, size, names = _pretrained(name, weights)
        else:
            state, notes = read_weights(Path(weights))
            if not state:
                raise InputError(f"{weights} holds no tensors")
            size, names = notes.get("input_size", size), tuple(notes["class_names"]) if notes else None
            mean, std = tuple(notes.get("mean", mean)), tuple(notes.get("std", std))
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
    with torch.inference_mode():
        logits = model(torch.zeros((2, 3, size, size), dtype=torch.uint8, device=device))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        raise InputError(f"{name} does not answer with logits [B, C]")
    return Teacher(identity, model, logits.shape[1], names, device)


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
