"""The command line: parse, call, print."""

from __future__ import annotations

import _thread
import errno
import functools
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from kdcache import __version__

if TYPE_CHECKING:
    from kdcache.pipeline.settings import Setting

INTERRUPTED = 130


class _Failure(click.ClickException):
    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(_safe(" ".join(message.splitlines())))


def _once(e: click.ClickException) -> click.ClickException | SystemExit:
    """Of torchrun's ranks that fail alike, one prints it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return e
    from kdcache.train.ranks import first_to_say

    return e if first_to_say(e.format_message()) else SystemExit(e.exit_code)


class _Main(click.Group):
    """Every mistake is one clear line; settings come from flags, the environment, then kdcache.toml."""

    def invoke(self, ctx: click.Context) -> Any:
        before: Callable[[Any], object] = sys.unraisablehook
        sys.unraisablehook = lambda unraisable: _unraisable(unraisable, before)
        try:
            return self._invoke(ctx)
        except click.ClickException as e:
            raise _once(e) from e
        except KeyboardInterrupt:
            # What is half made, such as a loader with its worker processes, complains as the process ends.
            before = _silent
            _say("stopped; nothing is lost: the same command (train: with --resume) goes on")
            sys.exit(INTERRUPTED)
        finally:
            sys.unraisablehook = before

    def _invoke(self, ctx: click.Context) -> Any:
        # Only here, because it takes seconds in which people press Ctrl-C.
        from kdcache.cache.errors import KdcacheError, machine_error
        from kdcache.pipeline.ranks import share_cores
        from kdcache.pipeline.settings import FILE, load_settings

        flags = {name: _flags(command) for name, command in self.commands.items()}
        found: dict[str, dict[str, Setting]] = {}
        try:
            share_cores()
            found = load_settings({name: set(known) for name, known in flags.items()}, os.environ, Path(FILE))
            ctx.default_map = {
                command: {
                    flags[command][flag]: [setting.value]
                    if flag in _repeated(self.commands[command])
                    else setting.value
                    for flag, setting in chosen.items()
                }
                for command, chosen in found.items()
            }
            return super().invoke(ctx)
        except click.BadParameter as e:
            if e.ctx and e.param and e.ctx.get_parameter_source(e.param.name or "") is ParameterSource.DEFAULT_MAP:
                origin = found[str(e.ctx.info_name)][_flag(e.param)].origin
                raise click.BadParameter(f"{e.message} (from {origin})", e.ctx, e.param, e.param_hint) from e
            raise
        except KdcacheError as e:
            raise _Failure(str(e)) from e
        except OSError as e:
            if e.errno == errno.EPIPE:
                raise  # the reader of our output has gone, as in `kdcache ls | head`: click ends quietly
            raise _Failure(_system_error(e)) from e
        except (MemoryError, RuntimeError) as e:
            if (reason := machine_error(e)) is None:
                raise
            raise _Failure(reason) from e


def _unraisable(unraisable: Any, otherwise: Callable[[Any], object]) -> None:
    """Ctrl-C that fell where Python drops exceptions, as when worker processes start or end, comes a moment later."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        otherwise(unraisable)


def _silent(unraisable: Any) -> None:
    pass


def _flag(param: click.Parameter) -> str:
    return max(param.opts, key=len).lstrip("-")


def _flags(command: click.Command) -> dict[str, str]:
    """The command's options as typed, without the dashes, and the names of their parameters."""
    return {_flag(p): p.name for p in command.params if isinstance(p, click.Option) and p.name}


def _repeated(command: click.Command) -> set[str]:
    """Those of which click takes a list."""
    return {_flag(p) for p in command.params if isinstance(p, click.Option) and p.multiple}


def _system_error(e: OSError) -> str:
    what = f"{e.filename}: {e.strerror}" if e.filename else str(e)
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}: free some space and run the same command again, it goes on where it was"
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}: give a place that can be written with --out or KDCACHE_HOME"
    if e.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{what}: a folder is needed there; give another --out or KDCACHE_HOME"
    return what


def _print(facts: dict[str, Any] | list[Any], as_json: bool, text: str) -> None:
    if not _later_rank():
        click.echo(json.dumps(facts, indent=2, default=str) if as_json else _safe(text))


def _say(text: str) -> None:
    if not _later_rank():
        click.echo(_safe(text), err=True)


def _later_rank() -> bool:
    """Whether this is one of torchrun's processes that leave it to rank 0 to talk."""
    from kdcache.pipeline.ranks import this_rank

    return this_rank().rank > 0


def _safe(text: str) -> str:
    """What a terminal shows and does not obey: others write the names that are printed here."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class _Bytes(click.ParamType[int]):
    """A size such as 20GB, or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(|k|M|G|T)B?", str(value))
        if found is None:
            self.fail(f"{value} is no size such as 500MB or 20GB.", param, ctx)
        return int(float(found[1]) * 1000 ** ("", "k", "M", "G", "T").index(found[2]))


class _Number(click.FloatRange):
    """A finite number: nan passes every comparison with a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def _temperatures(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(t) for t in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,2,4") from None
    if not all(0 < t < 1000 for t in found):
        raise click.BadParameter(f"{value!r}: temperatures lie between 0 and 1000")
    return found


def _views(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    if value is None:
        return None
    first, colon, after = value.partition(":")
    if not (colon and first.isdecimal() and after.isdecimal() and int(first) < int(after) <= 100_000):
        raise click.BadParameter(f"{value!r} is not a range A:B of views such as 0:100, which is views 0 to 99")
    return range(int(first), int(after))


def _losses(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """nkd,dkd:beta=2,warmup=5,kd are three: a comma before key=value goes on with the loss before it."""
    found: list[str] = []
    for item in filter(None, ",".join(value).split(",")):
        if found and "=" in item and ":" not in item:
            found[-1] += f",{item}"
        else:
            found.append(item)
    if not found:
        raise click.BadParameter("no loss is named")
    return tuple(found)


def _seeds(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(_SEED(seed, param, ctx)) for seed in ",".join(value).split(","))


def _split_folders(command: Callable[..., Any]) -> Callable[..., Any]:
    """--train-folder and --eval-folder, which become part of --data."""

    @functools.wraps(command)
    def call(*args: Any, train_folder: str | None, eval_folder: str | None, **options: Any) -> Any:
        if train_folder is not None or eval_folder is not None:
            from kdcache.pipeline.datasets import with_folders

            if options["data"] is None:
                raise click.UsageError("--train-folder and --eval-folder need --data.")
            options["data"] = with_folders(options["data"], train_folder, eval_folder)
        return command(*args, **options)

    held = click.option("--eval-folder", metavar="NAME", help="The folder of the evaluation split [val, test, ...].")
    train = click.option(
        "--train-folder", metavar="NAME", help="The folder of the train split in PATH [train; . without splits]."
    )
    return train(held(call))


def _data(command: Callable[..., Any]) -> Callable[..., Any]:
    """--data and what belongs to it."""
    option = click.option(
        "--data", default="digits", show_default=True, metavar="NAME[:PATH]",
        help="digits, cifar10, cifar100, fashion-mnist, imagenet:PATH, imagefolder:PATH or module:function.",
    )  # fmt: skip
    return option(_split_folders(command))


_device = click.option("--device", help="cuda, cuda:1, cpu, ...; the GPU where there is one.")
_workers = click.option("--workers", type=click.IntRange(0), help="Processes that decode image files [the cores].")
_amp = click.option("--amp", type=click.Choice(["bf16"]), help="Run the network in bfloat16.")
_compile = click.option(
    "--compile/--no-compile", default=None, help="torch.compile the network [on CUDA where it pays; not on CPU]."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
# One image has no statistics for a batch norm.
_batch = click.option("--batch-size", type=click.IntRange(2), help="Images a step [by dataset].")
_weights = click.option("--weights", metavar="FILE|NAME", help="A weights file, or a torchvision name.")
_augment = click.option("--augment", metavar="POLICY", help="crop,flip  rrc,flip  ... [by dataset].")
_unlabelled = click.option("--unlabelled", is_flag=True, help="Build without labels (L = 0).")
_class_map = click.option("--class-map", metavar="FILE|auto", help="Dataset's class names to the teacher's classes.")
_registry = click.option(
    "--registry", metavar="URL|DIR", help="A team's caches: a folder, s3://..., gs://..., az://..., https://..."
)
_store_size = click.option(
    "--local-store-size", type=_Bytes(), help="To keep here of a cache in a registry that is read from there [20GB]."
)
_epochs = click.option("--epochs", type=click.IntRange(1), help="[by dataset]")
_lr = click.option("--lr", type=_Number(0, min_open=True), help="Peak learning rate [by dataset].")
_decay = click.option("--weight-decay", type=_Number(0), help="[by dataset]")
_SEED = click.IntRange(0, 2**63 - 1)
_seed = click.option("--seed", type=_SEED, default=0, show_default=True, help="Of everything drawn at random.")


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kdcache")
def main() -> None:
    """Run a teacher once, keep what students need, train any number of them without it.

    \b
      kdcache build --teacher resnet34
      kdcache train --loss nkd

    Without --data both work on scikit-learn's digits, to try things out.
    """


@main.command()
@click.option("--teacher", required=True, metavar="NAME", help="A network's name.")
@_data
@_augment
@_epochs
@_batch
@_lr
@_decay
@_seed
@_device
@_amp
@_workers
@click.option("--force", is_flag=True, help="Teach again one that is there.")
@_json
def teach(as_json: bool, **options: Any) -> None:
    """Train a teacher on a dataset that has no pretrained one.

    Example: kdcache teach --teacher resnet56 --data cifar10 --epochs 60
    """
    from kdcache.train.teach import TeachConfig
    from kdcache.train.teach import teach as run

    path, top1 = run(TeachConfig(**options), _say)
    _print({"weights": str(path), "top1": top1}, as_json, str(path))


@main.command()
@click.option("--teacher", metavar="NAME", help="A network's name.  [required]")
@_weights
@_data
@_augment
@click.option("--views", type=click.IntRange(1, 100_000), help="How many augmented views [by dataset].")
@click.option("--topk", type=click.IntRange(1), help="Classes to store [all up to 200, else 20].")
@click.option(
    "--temperatures", default="1,2,3,4", show_default=True, callback=_temperatures, help="At which the tail is stored."
)
@click.option(
    "--precision",
    type=click.Choice(["uint8", "float16", "float32"]),
    help="Of the stored gaps between logits [uint8 for top-k, float16 for dense records].",
)
@click.option("--tail-std", is_flag=True, help="With top-k records: store what --loss logit-std needs.")
@_class_map
@_unlabelled
@click.option("--out", metavar="PATH", help="The cache's folder [under KDCACHE_HOME, by its key].")
@click.option(
    "--store",
    type=click.Choice(["zarr", "hdf5", "ffcv"]),
    default="zarr",
    show_default=True,
    help="Also pack it into one file.",
)
@_seed
@click.option("--batch-size", type=click.IntRange(1), help="Images that the teacher gets at once [by dataset].")
@_device
@_amp
@_workers
@click.option(
    "--views-per-decode", type=click.IntRange(1), default=4, show_default=True,
    help="Views cut from an image file each time it is decoded: 4 take about half the time of 1 each, more gain "
    "little and take memory. Records are the same.",
)  # fmt: skip
@_compile
@click.option("--full-fingerprint", is_flag=True, help="Hash every file's contents, not 4,096 of them.")
@click.option("--allow-low-accuracy", is_flag=True, help="Build although the teacher is near chance.")
@click.option("--list-unreadable", is_flag=True, help="Name every image file that cannot be read, and stop.")
@_registry
@click.option("--push", "publish", is_flag=True, help="Publish it in the registry.")
@_json
def build(
    as_json: bool,
    list_unreadable: bool,
    registry: str | None,
    publish: bool,
    teacher: str | None,
    store: Literal["zarr", "hdf5", "ffcv"],
    **options: Any,
) -> None:
    """Run the teacher once over every view and store its answers.

    \b
    Example: kdcache build --teacher resnet34
             kdcache build --teacher resnet34 --data imagenet:/data/imagenet --views 16
             kdcache build --teacher resnet34 --store hdf5
             kdcache build --teacher resnet34 --registry s3://bucket/kd --push
             kdcache build --data imagefolder:/data/birds --list-unreadable

    With a registry, what is published there is not computed again.
    """
    from kdcache.pipeline.build import BuildConfig
    from kdcache.pipeline.pack import pack as run_pack
    from kdcache.pipeline.ranks import this_rank
    from kdcache.train.teach import build_and_teach, unreadable_files

    if list_unreadable:
        found = unreadable_files(options["data"], options["unlabelled"], _say)
        _print(found, as_json, "\n".join(found) or "every file can be read")
        sys.exit(1 if found else 0)
    if teacher is None:
        raise click.UsageError("Missing option '--teacher'.")
    result = build_and_teach(BuildConfig(teacher, **options), _say, registry, publish)
    if store == "zarr" or this_rank().rank:
        _print(vars(result), as_json, str(result.path))
    else:
        packed = run_pack(result.path, store, data=options["data"], say=_say)
        _print({**vars(result), "packed": vars(packed)}, as_json, str(packed.path))


@main.command()
@click.argument("cache")
@click.option("--to", type=click.Choice(["hdf5", "ffcv"]), required=True, help="One file, for h5py or FFCV's loader.")
@click.option("--out", metavar="FILE", help="[beside the cache, with .h5 or .beton]")
@click.option("--views", metavar="A:B", callback=_views, help="Views A to B - 1 [all that are complete].")
@click.option("--data", metavar="NAME[:PATH]", help="For ffcv: where the images are [by the name in the cache].")
@_split_folders
@_json
def pack(as_json: bool, cache: str, **options: Any) -> None:
    """Write a cache into one file: it is read by its path as a folder is.

    \b
    Example: kdcache pack 1f0c2a --to hdf5
             kdcache pack 1f0c2a --to hdf5 --views 0:16 --out birds.h5
             kdcache pack 1f0c2a --to ffcv --data imagenet:/data/imagenet
    """
    from kdcache.pipeline.pack import pack as run

    result = run(cache, say=_say, **options)
    _print(vars(result), as_json, str(result.path))


@main.command()
@click.argument("file")
@click.option("--out", metavar="DIR", help="The cache's folder [under KDCACHE_HOME, by its key].")
@_json
def unpack(as_json: bool, file: str, out: str | None) -> None:
    """Make a folder of a packed cache (HDF5), which can be built on.

    Example: kdcache unpack birds.h5
    """
    from kdcache.pipeline.pack import unpack as run

    result = run(file, out, _say)
    _print(vars(result), as_json, str(result.path))


@main.command()
@click.option(
    "--loss", multiple=True, default=["nkd"], show_default=True, callback=_losses, metavar="NAME[:KEY=VALUE,...]",
    help="See docs/losses.md. Given several times: all of them are trained.",
)  # fmt: skip
@click.option("--cache", metavar="PATH|KEY|NAME|URL", help="[the only one that matches]")
@_registry
@_store_size
@_data
@click.option("--student", metavar="NAME", help="A network's name [by dataset].")
@_epochs
@click.option("--out", metavar="DIR", help="The run's folder, or that of several runs [runs/...].")
@click.option("--resume", is_flag=True, help="Go on with what is in --out.")
@_batch
@_lr
@_decay
@click.option("--warmup", type=_Number(0), default=1.0, show_default=True, help="Epochs.")
@click.option("--views", type=click.IntRange(1), help="Use only the first so many views.")
@click.option("--image-size", type=click.IntRange(8), help="The student's input size in pixels.")
@click.option(
    "--online", is_flag=True, help="Run the teacher in every step instead: the baseline. With bdkd it learns too."
)
@click.option("--fresh-views", is_flag=True, help="With --online: a new view every epoch.")
@click.option("--allow-renderer", is_flag=True, help="Train on image files in a .beton as FFCV resizes them.")
@click.option("--sync-bn", is_flag=True, help="Of torchrun's ranks, on GPUs: batch norm over the whole batch.")
@click.option("--teacher", metavar="NAME", help="Take a cache of this teacher.")
@_weights
@click.option(
    "--seed", multiple=True, default=["0"], show_default=True, callback=_seeds, metavar="INTEGER",
    help="Of everything drawn at random. Given several times: every loss is trained with each.",
)  # fmt: skip
@click.option(
    "--optimiser", type=click.Choice(["sgd", "adamw", "muon"]), default="sgd", show_default=True,
    help="sgd: Nesterov's, rates by dataset; adamw: lr 0.001, decay 0.05; muon: lr 0.02, decay 0.01, of the weights of "
    "two dimensions, all others by sgd at the dataset's rates. In proportion to the batch (sgd) or to its root.",
)  # fmt: skip
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Batches an update.")
@click.option("--clip", type=_Number(0, min_open=True), help="Largest norm of an update's gradient.")
@click.option(
    "--ema", type=_Number(0, 1, min_open=True, max_open=True), metavar="DECAY",
    help="Average the weights, 0.9999 for one; the average is what is evaluated and filed.",
)  # fmt: skip
@click.option("--compile/--no-compile", default=None, help="torch.compile [on a GPU, for 10,000 batches or more].")
@click.option(
    "--save-every", type=_Number(0), default=300.0, show_default=True, metavar="SECONDS",
    help="How often the state is kept within an epoch.",
)  # fmt: skip
@click.option(
    "--evaluate-every", type=click.IntRange(1), default=1, show_default=True, metavar="EPOCHS",
    help="How often the student is evaluated; after the last epoch always.",
)  # fmt: skip
@_device
@click.option("--amp", type=click.Choice(["bf16", "fp16"]), help="Run the network in half precision.")
@_workers
@_json
def train(as_json: bool, **options: Any) -> None:
    """Train a student from a cache; with several losses or seeds all of them, and compare. Exit status 1 if one fails.

    \b
    Example: kdcache train --loss nkd
             kdcache train --loss nkd --student resnet20 --data cifar10 --epochs 60
             kdcache train --loss ce --loss nkd --loss dkd:beta=2 --seed 0 --seed 1 --seed 2
             kdcache train --loss nkd --data cifar10 --cache cifar10.beton     (by FFCV's loader)
             kdcache train --loss nkd --registry s3://bucket/kd --cache r34-imagenet-v1
             torchrun --nproc-per-node 4 -m kdcache.cli train --loss nkd       (by 4 processes, each a GPU of its own)
    """
    from kdcache.train.run import TrainConfig
    from kdcache.train.run import train as run
    from kdcache.train.sweep import sweep, table

    losses, seeds = options.pop("loss"), options.pop("seed")
    config = TrainConfig(losses[0], seed=seeds[0], **options)
    if len(losses) * len(seeds) > 1:
        result = sweep(config, losses, seeds, _say)
        _print(result, as_json, table(result))
        sys.exit(1 if any("error" in one for one in result["runs"]) else 0)
    summary = run(config, _say)
    line = "  ".join(f"{k} {v:.4f}" for k, v in summary.items() if isinstance(v, float))
    _print(summary, as_json, f"{summary['run']}: {line}")


@main.command(name="eval")
@click.argument("run")
@click.option("--data", metavar="NAME[:PATH]", help="[the run's]")
@_split_folders
@click.option("--cache", metavar="PATH|KEY|NAME|URL", help="[the run's]")
@_registry
@_device
@_workers
@_json
def evaluate(as_json: bool, run: str, **options: Any) -> None:
    """Top-1, top-5, NLL, Brier score, ECE, agreement with the teacher and KL to it.

    Of a run's best weights, or of a weights file.

    Example: kdcache eval runs/digits-resnet8-nkd-seed0
    """
    from kdcache.train.run import evaluate_run

    found = evaluate_run(run, **options)
    _print(found, as_json, "\n".join(f"{k:13} {v:.4f}" for k, v in found.items() if isinstance(v, float)))


@main.command(name="import")
@click.argument("kind", type=click.Choice(["tinyvit", "fkd"]))
@click.argument("path")
@click.option("--data", required=True, metavar="NAME[:PATH]", help="The images they are of: imagenet:PATH, ...")
@_split_folders
@click.option("--classes", type=click.IntRange(2, 2**32 - 1), help="Of the teacher [the dataset's].")
@click.option("--teacher", default="unknown", show_default=True, metavar="NAME", help="What to call it.")
@click.option("--image-size", type=click.IntRange(8), default=224, show_default=True, help="The teacher's, in pixels.")
@click.option(
    "--temperature", type=_Number(0, 1000, min_open=True, max_open=True), default=1.0, show_default=True,
    help="Of the stored softmax (FKD's --temp).",
)  # fmt: skip
@_unlabelled
@click.option("--allow-low-accuracy", is_flag=True, help="Import although the stored answers are near chance.")
@click.option("--full-fingerprint", is_flag=True, help="Hash every file's contents, not 4,096 of them.")
@click.option("--out", metavar="PATH", help="The cache's folder [under KDCACHE_HOME, by its key].")
@_json
def import_command(as_json: bool, **options: Any) -> None:
    """Make a cache of logits that TinyViT's or FKD's code has stored. Stopped, the same command goes on.

    \b
    Example: kdcache import fkd FKD_effL2_475_soft_label --data imagenet:/data/imagenet --teacher effL2
             kdcache import tinyvit teacher_logits --data imagenet:/data/imagenet

    What they do not hold is recorded as lacking, and losses that need it refuse: see docs/stores.md.
    """
    from kdcache.pipeline.imports import ImportConfig, import_logits

    result = import_logits(ImportConfig(**options), _say)
    _print(vars(result), as_json, str(result.path))


@main.command(name="ls")
@_registry
@_json
def list_command(as_json: bool, registry: str | None) -> None:
    """The caches under KDCACHE_HOME, and those in the registry.

    \b
    Example: kdcache ls
             kdcache ls --registry s3://bucket/kd
    """
    from kdcache.cache.home import list_caches, open_registry
    from kdcache.pipeline.info import one_line, shared_summaries, summary

    good, bad = list_caches()
    found, lines = [summary(c) for c in good], [*map(one_line, good)]
    if registry is not None:
        if lines and not as_json:  # whatever the network does
            _print([], False, "\n".join(lines))
        shared = open_registry(registry)
        about, lines, also_bad = shared_summaries(shared)
        found += about
        lines = [f"in {shared.url}:", *(lines or ["no caches: see kdcache push --help"])]
        bad += also_bad
    _print(found, as_json, "\n".join(lines) or "no caches: see kdcache build --help")
    for line in bad:
        _say(f"not a cache: {line}")


@main.command()
@click.argument("cache")
@_registry
@click.option("--name", help="Have this name stand for it in the registry.")
@click.option("--move", is_flag=True, help="Also where that name stands for another cache.")
@click.option("--views", metavar="A:B", callback=_views, help="Views A to B - 1 [all that are complete].")
@_json
def push(as_json: bool, cache: str, registry: str | None, **options: Any) -> None:
    """Publish a cache in the registry. What is there already stays; stopped, the same command goes on.

    \b
    Example: kdcache push 1f0c2a --registry s3://bucket/kd
             kdcache push 1f0c2a --registry /mnt/team/kd --name r34-imagenet-v1
    """
    from kdcache.pipeline.share import push as run

    result = run(cache, registry, say=_say, **options)
    _print(vars(result), as_json, result.where)


@main.command()
@click.argument("cache", metavar="KEY|NAME|URL")
@_registry
@click.option("--views", metavar="A:B", callback=_views, help="Views A to B - 1 [all that are complete].")
@click.option("--out", metavar="DIR", help="The cache's folder [under KDCACHE_HOME, by its key].")
@_json
def pull(as_json: bool, cache: str, registry: str | None, **options: Any) -> None:
    """Copy a cache from the registry, verified. Stopped, the same command goes on.

    \b
    Example: kdcache pull r34-imagenet-v1 --registry s3://bucket/kd --views 0:50
             kdcache pull https://example.org/kd/names/r34-imagenet-v1
    """
    from kdcache.pipeline.share import pull as run

    result = run(cache, registry, say=_say, **options)
    _print(vars(result), as_json, result.where)


def _typed(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Only from the command line: what belongs to a team is not removed because of a setting."""
    return value if ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE else None


_typed_registry = click.option(
    "--registry", metavar="URL|DIR", callback=_typed, help="A team's caches; here only where it is typed, no setting."
)


@main.command(name="rm")
@click.argument("cache", metavar="KEY|PATH|NAME", required=False)
@_typed_registry
@click.option("--name", help="Remove just this name from the registry.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
def remove_command(as_json: bool, cache: str | None, registry: str | None, name: str | None, yes: bool) -> None:
    """Remove a cache: here, or with --registry there. Stopped, the same command goes on.

    \b
    Example: kdcache rm 1f0c2a
             kdcache rm 1f0c2a --registry s3://bucket/kd
             kdcache rm --name r34-imagenet-v1 --registry s3://bucket/kd
    """
    from kdcache.cache.care import find, remove, remove_name
    from kdcache.pipeline.info import removed_line, summary
    from kdcache.pipeline.share import require_registry

    if (cache is None) == (name is None):
        raise click.UsageError("Give a cache, or --name NAME.")
    if name is not None:
        url = require_registry(registry)
        _confirm(f"Remove the name {name} from {url}?", yes)
        remove_name(name, url)
        _print({"name": name, "registry": url}, as_json, f"removed the name {name}")
        return
    found, shared = find(str(cache), registry)
    about, line = summary(found), removed_line(found, shared)
    _confirm(f"Remove {line}?", yes)
    remove(found, shared)
    _print(about, as_json, f"removed {line}")


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise _Failure(f"there is no terminal to ask on: give --yes ({question})")
    if not click.confirm(_safe(question), err=True):
        _say("nothing was removed")
        sys.exit(1)


@main.command()
@_typed_registry
@click.option(
    "--older", type=_Number(0), default=30.0, show_default=True, metavar="DAYS",
    help="Grace period of what has no name in the registry, and of builds that were never finished.",
)  # fmt: skip
@_store_size
@click.option("--delete", is_flag=True, help="Remove what is listed.")
@_json
def gc(as_json: bool, registry: str | None, older: float, local_store_size: int | None, delete: bool) -> None:
    """List what nothing needs any more, here and with --registry there; with --delete remove it.

    \b
    Example: kdcache gc
             kdcache gc --delete
             kdcache gc --registry /mnt/team/kd --older 90
    """
    from kdcache.cache.care import gc as run
    from kdcache.cache.care import leavings
    from kdcache.pipeline import spool
    from kdcache.pipeline.progress import size

    result = run([*leavings(older, registry, local_store_size), *spool.leavings(older)], delete)
    lines = []
    for one in result["found"]:
        why = one["why"] if one["kept"] is None else f"stays: {one['kept']}"
        lines.append(f"{size(one['bytes']):>9}  {one['path']}: {why}")
    lines.append(f"{size(result['freed'])} freed" if delete else f"{size(result['bytes'])} may go: add --delete")
    _print(result, as_json, "\n".join(lines))


@main.command()
@click.argument("cache")
@_registry
@_json
def info(as_json: bool, cache: str, registry: str | None) -> None:
    """What a cache is: how large, how complete, how faithful to its teacher.

    Example: kdcache info 1f0c2a
    """
    from kdcache.cache.home import open_cache
    from kdcache.pipeline.info import describe, facts

    opened = open_cache(cache, registry)
    found = facts(opened)
    _print(found, as_json, describe(opened, found))


@main.command()
@click.argument("cache")
@click.option("--data", metavar="NAME[:PATH]", help="Where the images are [by the name in the cache].")
@_split_folders
@_weights
@_class_map
@click.option(
    "--depth",
    type=click.Choice(["commits", "contents", "replay"]),
    default="replay",
    show_default=True,
    help="Identity, commits and files' sizes; every digest and value too; and the live teacher's answers.",
)
@click.option("--replay", type=click.IntRange(1), default=512, show_default=True, help="Records a view to replay.")
@click.option("--numeric", type=click.Choice(["float32", "bf16"]), help="In which the teacher answers [the cache's].")
@click.option("--repair", is_flag=True, help="Remove what is damaged, for the next build to make anew.")
@_device
@_registry
@_json
def verify(
    as_json: bool, cache: str, depth: str, replay: int, repair: bool, registry: str | None, **options: Any
) -> None:
    """Check that a cache is complete, undamaged, and what the live teacher answers. Exit status 1 if not.

    \b
    Example: kdcache verify 1f0c2a
             kdcache verify 1f0c2a --depth contents     (without the teacher and the images)
             kdcache verify 1f0c2a --depth contents --repair
    """
    from kdcache.cache.home import open_cache
    from kdcache.pipeline.verify import source_of
    from kdcache.pipeline.verify import verify as run

    found = open_cache(cache, registry)
    source = source_of(found, **options) if depth == "replay" else None
    report = run(found, source, contents=depth != "commits", replay=replay, repair=repair)
    seen = "looked up" if depth == "commits" else "read"
    text = [f"{report.shards} shards of {len(report.views)} complete views {seen}, {report.replayed} records replayed"]
    if report.total_variation is not None:
        text.append(f"largest mean total variation {report.total_variation:.2e}")
    text += [f"FAILED: {p}" for p in report.problems] or ["passed"]
    text += [f"removed {name}: run kdcache build again to make it anew" for name in report.repaired]
    _print({**vars(report), "passed": report.passed}, as_json, "\n".join(text))
    sys.exit(0 if report.passed else 1)


@main.command()
@click.option("--out", metavar="DIR", help="Keep everything in this empty folder.")
@_json
def demo(as_json: bool, out: str | None) -> None:
    """Teach, build and train on the embedded digits; ends with a table.

    Example: kdcache demo
    """
    from kdcache.train.demo import demo as run

    found = run(out, _say if as_json else click.echo)
    if as_json:
        _print(found, True, "")


@main.command()
@click.option("--teacher", metavar="NAME", help="A network's name [resnet56, for image files resnet34].")
@click.option("--student", metavar="NAME", help="A network's name [by dataset].")
@_data
@click.option("--loss", default="nkd", show_default=True, metavar="NAME[:KEY=VALUE,...]", help="See docs/losses.md.")
@_batch
@click.option("--image-size", type=click.IntRange(8), help="The student's input size in pixels.")
@click.option("--samples", type=click.IntRange(4), help="Images that stand for all [8 batches, on a GPU 64].")
@click.option("--rounds", type=click.IntRange(2), help="How often each thing is measured [as time allows].")
@click.option("--views", type=click.IntRange(1), help="Of the cache, for the break-even [by dataset].")
@click.option("--epochs", type=click.IntRange(1), help="Of a student, for the break-even [by dataset].")
@_device
@_amp
@click.option("--compile", is_flag=True, help="Compile teacher and student.")
@_workers
@click.option("--out", metavar="FILE", help="Write the figures as JSON.")
@_json
def bench(as_json: bool, out: str | None, **options: Any) -> None:
    """Measure what a teacher costs here: in every step, in a build, and after how many students a cache has paid.

    The teacher is untrained and a part of the data stands for all of them: time depends on neither.

    \b
    Example: kdcache bench
             kdcache bench --data cifar10 --teacher resnet56 --student resnet20 --batch-size 256 --out bench.json
    """
    from kdcache.cache.files import replace_file
    from kdcache.train.bench import BenchConfig, table
    from kdcache.train.bench import bench as run

    if out and Path(out).is_dir():
        raise click.BadParameter(f"{out} is a folder, not a file", param_hint="--out")
    found = run(BenchConfig(**options), _say)
    if out:
        replace_file(Path(out), (json.dumps(found, indent=2) + "\n").encode())
    _print(found, as_json, table(found))


if __name__ == "__main__":
    main()
