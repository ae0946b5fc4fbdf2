"""What `kdcache export` is asked for. Importing this file costs nothing: the command line makes its options from it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from kdcache.pipeline.commandline.options import Argument, Option, Workers
from kdcache.pipeline.data.defaults import data_option, names_function

FormatName = Literal["onnx", "torchscript"]  # the rows of FORMATS in formats.py, which imports torch
IMAGES = 1000


@dataclass(frozen=True)
class ExportConfig:
    """What to export: the last weights of a run folder, or a weights file. None means what the run has."""

    run: Annotated[str, Argument()]
    to: Annotated[FormatName, Option("A file for ONNX's runtimes or for torch.jit.load.", own=True)]
    out: Annotated[str | None, Option("[beside the weights, with .onnx or .pt]", metavar="FILE", own=True)] = None
    data: Annotated[
        str | None, data_option("Images to check the exported network on [the run's evaluation images].", own=True)
    ] = None
    images: Annotated[int, Option("Check it on so many of them, spread evenly.", metavar="N", own=True, ge=1)] = IMAGES
    student: Annotated[
        str | None,
        Option("[the run's, unless it is a function]", metavar="NAME", own=True, is_code=names_function),
    ] = None
    workers: Workers = None
