"""Files of weights: their hash, how they are read without running code from them, and how kdcache writes them."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kdcache.cache.errors import InputError, first_sentence
from kdcache.cache.files import replace_file
from kdcache.cache.home import teachers_folder
from kdcache.cache.records.choices import Interpolation
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.teachers.pixels import RGB


def weights_hash(state: dict[str, Tensor]) -> str:
    """The sha256, in hexadecimal, of the tensors' names, types, shapes and bytes, in the order of their names."""
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


def write_weights(path: Path, state: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
    """Write a state dict as safetensors, with notes that read_weights gives back."""
    # safetensors refuses shared memory and channels_last.
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    replace_file(path, save(plain, {"kdcache": json.dumps(notes)}))


class _Notes(BaseModel):
    """What kdcache's notes in a weights file must hold; there may be more."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    input_size: int = Field(ge=1)
    mean: RGB
    std: RGB
    interpolation: Interpolation = "bilinear"
    class_names: tuple[str, ...]
    # Only in a student's file:
    student: str | None = None
    classes: int | None = Field(None, ge=1)
    data: str | None = None
    cache: str | None = None
    cache_path: str | None = None


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors by name and kdcache's notes (empty for a foreign file), without running code from the file."""
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
