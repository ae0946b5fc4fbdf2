"""What `kdcache plan` is asked for, beside what a build is. Importing this file costs nothing."""

from dataclasses import dataclass
from typing import Annotated

from kdcache.pipeline.commandline.options import Option


@dataclass(frozen=True)
class ForecastConfig:
    """How a cache is tried out before it is built.

    seconds: how long the probe may take, about. samples: training images of the probe, at most; None: 2,000, and more
    where a fast teacher answers for more in that time, since long arrays compress better than short ones. gpus: how
    many devices like this one share the build. epochs: of a student, for the break-even.
    """

    samples: Annotated[
        int | None, Option("Training images to try out, at most [2,000, or more in that time].", own=True, ge=16)
    ] = None
    seconds: Annotated[float, Option("How long that may take, about.", gt=0)] = 60.0
    gpus: Annotated[int, Option("How many devices like this one share the build.", ge=1)] = 1
    epochs: Annotated[int | None, Option("How long students train, for the break-even [by dataset].", ge=1)] = None
