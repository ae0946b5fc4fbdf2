"""A GPU that is not there: tensors without values on device "cuda", which tell when a host would wait for the device.

Torch's fake tensors refuse to mix devices and to give values. `Watch` sees each operation before they do, and refuses
those that return only when the device has done all that was asked of it before. What it cannot see: the backward pass,
for which torch's engine wants a real device; kernels; and waiting inside of CUDA itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Their results are sizes or values on the host, or have a shape that depends on values.
_VALUES = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Operations in place for which torch has no fake form: they give nothing back.
_IN_PLACE = {"_fused_sgd_", "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"}


class HostWaitError(AssertionError):
    """The host would wait for the device here."""


def on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def tensors_in(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


class Watch(TorchDispatchMode):
    """Raises HostWaitError for an operation that waits, inside of a `with watch.steps()` block."""

    def __init__(self) -> None:
        super().__init__()
        self._watching = False
        self.operations = 0  # on the GPU, that were watched

    @contextmanager
    def steps(self) -> Iterator[None]:
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is aten._pin_memory:
            return args[0].clone()
        if self._watching:
            self.operations += any(map(on_gpu, tensors_in(args)))
            if (why := self._waits(packet, args, kwargs)) is not None:
                raise HostWaitError(f"{func}: {why}")
        if packet is aten._local_scalar_dense and not on_gpu(args[0]):
            return 0.0  # what has come to the host may be looked at
        if packet.__name__ in _IN_PLACE:
            devices = {t.device for t in tensors_in([args, kwargs])}
            assert len(devices) == 1, f"{func} mixes {devices}"
            return None
        return func(*args, **kwargs)

    def _waits(self, packet: Any, args: Any, kwargs: Any) -> str | None:
        there = any(map(on_gpu, tensors_in(args)))
        if packet in _VALUES and there:
            return "a value is wanted on the host"
        if packet in _INDEXED and there and any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1])):
            return "a mask is an index whose size is wanted on the host"
        if packet is aten._to_copy and kwargs.get("device") is not None:
            return self._copied(args[0].device, kwargs["device"], kwargs.get("non_blocking", False), True)
        if packet is aten.copy_ and args[1].dim():
            ahead = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return self._copied(args[1].device, args[0].device, ahead, False)
        return None

    def _copied(self, source: torch.device, target: torch.device, ahead: bool, made: bool) -> str | None:
        if "cuda" not in (source.type, target.type) or source.type == target.type:
            return None
        if not ahead:
            return f"a copy from {source.type} to {target.type} that is waited for"
        # Of a tensor that is made for it, whoever reads it has to wait; into a pinned one it is known when.
        return "a copy to the host that may be read too early" if made and target.type == "cpu" else None


class _Event:
    """In the place of torch.cuda.Event: all is done at once."""

    def record(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        raise HostWaitError("an event is waited for")


def _no_backward(self: Tensor, *args: object, **kwargs: object) -> None:
    """In the place of Tensor.backward: every leaf below gets a gradient of its own form."""
    seen, waiting = set(), [self.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaf.grad = torch.empty_like(leaf)
        waiting += [following for following, _ in node.next_functions]


def fakes_cuda() -> bool:
    """Whether torch lets tensors without values be on a GPU that is not there; torch 2.6 does not."""
    try:
        with FakeTensorMode():
            return torch.zeros(1).to("cuda").is_cuda
    except RuntimeError:
        return False


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """Within, tensors have no values, may be on "cuda", and the Watch sees all operations on them."""
    pretended: dict[str, Any] = {
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.current_stream": lambda *_: SimpleNamespace(synchronize=lambda: None),
        "torch.cuda.memory_reserved": lambda *_: 0,
        "torch.cuda.Event": _Event,
        "torch.Tensor.backward": _no_backward,
    }
    patches = [patch(name, value) for name, value in pretended.items()]
    for one in patches:
        one.start()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
            yield watch
    finally:
        for one in reversed(patches):
            one.stop()
