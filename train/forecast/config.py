"""What `kdcache plan` is asked for, beside what a build is. Importing this file costs nothing."""

from dataclasses import dataclass
from typing import Annotated

from kdcache.pipeline.commandline.options import Option


@dataclass(frozen=True)
class ForecastConfig:
    """How a cache is tried out before it is built.

    samples: training images of the probe, at most. seconds: how long the probe may take, about; a slow teacher answers
    for fewer images then. gpus: how many devices like this one share the build. epochs: of a student, for the
    break-even.
    """

    samples: Annotated[int, Option("Training images to try out, at most.", own=True, ge=16)] = 2000
    seconds: Annotated[float, Option("How long that may take, about.", gt=0)] = 60.0
    gpus: Annotated[int, Option("How many devices like this one share the build.", ge=1)] = 1
    epochs: Annotated[int | None, Option("How long students train, for the break-even [by dataset].", ge=1)] = None
