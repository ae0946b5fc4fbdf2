"""What a field of a config says about its option on the command line.

A field of a config, or a parameter of a command, is annotated with its type and with an Option:

    epochs: Annotated[int | None, Option("[by dataset]", ge=1)] = None

parameters.py makes `--epochs` of it: its type and choices are the annotation's, and its default is the field's. A field
that has no Option is not on the command line. Options that several commands share are defined once: those that are for
all kinds of commands at the end of this file, the others beside the configs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

_UNITS = ("", "k", "M", "G", "T")


@dataclass(frozen=True)
class Option:
    """How a value is given on the command line.

    help: the text that --help shows.
    metavar: what stands for the value there; None for the name of its type.
    flags: how it is spelled, where that is not the field's name; the first is the name in settings.
    own: it means something else than the options of the same name in other commands. A setting that names no command
        is not meant for it: `views = 16` is for build and not for push.
    ge, gt, le, lt: the bounds of a number, as in "greater than or equal".
    parse: makes the value of the text; its ValueError says what is wrong with that.
    several: it may be given several times, or as a list. The config has the first value.
    default: what the command takes where nothing is said, if that is not the field's default.
    missing: what the message adds when the option is required and missing.
    instead: a flag that makes the command do something that needs none of the required options.
    bare: the value where the option is given without one.
    typed: it counts only on the command line, and no setting is meant for it.
    is_code: whether a value names code of the user's, which the command will import.
    parts, join: further options, by parameter, that belong to this one, and what makes one value of them all.
    """

    help: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    own: bool = False
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    parse: Callable[[str], Any] | None = None
    several: bool = False
    default: str | None = None
    missing: str = ""
    instead: bool = False
    typed: bool = False
    bare: str | None = None
    is_code: Callable[[str], bool] | None = None
    parts: Mapping[str, "Option"] = field(default_factory=dict)
    join: Callable[..., str] | None = None


@dataclass(frozen=True)
class Argument:
    """A value that is given without a flag.

    metavar: what stands for it in --help; None for its name. several: one or more values are given, as a tuple.
    """

    metavar: str | None = None
    several: bool = False


def parse_size(text: str) -> int:
    """The bytes of a size such as 20GB, or of a plain number."""
    found = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?) *({'|'.join(_UNITS)})B?", text)
    if found is None:
        raise ValueError(f"{text} is no size such as 500MB or 20GB.")
    return int(float(found[1]) * 1000 ** _UNITS.index(found[2]))


def parse_views(text: str) -> range:
    """A range of views: 0:100 is views 0 to 99."""
    first, colon, after = text.partition(":")
    if not (colon and first.isdecimal() and after.isdecimal() and int(first) < int(after) <= 100_000):
        raise ValueError(f"{text!r} is not a range A:B of views such as 0:100, which is views 0 to 99")
    return range(int(first), int(after))


Device = Annotated[str | None, Option("cuda, cuda:1, cpu, ...; the GPU where there is one.")]
Workers = Annotated[int | None, Option("Processes that decode image files [the cores].", ge=0)]
Bf16 = Annotated[Literal["bf16"] | None, Option("Run the network in bfloat16.")]
Seed = Annotated[int, Option("Seed of everything that is drawn at random.", ge=0, le=2**63 - 1)]
Registry = Annotated[
    str | None,
    Option("A team's caches: a folder, s3://..., gs://..., az://..., https://...", metavar="URL|DIR"),
]
Trust = Annotated[
    str | None,
    Option(
        "Refuse caches that no key in this file has signed, which is like OpenSSH's allowed_signers.",
        metavar="FILE",
        flags=("--trust", "--trusted"),
    ),
]
TypedRegistry = Annotated[
    str | None, Option("A team's caches; must be typed, settings do not count.", metavar="URL|DIR", typed=True)
]
StoreSize = Annotated[
    int | None,
    Option("Space here for parts of a cache that is read from a registry [20GB].", metavar="SIZE", parse=parse_size),
]
FullFingerprint = Annotated[bool, Option("Hash the contents of all files, not of 4,096.")]
CacheFolder = Annotated[
    str | None, Option("The cache's folder [under KDCACHE_HOME, by its key].", metavar="DIR", own=True)
]
Views = Annotated[
    range | None, Option("Views A to B - 1 [all that are complete].", metavar="A:B", own=True, parse=parse_views)
]
Json = Annotated[bool, Option("Print facts as JSON.", flags=("--json",))]
NoTeacher = Annotated[bool, Option("Publish it without the teacher's weights.")]
