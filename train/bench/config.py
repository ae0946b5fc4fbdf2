"""What `kdcache bench` is asked for. Importing this file costs nothing: the command line makes its options from it."""

from dataclasses import dataclass
from typing import Annotated

from kdcache.pipeline.commandline.options import Bf16, Device, Option, Workers
from kdcache.pipeline.data.defaults import DATA, Data, names_function
from kdcache.train.config import DEFAULT_LOSS, BatchSize, ImageSize, Student


@dataclass(frozen=True)
class BenchConfig:
    """What to measure. None means the default for the dataset's kind (defaults.py).

    samples: images that stand for all; rounds: how often each thing is measured, by default as time allows; views and
    epochs: for the break-even, which is computed.
    """

    teacher: Annotated[
        str | None,
        Option("A network's name [resnet56, for image files resnet34].", metavar="NAME", is_code=names_function),
    ] = None
    student: Student = None
    data: Data = DATA
    loss: Annotated[str, Option("See docs/losses.md.", metavar="NAME[:KEY=VALUE,...]")] = DEFAULT_LOSS
    batch_size: BatchSize = None
    image_size: ImageSize = None
    samples: Annotated[int | None, Option("Images that stand for all [8 batches, on a GPU 64].", ge=4)] = None
    rounds: Annotated[int | None, Option("How often each thing is measured [as time allows].", ge=2)] = None
    views: Annotated[int | None, Option("How many views the cache has, for the break-even [by dataset].", ge=1)] = None
    epochs: Annotated[int | None, Option("How long students train, for the break-even [by dataset].", ge=1)] = None
    device: Device = None
    amp: Bf16 = None
    compile: Annotated[bool, Option("Compile teacher and student.")] = False
    workers: Workers = None
