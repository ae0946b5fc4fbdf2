"""Files of weights as kdcache writes them, with notes on the network; and the hash of a network's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import save
from torch import Tensor

from kdcache.cache.errors import InputError
from kdcache.cache.files import replace_file
from kdcache.cache.home import teachers_folder
from kdcache.cache.identity import first_problem
from kdcache.cache.records.choices import Interpolation
from kdcache.pipeline.data.dataset import Dataset
from kdcache.pipeline.teachers.checkpoints import Checkpoint, checksums, open_checkpoint
from kdcache.pipeline.teachers.checkpoints import weights_hash as weights_hash
from kdcache.pipeline.teachers.networks import canonical_name
from kdcache.pipeline.teachers.pixels import RGB


def taught_file(name: str, data: Dataset) -> Path:
    """Where `kdcache teach` files a teacher for this dataset."""
    folder = f"{data.name.replace(':', '-')}-{data.fingerprint()[:12]}"
    return teachers_folder() / folder / f"{canonical_name(name).replace('/', '-').replace(':', '-')}.safetensors"


def write_weights(path: Path, state: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
    """Write a state dict as safetensors, with notes that read_weights gives back."""
    replace_file(path, saved(state, notes))


def saved(state: Mapping[str, Tensor], notes: Mapping[str, Any]) -> bytes:
    """A safetensors file of a state dict, with notes, and with checksums of both that are looked at when it is read.

    KeyError for tensors of a type that safetensors does not have.
    """
    text = json.dumps(notes)
    # safetensors refuses shared memory and channels_last.
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    content = memoryview(save(plain))
    # safetensors writes several notes in an order that changes from one process to the next.
    end = 8 + int.from_bytes(content[:8], "little")
    about = {"__metadata__": {"kdcache": text, **checksums(plain, text)}, **json.loads(bytes(content[8:end]))}
    header = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8 bytes
    return b"".join((len(header).to_bytes(8, "little"), header, content[end:]))


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
    class_ids: tuple[int | None, ...] | None = None
    evaluation: str | None = None
    full_contents: bool | None = None
    beside_teacher: bool | None = None
    # Only in the file of a teacher that learnt beside a student, which has `classes` too:
    network: str | None = None

    @model_validator(mode="after")
    def _has_ids_of_its_classes(self) -> _Notes:
        if self.classes is not None and not all(i is None or 0 <= i < self.classes for i in self.class_ids or ()):
            raise ValueError("class_ids that are not below classes")
        return self


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors by name and kdcache's notes (empty for a foreign file), without running code from the file."""
    checkpoint = open_checkpoint(path)
    notes = notes_of(checkpoint)
    return (checkpoint.tensors if notes else checkpoint.unwrapped().state), notes


def notes_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """kdcache's notes in a checkpoint; empty for a foreign file. InputError for notes that kdcache does not write."""
    if checkpoint.notes is None:
        return {}
    try:
        return _Notes.model_validate_json(checkpoint.notes).model_dump(exclude_none=True)
    except pydantic.ValidationError as e:
        raise InputError(f"{checkpoint.path}: its notes are not what kdcache writes: {first_problem(e)}") from e
