"""What `kdcache report` is asked for. Importing this file costs nothing: the command line makes its options from it."""

from dataclasses import dataclass
from typing import Annotated

from kdcache.pipeline.commandline.options import Argument, Device, Option, Registry, Workers
from kdcache.pipeline.data.defaults import data_option

OUT = "report.html"
JUDGED = 3  # runs


@dataclass(frozen=True)
class ReportConfig:
    """What to report on, and where the page goes.

    judge: of so many of the best runs, each of another group, the weights are judged again; 0 for none.
    """

    what: Annotated[tuple[str, ...], Argument("CACHE|RUN|SWEEP", several=True)]
    out: Annotated[str, Option("The page.", metavar="FILE", own=True)] = OUT
    data: Annotated[
        str | None, data_option("Where the images are [by the names in the cache and the runs].", own=True)
    ] = None
    judge: Annotated[
        int,
        Option("So many runs' weights are judged again, the best run of each loss or setting; 0 for none.", ge=0),
    ] = JUDGED
    registry: Registry = None
    device: Device = None
    workers: Workers = None
