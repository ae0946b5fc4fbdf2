"""What the commands that check caches and clean up are asked for.

Importing this file costs nothing: the command line makes its options from it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from kdcache.pipeline.build.config import ClassMap, Weights
from kdcache.pipeline.commandline.options import Argument, Device, Option, Registry, StoreSize, Trust, TypedRegistry
from kdcache.pipeline.data.defaults import data_option, names_function

LiveTeacher = Annotated[
    str | None,
    Option("[by the name in the cache, unless it is a function]", metavar="NAME", own=True, is_code=names_function),
]
Numeric = Annotated[Literal["float32", "bf16"] | None, Option("Number type of the teacher's answers [the cache's].")]


@dataclass(frozen=True)
class VerifyConfig:
    """What `kdcache verify` looks at. None means what the cache names."""

    cache: Annotated[str, Argument()]
    data: Annotated[str | None, data_option("Where the images are [by the name in the cache].")] = None
    teacher: LiveTeacher = None
    weights: Weights = None
    class_map: ClassMap = None
    depth: Annotated[
        Literal["commits", "contents", "replay"],
        Option(
            "Check identity, commits and files' sizes; also every digest and value; also the live teacher's answers."
        ),
    ] = "replay"
    replay: Annotated[int, Option("Records a view to replay.", ge=1)] = 512
    numeric: Numeric = None
    repair: Annotated[bool, Option("Remove what is damaged; the next build makes it again.")] = False
    device: Device = None
    registry: Registry = None
    trust: Trust = None


@dataclass(frozen=True)
class ReplayConfig:
    """What `kdcache pull --replay` asks the live teacher, and where that is. None means what the cache names."""

    replay: Annotated[
        int | None,
        Option(
            "First ask the live teacher again for so many records a view, and copy nothing if it answers otherwise.",
            metavar="N",
            own=True,
            ge=1,
        ),
    ] = None
    data: Annotated[str | None, data_option("Where the images are [by the name in the cache].")] = None
    teacher: LiveTeacher = None
    weights: Weights = None
    class_map: ClassMap = None
    numeric: Numeric = None
    device: Device = None


@dataclass(frozen=True)
class GcConfig:
    """What `kdcache gc` looks for."""

    registry: TypedRegistry = None
    older: Annotated[
        float,
        Option(
            "Grace period for what has no name in the registry, and for builds that were never finished.",
            metavar="DAYS",
            ge=0,
        ),
    ] = 30.0
    local_store_size: StoreSize = None
    delete: Annotated[bool, Option("Remove what is listed.")] = False
