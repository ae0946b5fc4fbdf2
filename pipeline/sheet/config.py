"""What `kdcache views` is asked for. Importing this file costs nothing: the command line makes its options from it."""

from dataclasses import dataclass
from typing import Annotated

from kdcache.cache.records.choices import Interpolation
from kdcache.pipeline.build.config import Sequence
from kdcache.pipeline.commandline.options import Argument, Option, Seed
from kdcache.pipeline.data.defaults import DATA, Augment, Data


@dataclass(frozen=True)
class ViewsConfig:
    """Which views of which samples to show. None means what a build takes where nothing is said.

    policy: the view policy, as a bare argument; it counts before `augment`, which is the same as for a build.
    list_all: show nothing, but list all operations and named policies.
    """

    policy: Annotated[str | None, Argument("[POLICY]")] = None
    augment: Augment = None
    data: Data = DATA
    unlabelled: Annotated[bool, Option("The data have no labels.")] = False
    sequence: Sequence = "random"
    seed: Seed = 0
    views: Annotated[int, Option("How many views of each sample.", own=True, ge=1, le=1000)] = 8
    samples: Annotated[int, Option("How many samples, from all over the data.", own=True, ge=1, le=1000)] = 8
    size: Annotated[
        int | None,
        Option(
            "Size of the teacher's images in pixels [that of images in memory; of files 224].",
            flags=("--teacher-size", "--size"),
            ge=1,
            le=4096,
        ),
    ] = None
    interpolation: Annotated[
        Interpolation,
        Option("How the teacher's images are resized.", flags=("--teacher-interpolation", "--interpolation")),
    ] = "bilinear"
    out: Annotated[str, Option("The PNG file; another PNG there is replaced.", metavar="FILE", own=True)] = "views.png"
    list_all: Annotated[
        bool, Option("List all operations and named policies with their arguments, and stop.", flags=("--list",))
    ] = False
