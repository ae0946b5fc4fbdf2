"""What `kdcache teach`, `kdcache train` and `kdcache eval` are asked for.

Importing this file costs nothing: the command line makes its options from it.
"""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from kdcache.cache.files import is_there
from kdcache.pipeline.build.config import Weights
from kdcache.pipeline.commandline.options import (
    Argument,
    Bf16,
    Device,
    Option,
    Registry,
    Seed,
    StoreSize,
    Trust,
    Workers,
)
from kdcache.pipeline.data.defaults import DATA, Augment, Data, data_option, names_function

Optimiser = Literal["sgd", "adamw", "muon"]
Amp = Literal["bf16", "fp16"]

DEFAULT_LOSS = "nkd"
SAVE_EVERY = 300.0  # seconds
LOGS = ("tensorboard", "csv", "wandb", "mlflow")


def parse_losses(text: str) -> tuple[str, ...]:
    """The losses of a list: nkd,dkd:beta=2,warmup=5,kd are three, as key=value belongs to the loss before it."""
    found: list[str] = []
    for item in filter(None, text.split(",")):
        if found and "=" in item and ":" not in item:
            found[-1] += f",{item}"
        else:
            found.append(item)
    if not found:
        raise ValueError("no loss is named")
    return tuple(found)


def parse_caches(text: str) -> tuple[str, ...]:
    """The caches of a list with commas, or the one whose path has commas in it."""
    return (text,) if text and is_there(Path(text)) else tuple(filter(None, text.split(",")))


def parse_log(text: str) -> str:
    """The loggers of a list, each once, in the order of LOGS."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in (*LOGS, "none")]:
        raise ValueError(f"{unknown[0]} is no logger: take some of {', '.join(LOGS)}, or none")
    if not asked or ("none" in asked and len(set(asked)) > 1):
        raise ValueError("name loggers, or none alone")
    return ",".join(name for name in (*LOGS, "none") if name in asked)


# One image has no statistics for a batch norm.
BatchSize = Annotated[int | None, Option("Images a step [by dataset].", ge=2)]
Epochs = Annotated[int | None, Option("[by dataset]", ge=1)]
Rate = Annotated[float | None, Option("Peak learning rate [by dataset].", gt=0)]
Decay = Annotated[float | None, Option("[by dataset]", ge=0)]
Student = Annotated[str | None, Option("A network's name [by dataset].", metavar="NAME", is_code=names_function)]
StudentWeights = Annotated[str | None, Option("A checkpoint for the student to start from.", metavar="FILE[#PLACE]")]
ImageSize = Annotated[int | None, Option("The student's input size in pixels.", ge=8)]


@dataclass(frozen=True)
class TeachConfig:
    """What to teach. None means the default for the dataset's kind (defaults.py)."""

    teacher: Annotated[
        str,
        Option(
            "A network's name.",
            metavar="NAME",
            is_code=names_function,
            missing="the network to teach, such as --teacher resnet34.",
        ),
    ]
    data: Data = DATA
    augment: Augment = None
    epochs: Epochs = None
    batch_size: BatchSize = None
    lr: Rate = None
    weight_decay: Decay = None
    seed: Seed = 0
    device: Device = None
    amp: Bf16 = None
    workers: Workers = None
    force: Annotated[bool, Option("Teach again one that is there.")] = False


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate: the last weights of a run folder, or a weights file. None means what the run has."""

    run: Annotated[str, Argument()]
    data: Annotated[str | None, data_option("Any labelled data with the run's classes [the run's].", own=True)] = None
    cache: Annotated[str | None, Option("[the run's]", metavar="PATH|KEY|NAME|URL", own=True)] = None
    student: Annotated[
        str | None,
        Option("[the run's, unless it is a function]", metavar="NAME", own=True, is_code=names_function),
    ] = None
    teacher: Annotated[
        str | None,
        Option(
            "That learnt beside it [the run's, unless it is a function].",
            metavar="NAME",
            own=True,
            is_code=names_function,
        ),
    ] = None
    registry: Registry = None
    trust: Trust = None
    device: Device = None
    workers: Workers = None
    predictions: Annotated[
        str | None, Option("Write what it answers for each image; .csv or .parquet.", metavar="FILE", own=True)
    ] = None
    train_images: Annotated[
        int | None,
        Option("Compare it with its teacher on so many training images too [2,000].", metavar="N", own=True, ge=0),
    ] = None


@dataclass(frozen=True)
class TrainConfig:
    """What to train. None means the default for the dataset's kind (defaults.py), or the only one that matches.

    loss: None for DEFAULT_LOSS, or for that of the run that is resumed.

    validation: the fraction of the training images that is held out to choose the best weights by. By default they are
    chosen by the validation split of data that have three splits, and by nothing where there is none.
    """

    loss: Annotated[
        str | None,
        Option(
            "See docs/losses.md. Given several times: all of them are trained.",
            metavar="NAME[:KEY=VALUE,...]",
            several=True,
            parse=parse_losses,
            default=DEFAULT_LOSS,
        ),
    ] = None
    cache: Annotated[
        str | None,
        Option(
            "[the only one that matches] Given several times: what kdcache mix makes of them.",
            metavar="PATH|KEY|NAME|URL",
            several=True,
            parse=parse_caches,
        ),
    ] = None
    _: KW_ONLY
    registry: Registry = None
    trust: Trust = None
    local_store_size: StoreSize = None
    data: Data = DATA
    student: Student = None
    student_weights: StudentWeights = None
    epochs: Epochs = None
    out: Annotated[
        str | None, Option("The run's folder, or that of several runs [runs/...].", metavar="DIR", own=True)
    ] = None
    resume: Annotated[bool, Option("Go on with what is in --out, with its own settings.")] = False
    batch_size: BatchSize = None
    lr: Rate = None
    weight_decay: Decay = None
    warmup: Annotated[float, Option("Epochs.", ge=0)] = 1.0
    views: Annotated[int | None, Option("Use only the first so many views.", ge=1)] = None
    image_size: ImageSize = None
    crops_per_decode: Annotated[
        int,
        Option(
            "Views that an image of a batch is taken in at once, so that its file is decoded once for all of them. "
            "With 4, images come more than twice as fast; a batch holds a quarter as many.",
            ge=1,
        ),
    ] = 1
    online: Annotated[bool, Option("Run the teacher in every step instead: the baseline. With bdkd it learns too.")] = (
        False
    )
    fresh_views: Annotated[bool, Option("With --online: a new view every epoch.")] = False
    allow_renderer: Annotated[bool, Option("Train on image files in a .beton as FFCV resizes them.")] = False
    sync_bn: Annotated[bool, Option("Batch norm over the whole batch of all torchrun ranks, on GPUs.")] = False
    teacher: Annotated[str | None, Option("Take a cache of this teacher.", metavar="NAME", is_code=names_function)] = (
        None
    )
    weights: Weights = None
    seed: Annotated[
        int,
        Option(
            "Seed of all that is drawn at random. Given several times: every loss is trained with each.",
            metavar="INTEGER",
            several=True,
            ge=0,
            le=2**63 - 1,
        ),
    ] = 0
    optimiser: Annotated[
        Optimiser,
        Option(
            "sgd: Nesterov's, rates by dataset; adamw: lr 0.001, decay 0.05; muon: lr 0.02, decay 0.01, of the weights "
            "of two dimensions, all others by sgd at the dataset's rates. In proportion to the batch (sgd) or to its "
            "root.",
            flags=("--optimiser", "--optimizer"),
        ),
    ] = "sgd"
    accumulate: Annotated[int, Option("Batches an update.", ge=1)] = 1
    clip: Annotated[float | None, Option("Largest norm of an update's gradient.", gt=0)] = None
    ema: Annotated[
        float | None,
        Option(
            "Average the weights, 0.9999 for one; the average is what is evaluated and filed.",
            metavar="DECAY",
            gt=0,
            lt=1,
        ),
    ] = None
    compile: Annotated[bool | None, Option("torch.compile [on a GPU, for 10,000 batches or more].")] = None
    save_every: Annotated[float, Option("How often the state is kept within an epoch.", metavar="SECONDS", ge=0)] = (
        SAVE_EVERY
    )
    evaluate_every: Annotated[
        int,
        Option("How often the student is evaluated; after the last epoch always.", metavar="EPOCHS", ge=1),
    ] = 1
    log: Annotated[
        str | None,
        Option(
            "Log to tensorboard, csv, wandb, mlflow or none: see docs/logs.md. [tensorboard, where it is installed]",
            metavar="NAME,...",
            parse=parse_log,
        ),
    ] = None
    validation: Annotated[
        float | None,
        Option(
            "Hold out such a part of the training images, 0.1 for one, and file the weights that are best on it too. "
            "[the data's third split, where they have one]",
            metavar="FRACTION",
            gt=0,
            lt=1,
        ),
    ] = None
    device: Device = None
    amp: Annotated[Amp | None, Option("Run the network in half precision.")] = None
    workers: Workers = None
