"""The defaults of each kind of dataset, for whatever the user leaves out; docs/defaults.md shows the same table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from kdcache.pipeline.commandline.options import Option

if TYPE_CHECKING:
    from kdcache.pipeline.data.dataset import Dataset

DATA = "digits"
DENSE_UP_TO = 200  # classes; above, the top DEFAULT_K are stored
DEFAULT_K = 20


@dataclass(frozen=True)
class Defaults:
    """augment and views of a cache; student, epochs, weight decay, batch size and peak learning rate at that batch
    of training; build_batch of a build, at most (`batch_for`)."""

    augment: str
    views: int
    student: str
    epochs: int
    train_batch: int
    lr: float
    decay: float
    build_batch: int

    def rate(self, batch: int) -> float:
        """The peak learning rate at another batch size: in proportion."""
        return self.lr * batch / self.train_batch

    def batch_for(self, device: str, size: int, samples: int) -> int:
        """Images that a teacher gets at once on a kind of device ("cpu", "cuda"), at its input size in pixels.

        A table and no measurement: the last bits of logits depend on it, so all builders of a cache have to choose
        alike. It is bench/batches.py's: on a CPU, activations of many large images do not stay in its caches.
        """
        table = _CPU_BATCHES if device == "cpu" else ()
        return min(next((batch for side, batch in table if size > side), self.build_batch), self.build_batch, samples)


# On a CPU, of images with more pixels a side than this.
_CPU_BATCHES = (128, 8), (48, 32)

_DIGITS = Defaults("crop", 8, "resnet8", 20, 64, 0.05, 5e-4, 256)
_SMALL = Defaults("crop,flip", 16, "resnet20", 60, 128, 0.1, 5e-4, 256)
_FILES = Defaults("rrc,flip", 16, "resnet18", 100, 256, 0.1, 1e-4, 128)


def defaults_for(data: Dataset) -> Defaults:
    """The row of the table for a dataset."""
    if data.name == "digits":
        return _DIGITS
    return _SMALL if data.in_memory else _FILES


def stored_classes(classes: int) -> int | None:
    """K where --topk is not given: None (dense) for few classes."""
    return None if classes <= DENSE_UP_TO else DEFAULT_K


# The options that name data, for the command line. What they call is imported late: options must cost no time.


def names_function(text: str) -> bool:
    """Whether a --data, --teacher or --student is `module:function`, code of the user's."""
    from kdcache.pipeline.data.dataset import is_function

    return is_function(text) and not text.startswith("timm/")


def _with_folders(spec: str, train_folder: str | None, eval_folder: str | None) -> str:
    from kdcache.pipeline.data.dataset import with_folders

    return with_folders(spec, train_folder, eval_folder)


def data_option(help: str, own: bool = False) -> Option:
    """--data with --train-folder and --eval-folder, which become part of its value."""
    train = Option("The folder of the train split in PATH [train; . without splits].", metavar="NAME")
    held = Option("The folder of the evaluation split [val, test, ...].", metavar="NAME")
    parts = {"train_folder": train, "eval_folder": held}
    return Option(help, "NAME[:PATH]", own=own, is_code=names_function, parts=parts, join=_with_folders)


Data = Annotated[
    str, data_option("digits, cifar10, cifar100, fashion-mnist, imagenet:PATH, imagefolder:PATH or module:function.")
]
Augment = Annotated[str | None, Option("crop,flip  rrc,flip  ... [by dataset].", metavar="POLICY")]
Unlabelled = Annotated[bool, Option("Build without labels (L = 0).")]
