"""torch.compile for a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdcache.cache.errors import UnservedError


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same forward pass, compiled when it is first called; `model` itself, and its names, stay as they are."""
    forward: Callable[[Tensor], Tensor] = torch.compile(model)
    return forward


@contextmanager
def clear_compile_error() -> Iterator[None]:
    """UnservedError for what cannot be compiled here: no C compiler, for one."""
    try:
        yield
    except Exception as e:
        from torch._dynamo.exc import TorchDynamoException  # slow to import

        if not isinstance(e, TorchDynamoException):
            raise
        reason = " ".join(str(e).split()).split(" Set TORCHDYNAMO")[0][:300]
        raise UnservedError(f"the student cannot be compiled here ({reason}): give --no-compile") from e
