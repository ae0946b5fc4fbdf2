"""The defaults of each kind of dataset, for whatever the user leaves out; docs/defaults.md shows the same table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from kdcache.pipeline.commandline.options import Option

if TYPE_CHECKING:
    from kdcache.pipeline.data.dataset import Dataset

DATA = "digits"
DENSE_UP_TO = 200  # classes; above, the top DEFAULT_K are stored
DEFAULT_K = 20


@dataclass(frozen=True)
class Defaults:
    """The defaults for one kind of dataset.

    augment, views: for a cache. student, epochs, train_batch, lr, decay: for training; lr is the peak learning rate at
    a batch size of train_batch, and decay is the weight decay. build_batch: the most images that a teacher gets at once
    in a build (see batch_for).
    """

    augment: str
    views: int
    student: str
    epochs: int
    train_batch: int
    lr: float
    decay: float
    build_batch: int

    def to_teach(self, work: int) -> Defaults:
        """The defaults for teaching a network. work: its multiply-adds for an image, and two for each weight's update.

        On the digits a large network gets fewer epochs, so that nobody waits for minutes before anything useful
        happens, and a lower rate, with which it learns enough in them (bench/first_minutes.py measures that). On other
        data nothing changes.
        """
        if self != _DIGITS or work <= _LARGE_WORK:
            return self
        return replace(self, epochs=max(_FEWEST_EPOCHS, round(self.epochs * _LARGE_WORK / work)), lr=_LARGE_RATE)

    def rate(self, batch: int) -> float:
        """The peak learning rate at another batch size, to which it is proportional."""
        return self.lr * batch / self.train_batch

    def batch_for(self, device: str, size: int, samples: int) -> int:
        """How many images a teacher gets at once on a kind of device ("cpu", "cuda"). size: its input size in pixels.

        A table decides and not a measurement, because the last bits of logits depend on the batch size, and all
        builders of a cache have to choose alike. The table was measured by bench/batches.py: a CPU's caches do not hold
        the activations of many large images.
        """
        table = _CPU_BATCHES if device == "cpu" else ()
        return min(next((batch for side, batch in table if size > side), self.build_batch), self.build_batch, samples)


# (size, batch): how many images a CPU gets at once that have more pixels a side than this size.
_CPU_BATCHES = (128, 8), (48, 32)

_DIGITS = Defaults("crop", 8, "resnet8", 20, 64, 0.05, 5e-4, 256)
# On the digits: the work an image above which a network is large, the fewest epochs that such a network is taught, and
# its peak learning rate.
_LARGE_WORK, _FEWEST_EPOCHS, _LARGE_RATE = 40_000_000, 5, 0.01
_SMALL = Defaults("crop,flip", 16, "resnet20", 60, 128, 0.1, 5e-4, 256)
_FILES = Defaults("rrc,flip", 16, "resnet18", 100, 256, 0.1, 1e-4, 128)


def defaults_for(data: Dataset) -> Defaults:
    """The row of the table for a dataset."""
    if data.name == "digits":
        return _DIGITS
    return _SMALL if data.in_memory else _FILES


def stored_classes(classes: int) -> int | None:
    """How many classes a record stores where --topk is not given; None (all, dense) where there are few."""
    return None if classes <= DENSE_UP_TO else DEFAULT_K


# Options of the command line that name data. What they call is imported late, so that making them takes no time.


def names_function(text: str) -> bool:
    """Whether a value of --data, --teacher or --student is a `module:function`, which is the user's code."""
    from kdcache.pipeline.data.dataset import is_function

    return is_function(text) and not text.startswith("timm/")


def _with_folders(spec: str, train_folder: str | None, eval_folder: str | None) -> str:
    from kdcache.pipeline.data.dataset import with_folders

    return with_folders(spec, train_folder, eval_folder)


def data_option(help: str, own: bool = False) -> Option:
    """Make the option --data, with --train-folder and --eval-folder, which become part of its value."""
    train = Option("The folder of the train split in PATH [train; . without splits].", metavar="NAME")
    held = Option("The folder of the evaluation split [val, test, ...].", metavar="NAME")
    parts = {"train_folder": train, "eval_folder": held}
    return Option(help, "NAME[:PATH]", own=own, is_code=names_function, parts=parts, join=_with_folders)


Data = Annotated[
    str,
    data_option(
        "digits, cifar10, cifar100, fashion-mnist, imagenet:PATH, imagefolder:PATH, files:TABLE, hf:PATH, wds:TARS or "
        "module:function."
    ),
]
Augment = Annotated[
    str | None,
    Option(
        "Operations such as rrc,flip,randaugment(2,9), or a named policy: kdcache views --list [by dataset].",
        metavar="POLICY",
    ),
]
Unlabelled = Annotated[bool, Option("Build without labels (L = 0).")]
