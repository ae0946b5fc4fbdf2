"""What `kdcache import` is asked for. Importing this file costs nothing: the command line makes its options from it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from kdcache.pipeline.commandline.options import Argument, CacheFolder, FullFingerprint, Option
from kdcache.pipeline.data.defaults import Unlabelled, data_option

Kind = Literal["tinyvit", "fkd"]


@dataclass(frozen=True)
class ImportConfig:
    """What to import. classes: None takes the dataset's number. temperature: that of the stored softmax.

    teacher: its name, which no format tells. image_size: the size of its input in pixels.
    """

    kind: Annotated[Kind, Argument()]
    path: Annotated[str, Argument()]
    data: Annotated[str, data_option("The images that the logits are of: imagenet:PATH, ...")]
    classes: Annotated[int | None, Option("Number of classes [the dataset's].", ge=2, le=2**32 - 1)] = None
    teacher: Annotated[str, Option("What to call the teacher.", metavar="NAME", own=True)] = "unknown"
    image_size: Annotated[int, Option("The teacher's input size in pixels.", own=True, ge=8)] = 224
    temperature: Annotated[float, Option("Temperature of the stored softmax (FKD's --temp).", gt=0, lt=1000)] = 1.0
    unlabelled: Unlabelled = False
    allow_low_accuracy: Annotated[bool, Option("Import although the stored answers are near chance.")] = False
    full_fingerprint: FullFingerprint = False
    out: CacheFolder = None
