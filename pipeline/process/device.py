"""The device that this process computes on."""

from __future__ import annotations

import torch

from kdcache.cache.errors import InputError, first_sentence
from kdcache.pipeline.process.rank import this_rank


def pick_device(name: str | None) -> torch.device:
    """Take the device of that name, or cuda where there is one, else cpu. Each of torchrun's ranks takes its own GPU.

    InputError for a device that cannot be used, or that ranks of one machine would share.
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
        raise InputError(f"device {name or 'cuda'!r} cannot be used here: {first_sentence(e)}; {_instead()}") from e
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # for streams and events, which are made without naming one
    return device


def numbered(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" alone means another one in a thread that has not chosen its own."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _instead() -> str:
    """What to ask for instead, also where torchrun started more ranks than there are GPUs."""
    here, gpus = this_rank().local_world, torch.cuda.device_count()
    if here > gpus > 0:
        return f"{here} ranks were started here and there are {gpus} GPUs: --nproc-per-node {gpus}"
    return "take cpu, cuda or cuda:N"
