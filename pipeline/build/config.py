"""What `kdcache build` is asked for. Importing this file costs nothing: the command line makes its options from it."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Annotated

from kdcache.cache.records.choices import TEMPERATURES, Interpolation, Precision, SequenceName
from kdcache.pipeline.commandline.options import Bf16, CacheFolder, Device, FullFingerprint, Option, Seed, Workers
from kdcache.pipeline.data.defaults import DATA, Augment, Data, Unlabelled, names_function

PART = 262_144
VIEWS_PER_DECODE = 4
RGB = tuple[float, float, float]


def parse_rgb(text: str, divides: bool = False) -> RGB:
    """The values of three channels: 0.5,0.5,0.5, or 0.5 for all three. Those that divide are not 0."""
    try:
        numbers = [float(v) for v in text.split(",")]
        r, g, b = numbers * 3 if len(numbers) == 1 else numbers
    except ValueError:
        raise ValueError(f"{text!r} is not three numbers such as 0.485,0.456,0.406") from None
    if not all((0 < v if divides else 0 <= v) and v <= 1 for v in (r, g, b)):
        raise ValueError(f"{text!r}: pixels go from 0 to 1 here" + ", and nothing can be divided by 0" * divides)
    return r, g, b


def parse_temperatures(text: str) -> tuple[float, ...]:
    """The temperatures of a list such as 1,2,4, sorted, each once."""
    try:
        found = tuple(sorted({float(t) for t in text.split(",")}))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of numbers such as 1,2,4") from None
    if not all(0 < t < 1000 for t in found):
        raise ValueError(f"{text!r}: temperatures lie between 0 and 1000")
    return found


Weights = Annotated[
    str | None,
    Option("A weights file, a torchvision name, or published weights by their hash.", metavar="FILE|NAME|HASH"),
]
Sequence = Annotated[
    SequenceName,
    Option("spread: the numbers of a sample's views are spread evenly, so that few views cover more."),
]
ClassMap = Annotated[str | None, Option("Maps the dataset's classes to the teacher's.", metavar="FILE|auto")]


@dataclass(frozen=True)
class BuildConfig:
    """What to build. None means the default for the kind of data (defaults.py); for teacher_*, what its source says.

    part: how many samples a shard holds.
    """

    teacher: Annotated[
        str,
        Option(
            "A network's name.",
            metavar="NAME",
            is_code=names_function,
            missing="the network that answers, such as --teacher resnet34.",
        ),
    ]
    weights: Weights = None
    _: KW_ONLY
    teacher_size: Annotated[
        int | None, Option("Size of the teacher's images in pixels [as its source says].", ge=1, le=4096)
    ] = None
    teacher_mean: Annotated[
        RGB | None,
        Option("Mean to subtract from values in 0..1 [as its source says].", metavar="R,G,B", parse=parse_rgb),
    ] = None
    teacher_std: Annotated[
        RGB | None,
        Option(
            "Standard deviation to divide by [as its source says].",
            metavar="R,G,B",
            parse=partial(parse_rgb, divides=True),
        ),
    ] = None
    teacher_interpolation: Annotated[
        Interpolation | None, Option("How its images are resized [as its source says].")
    ] = None
    data: Data = DATA
    augment: Augment = None
    sequence: Sequence = "random"
    views: Annotated[int | None, Option("How many augmented views [by dataset].", ge=1, le=100_000)] = None
    topk: Annotated[int | None, Option("Classes to store [all up to 200, else 20].", ge=1)] = None
    temperatures: Annotated[
        tuple[float, ...], Option("Temperatures at which the tail is stored.", parse=parse_temperatures)
    ] = TEMPERATURES
    precision: Annotated[
        Precision | None,
        Option("Precision of the stored gaps between logits [uint8 for top-k, float16 for dense records]."),
    ] = None
    tail_std: Annotated[bool, Option("With top-k records: store what --loss logit-std needs.")] = False
    class_map: ClassMap = None
    unlabelled: Unlabelled = False
    out: CacheFolder = None
    seed: Seed = 0
    batch_size: Annotated[int | None, Option("Images that the teacher gets at once [by dataset].", own=True, ge=1)] = (
        None
    )
    device: Device = None
    amp: Bf16 = None
    workers: Workers = None
    views_per_decode: Annotated[
        int,
        Option(
            "Views cut from an image file each time it is decoded. With 4, a view takes about half as long as with 1; "
            "more gain little and need memory. Records are the same.",
            ge=1,
        ),
    ] = VIEWS_PER_DECODE
    compile: Annotated[bool | None, Option("torch.compile the network [on CUDA where it pays; not on CPU].")] = None
    full_fingerprint: FullFingerprint = False
    allow_low_accuracy: Annotated[bool, Option("Build although the teacher is near chance or permuted.")] = False
    part: int = PART
