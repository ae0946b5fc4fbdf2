"""The formats that a student can be exported to: how a file of each is written, and how it is run."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.cache.errors import InputError, kind_and_message

INPUT, OUTPUT = "images", "logits"
NOTES = "kdcache.json"  # under which a file holds what kdcache says of it
_LARGEST_ONNX = 2**31 - 2**20  # bytes of weights: a file of protobuf's has less than 2 GB
_Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """suffix: what the names of its files end in. require: InputError if this machine cannot write and run it.

    write: makes the file of a network in eval(), given images [2, 3, S, S] and a text to keep in it; a batch may have
    any size. run: opens a file on the CPU as a function from images float32 [B, 3, S, S] to logits [B, C]. runtime:
    what runs it here, with its version.
    """

    suffix: str
    require: Callable[[nn.Module], None]
    write: Callable[[nn.Module, Tensor, Path, str], None]
    run: Callable[[Path], _Run]
    runtime: Callable[[], str]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep what exporters print, log and warn of from the user: what counts is whether the file runs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ONNX


def _require_onnx(network: nn.Module) -> None:
    _import("onnx")
    _import("onnxruntime")
    if _by_export():
        _import("onnxscript")
    if (size := sum(t.nbytes for t in network.state_dict().values())) > _LARGEST_ONNX:
        raise InputError(f"the weights have {size / 2**30:.1f} GB, and one ONNX file holds 2: give --to torchscript")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        if isinstance(e, ModuleNotFoundError) and e.name == name:
            raise InputError(f"--to onnx needs {name}: pip install onnx onnxruntime onnxscript") from e
        raise InputError(f"--to onnx: {name} cannot be imported: {kind_and_message(e)}") from e


def _by_export() -> bool:
    """Whether torch exports to ONNX by way of torch.export, as is its default since 2.9; before by tracing."""
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return version is not None and (int(version[1]), int(version[2])) >= (2, 9)


def _write_onnx(network: nn.Module, images: Tensor, path: Path, notes: str) -> None:
    onnx = _import("onnx")
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    if _by_export():
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        torch.onnx.export(network, (images,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, **names)
    else:
        free = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}
        torch.onnx.export(network, (images,), path, dynamo=False, dynamic_axes=free, **names)
    model = onnx.load(path)
    for entry in (*model.graph.node, *model.graph.value_info):
        del entry.metadata_props[:]  # stack traces, which name files of this machine
        entry.doc_string = ""
    onnx.helper.set_model_props(model, {NOTES: notes})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _run_onnx(path: Path) -> _Run:
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


# TorchScript


def _write_torchscript(network: nn.Module, images: Tensor, path: Path, notes: str) -> None:
    traced = torch.jit.trace(network, images, check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, path, _extra_files={NOTES: notes})


def _run_torchscript(path: Path) -> _Run:
    run: _Run = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    return run


FORMATS = {
    "onnx": Format(
        ".onnx", _require_onnx, _write_onnx, _run_onnx, lambda: f"onnxruntime {_import('onnxruntime').__version__}"
    ),
    "torchscript": Format(
        ".pt", lambda network: None, _write_torchscript, _run_torchscript, lambda: f"torch {torch.__version__}"
    ),
}
