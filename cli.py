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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from kdcache import __version__

if TYPE_CHECKING:
    from kdcache.pipeline.process.settings import Option as KnownOption
    from kdcache.pipeline.process.settings import Setting

INTERRUPTED = 130
_SETTINGS = "kdcache.settings"  # where the context keeps those found


class _Failure(click.ClickException):
    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(_safe(" ".join(message.splitlines())))


def _one_line(e: click.ClickException) -> click.ClickException:
    """The same in one line: click lists the choices of what is missing below each other."""
    text = e.format_message()
    if "\n" not in text:
        return e
    return click.UsageError(" ".join(text.split()), getattr(e, "ctx", None))


def _once(e: click.ClickException) -> click.ClickException | SystemExit:
    """Of torchrun's ranks that fail alike, one prints it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return e
    from kdcache.train.group import first_to_say

    return e if first_to_say(e.format_message()) else SystemExit(e.exit_code)


class _Command(click.Command):
    """A command that refuses an option which is given twice, where click goes by the last and says nothing."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        parser = self.make_parser(ctx)
        once = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and not (p.multiple or p.count)]
        for p in once:  # the same options again, but all that is typed for them is kept
            if p.is_flag:
                parser.add_option(p, p.opts, p.name, action="append_const", const=p.opts[0])
                if p.secondary_opts:
                    parser.add_option(p, p.secondary_opts, p.name, action="append_const", const=p.secondary_opts[0])
            else:
                parser.add_option(p, p.opts, p.name, action="append", nargs=p.nargs)
        typed, rest, _ = parser.parse_args(list(args))
        if rest and all(isinstance(p, click.Option) for p in self.get_params(ctx)):
            raise click.UsageError(
                f"{self.name} takes nothing but options, and {rest[0]!r} is none: see kdcache {self.name} --help.", ctx
            )
        for p in once:
            values = typed.get(str(p.name), [])
            if p.is_flag and len(set(values)) > 1:
                raise click.UsageError(f"{' and '.join(dict.fromkeys(values))} contradict each other: give one.", ctx)
            if not p.is_flag and len(values) > 1:
                often = "twice" if len(values) == 2 else f"{len(values)} times"
                given = ", ".join(map(str, values[:-1])) + f" and {values[-1]}"
                raise click.UsageError(f"--{_flag(p)} is given {often}: {given}.", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        _tell_code(ctx)
        return super().invoke(ctx)


def _tell_code(ctx: click.Context) -> None:
    """Say which code a kdcache.toml that lies in the working directory makes run: nobody typed it for this command."""
    from kdcache.pipeline.process.settings import FILE

    for param in ctx.command.params:
        name = param.name or ""
        if name not in _CODE or ctx.get_parameter_source(name) is not ParameterSource.DEFAULT_MAP:
            continue
        setting = _setting(ctx, param)
        if setting.origin.startswith(FILE) and _names_function(setting.value):
            _say(f"note: {setting.origin} = {setting.value} is a function of your own, which is imported and called")


_CODE = {"data", "teacher", "student"}


def _names_function(text: str) -> bool:
    """Whether a --data, --teacher or --student is module:function."""
    from kdcache.pipeline.data.dataset import is_function

    return is_function(text) and not text.startswith("timm/")


class _Main(click.Group):
    """Every mistake is one clear line; settings come from flags, the environment, then kdcache.toml."""

    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        before: Callable[[Any], object] = sys.unraisablehook
        sys.unraisablehook = lambda unraisable: _unraisable(unraisable, before)
        try:
            return self._invoke(ctx)
        except click.ClickException as e:
            raise _once(_one_line(e)) from e
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
        from kdcache.pipeline.process.rank import share_cores
        from kdcache.pipeline.process.settings import FILE, load_settings

        found: dict[str, dict[str, Setting]] = {}
        try:
            share_cores()
            found = load_settings(_known(self.commands), os.environ, Path(FILE))
            ctx.meta[_SETTINGS] = found
            ctx.default_map = {
                name: {
                    str(p.name): [found[name][_flag(p)].value] if p.multiple else found[name][_flag(p)].value
                    for p in _options(command)
                    if _flag(p) in found[name]
                }
                for name, command in self.commands.items()
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


class _Own(click.Option):
    """An option that means something else than those of the same name in other commands.

    A setting that names no command is not meant for it: `views = 16` is for build and not for push.
    """


def _options(command: click.Command) -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option) and p.name]


def _flag(param: click.Parameter) -> str:
    """As typed, without the dashes; the first of two spellings."""
    return max(param.opts, key=len).lstrip("-")


def _known(commands: Mapping[str, click.Command]) -> dict[str, dict[str, KnownOption]]:
    """The options of each command by every spelling, for the settings."""
    from kdcache.pipeline.process.settings import Option as KnownOption

    lists = {_flag(p): p for command in commands.values() for p in _options(command) if p.multiple}
    known: dict[str, dict[str, KnownOption]] = {}
    for name, command in commands.items():
        known[name] = {}
        for p in _options(command):
            option = KnownOption(_flag(p), isinstance(p, _Own), partial(_takes, p, lists.get(_flag(p))))
            known[name].update({spelling.lstrip("-"): option for spelling in p.opts if spelling.startswith("--")})
    return known


def _takes(param: click.Option, as_list: click.Option | None, value: str) -> bool:
    """Whether a setting for all commands is for this one too.

    Not a choice that others offer and this one does not (amp = "fp16"), nor several values where another command takes
    a list (`as_list`) and this one does not (seed = [0, 1]).
    """
    if isinstance(param.type, click.Choice) and value not in param.type.choices:
        return False
    return param.multiple or as_list is None or _count(as_list, value) == 1


def _count(param: click.Option, value: str) -> int:
    """How many values an option that takes several finds in a setting."""
    if param.callback is None:
        return 1
    try:
        return len(param.callback(click.Context(click.Command(None)), param, (value,)))
    except click.BadParameter:
        return 1


def _for_all(name: str) -> bool:
    """Whether the running command has the option's value from a setting that names no command."""
    ctx = click.get_current_context()
    if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT_MAP:
        return False
    param = next(p for p in ctx.command.params if p.name == name)
    return _setting(ctx, param).for_all


def _setting(ctx: click.Context, param: click.Parameter) -> Setting:
    """What a parameter of the running command has from a setting."""
    found: Setting = ctx.meta[_SETTINGS][str(ctx.info_name)][_flag(param)]
    return found


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


def _figure(name: str, value: float) -> str:
    """For people: rates in percent, all else as it is."""
    from kdcache.pipeline.process.progress import percent

    return percent(value) if name.split("_")[-1] in ("top1", "top5", "agreement") else f"{value:.4f}"


def _say(text: str) -> None:
    if not _later_rank():
        click.echo(_safe(text), err=True)


def _later_rank() -> bool:
    """Whether this is one of torchrun's processes that leave it to rank 0 to talk."""
    from kdcache.pipeline.process.rank import this_rank

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


def _rgb(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float, float] | None:
    """0.5,0.5,0.5, or 0.5 for all three."""
    if value is None:
        return None
    try:
        numbers = [float(v) for v in value.split(",")]
        r, g, b = numbers * 3 if len(numbers) == 1 else numbers
    except ValueError:
        raise click.BadParameter(f"{value!r} is not three numbers such as 0.485,0.456,0.406") from None
    dividing = param.name == "teacher_std"
    if not all((0 < v if dividing else 0 <= v) and v <= 1 for v in (r, g, b)):
        raise click.BadParameter(f"{value!r}: pixels count from 0 to 1 here" + ", and 0 divides nothing" * dividing)
    return r, g, b


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
            from kdcache.pipeline.data.dataset import with_folders

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
_weights = click.option(
    "--weights",
    metavar="FILE|NAME|HASH",
    help="A weights file, a torchvision name, or published weights by their hash.",
)
_augment = click.option("--augment", metavar="POLICY", help="crop,flip  rrc,flip  ... [by dataset].")
_unlabelled = click.option("--unlabelled", is_flag=True, help="Build without labels (L = 0).")
_class_map = click.option("--class-map", metavar="FILE|auto", help="Dataset's class names to the teacher's classes.")
_registry = click.option(
    "--registry", metavar="URL|DIR", help="A team's caches: a folder, s3://..., gs://..., az://..., https://..."
)
_no_teacher = click.option("--no-teacher", is_flag=True, help="Publish it without the teacher's weights.")
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
@click.option("--teacher-size", type=click.IntRange(1, 4096), help="Pixels of its images [as its source says].")
@click.option("--teacher-mean", metavar="R,G,B", callback=_rgb, help="Taken from values in 0..1 [as its source says].")
@click.option("--teacher-std", metavar="R,G,B", callback=_rgb, help="Divides them then [as its source says].")
@click.option(
    "--teacher-interpolation", type=click.Choice(["bilinear", "bicubic"]), help="Resizes them [as its source says]."
)
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
@click.option("--out", cls=_Own, metavar="PATH", help="The cache's folder [under KDCACHE_HOME, by its key].")
@click.option(
    "--store",
    type=click.Choice(["zarr", "hdf5", "ffcv"]),
    default="zarr",
    show_default=True,
    help="Also pack it into one file.",
)
@_seed
@click.option(
    "--batch-size", cls=_Own, type=click.IntRange(1), help="Images that the teacher gets at once [by dataset]."
)
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
@click.option("--allow-low-accuracy", is_flag=True, help="Build although the teacher is near chance or permuted.")
@click.option("--list-unreadable", is_flag=True, help="Name every image file that cannot be read, and stop.")
@_registry
@click.option("--push", "publish", is_flag=True, help="Publish it in the registry.")
@_no_teacher
@_json
def build(
    as_json: bool,
    list_unreadable: bool,
    registry: str | None,
    publish: bool,
    no_teacher: bool,
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
    from kdcache.pipeline.build.config import BuildConfig
    from kdcache.train.teach import build_and_teach, unreadable_files

    if list_unreadable:
        found = unreadable_files(options["data"], options["unlabelled"], _say)
        _print(found, as_json, "\n".join(found) or "every file can be read")
        sys.exit(1 if found else 0)
    if teacher is None:
        raise click.UsageError("Missing option '--teacher': the network that answers, such as --teacher resnet34.")
    built, packed = build_and_teach(BuildConfig(teacher, **options), registry, publish, _say, not no_teacher, store)
    if packed is None:
        _print(vars(built), as_json, str(built.path))
    else:
        _print({**vars(built), "packed": vars(packed)}, as_json, str(packed.path))


@main.command()
@click.argument("cache")
@click.option("--to", type=click.Choice(["hdf5", "ffcv"]), required=True, help="One file, for h5py or FFCV's loader.")
@click.option("--out", cls=_Own, metavar="FILE", help="[beside the cache, with .h5 or .beton]")
@click.option("--views", cls=_Own, metavar="A:B", callback=_views, help="Views A to B - 1 [all that are complete].")
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
@click.option("--out", cls=_Own, metavar="DIR", help="The cache's folder [under KDCACHE_HOME, by its key].")
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
@click.option("--out", cls=_Own, metavar="DIR", help="The run's folder, or that of several runs [runs/...].")
@click.option("--resume", is_flag=True, help="Go on with what is in --out, with its own settings.")
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
    "--optimiser", "--optimizer", type=click.Choice(["sgd", "adamw", "muon"]), default="sgd", show_default=True,
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
@click.option(
    "--validation", type=_Number(0, 1, min_open=True, max_open=True), metavar="FRACTION",
    help="Hold out such a part of the training images, 0.1 for one, and file the weights that are best on it too. "
    "[the data's third split, where they have one]",
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
             kdcache train --resume --out runs/digits-resnet8-nkd-seed0
             torchrun --nproc-per-node 4 -m kdcache.cli train --loss nkd       (by 4 processes, each a GPU of its own)
    """
    from kdcache.train.config import TrainConfig
    from kdcache.train.run import train as run
    from kdcache.train.sweep import sweep, table

    if not options["online"] and _for_all("weights"):
        options["weights"] = None  # the setting is for commands that run the teacher
    losses, seeds, given = options.pop("loss"), options.pop("seed"), _given()
    if options["resume"]:
        losses, seeds = _asked(options["out"], losses, seeds, given)
    config = TrainConfig(losses[0], seed=seeds[0], **options)
    if len(losses) * len(seeds) > 1:
        result = sweep(config, losses, seeds, _say, given)
        _print(result, as_json, table(result))
        sys.exit(1 if any("error" in one for one in result["runs"]) else 0)
    summary = run(config, _say, given=given)
    lines = [f"{summary['run']}: {_figures(summary)}"]
    if best := summary.get("best"):
        lines.append(f"best on the validation images: epoch {best['epoch']}  {_figures(best)}")
    _print(summary, as_json, "\n".join(lines))


def _asked(
    out: str | None, losses: tuple[str, ...], seeds: tuple[int, ...], given: set[str]
) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """What is resumed in `out`: the losses and seeds that were typed, else those of a sweep there, else one run's."""
    from kdcache.train.sweep import asked_before

    before = asked_before(out)
    if before is None and not {"loss", "seed"} & given:
        ctx = click.get_current_context()
        is_set = ctx.get_parameter_source("loss") is ParameterSource.DEFAULT_MAP
        return (losses[0] if is_set else None,), seeds[:1]
    if before is None:
        return losses, seeds
    return (losses if "loss" in given else before[0]), (seeds if "seed" in given else before[1])


def _given() -> set[str]:
    """The parameters of the current command that stand on the command line."""
    ctx = click.get_current_context()
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def _figures(facts: dict[str, Any]) -> str:
    return "  ".join(f"{k} {_figure(k, v)}" for k, v in facts.items() if isinstance(v, float))


@main.command(name="eval")
@click.argument("run")
@click.option("--data", cls=_Own, metavar="NAME[:PATH]", help="Any labelled data with the run's classes [the run's].")
@_split_folders
@click.option("--cache", cls=_Own, metavar="PATH|KEY|NAME|URL", help="[the run's]")
@click.option("--student", cls=_Own, metavar="NAME", help="[the run's, unless it is a function]")
@click.option("--teacher", cls=_Own, metavar="NAME", help="That learnt beside it [the run's, unless it is a function].")
@_registry
@_device
@_workers
@_json
def evaluate(as_json: bool, run: str, **options: Any) -> None:
    """Top-1, top-5, NLL, Brier score, ECE, agreement with the teacher and KL to it.

    Of a run's last weights, or of a weights file. On other data than the run's, whose classes are found by name,
    without the teacher.

    \b
    Example: kdcache eval runs/digits-resnet8-nkd-seed0
             kdcache eval runs/birds/best.safetensors --data imagefolder:/data/other-birds
    """
    from kdcache.train.evaluate import evaluate_run

    found = evaluate_run(run, **options)
    figures = {k: _figure(k, v) if isinstance(v, float) else v for k, v in found.items()}
    _print(found, as_json, "\n".join(f"{k:13} {v}" for k, v in figures.items()))


@main.command(name="import")
@click.argument("kind", type=click.Choice(["tinyvit", "fkd"]))
@click.argument("path")
@click.option("--data", required=True, metavar="NAME[:PATH]", help="The images they are of: imagenet:PATH, ...")
@_split_folders
@click.option("--classes", type=click.IntRange(2, 2**32 - 1), help="Of the teacher [the dataset's].")
@click.option("--teacher", cls=_Own, default="unknown", show_default=True, metavar="NAME", help="What to call it.")
@click.option(
    "--image-size", cls=_Own, type=click.IntRange(8), default=224, show_default=True, help="The teacher's, in pixels."
)
@click.option(
    "--temperature", type=_Number(0, 1000, min_open=True, max_open=True), default=1.0, show_default=True,
    help="Of the stored softmax (FKD's --temp).",
)  # fmt: skip
@_unlabelled
@click.option("--allow-low-accuracy", is_flag=True, help="Import although the stored answers are near chance.")
@click.option("--full-fingerprint", is_flag=True, help="Hash every file's contents, not 4,096 of them.")
@click.option("--out", cls=_Own, metavar="PATH", help="The cache's folder [under KDCACHE_HOME, by its key].")
@_json
def import_command(as_json: bool, **options: Any) -> None:
    """Make a cache of logits that TinyViT's or FKD's code has stored. Stopped, the same command goes on.

    \b
    Example: kdcache import fkd FKD_effL2_475_soft_label --data imagenet:/data/imagenet --teacher effL2
             kdcache import tinyvit teacher_logits --data imagenet:/data/imagenet

    What they do not hold is recorded as lacking, and losses that need it refuse: see docs/stores.md.
    """
    from kdcache.pipeline.imports.imports import ImportConfig, import_logits

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
@click.option("--name", cls=_Own, help="Have this name stand for it in the registry.")
@click.option("--move", is_flag=True, help="Also where that name stands for another cache.")
@click.option("--views", cls=_Own, metavar="A:B", callback=_views, help="Views A to B - 1 [all that are complete].")
@_no_teacher
@_json
def push(as_json: bool, cache: str, registry: str | None, no_teacher: bool, **options: Any) -> None:
    """Publish a cache and its teacher's weights in the registry. What is there already stays; stopped, the same command
    goes on.

    \b
    Example: kdcache push 1f0c2a --registry s3://bucket/kd
             kdcache push 1f0c2a --registry /mnt/team/kd --name r34-imagenet-v1
    """
    from kdcache.pipeline.share import push as run

    result = run(cache, registry, say=_say, teacher=not no_teacher, **options)
    _print(vars(result), as_json, result.where)


@main.command()
@click.argument("cache", metavar="KEY|NAME|URL")
@_registry
@click.option("--views", cls=_Own, metavar="A:B", callback=_views, help="Views A to B - 1 [all that are complete].")
@click.option("--out", cls=_Own, metavar="DIR", help="The cache's folder [under KDCACHE_HOME, by its key].")
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
@click.option("--name", cls=_Own, help="Remove just this name from the registry.")
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
    from kdcache.pipeline.info import removed_line, summary, weights_place

    if (cache is None) == (name is None):
        raise click.UsageError("Give a cache, or --name NAME.")
    if name is not None:
        from kdcache.pipeline.share import require_registry

        url = require_registry(registry)
        _confirm(f"Remove the name {name} from {url}?", yes)
        remove_name(name, url)
        _print({"name": name, "registry": url}, as_json, f"removed the name {name}")
        return
    found, shared = find(str(cache), registry)
    about, line = summary(found), removed_line(found, shared)
    weights = weights_place(found, shared)
    _confirm(f"Remove {line}?", yes)
    remove(found, shared)
    if weights:
        _say(f"its teacher's weights stay ({weights}): kdcache gc lists them once no cache names them")
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
    from kdcache.pipeline.build import spool
    from kdcache.pipeline.process.progress import size

    result = run([*leavings(older, registry, local_store_size), *spool.leavings(older)], delete)
    lines = []
    for one in result["found"]:
        why = one["why"] if one["kept"] is None else f"stays: {one['kept']}"
        lines.append(f"{size(one['bytes']):>9}  {one['path']}: {why}")
    if not lines:
        lines = ["nothing to remove"]
    else:
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
@click.option("--teacher", cls=_Own, metavar="NAME", help="[by the name in the cache, unless it is a function]")
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
    named = found.identity.data.name
    if _for_all("data") and options["data"] != named and not options["data"].startswith(f"{named}:"):
        options["data"] = None  # the setting is for caches of those data
    source = source_of(found, registry=registry, **options) if depth == "replay" else None
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
@click.option("--out", cls=_Own, metavar="DIR", help="Keep everything in this empty folder.")
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
@click.option("--out", cls=_Own, metavar="FILE", help="Write the figures as JSON.")
@_json
def bench(as_json: bool, out: str | None, **options: Any) -> None:
    """Measure what a teacher costs here: in every step, in a build, and after how many students a cache has paid.

    The teacher is untrained and a part of the data stands for all of them: time depends on neither.

    \b
    Example: kdcache bench
             kdcache bench --data cifar10 --teacher resnet56 --student resnet20 --batch-size 256 --out bench.json
    """
    from kdcache.cache.files import replace_file
    from kdcache.train.bench.bench import BenchConfig, table
    from kdcache.train.bench.bench import bench as run

    if out and Path(out).is_dir():
        raise click.BadParameter(f"{out} is a folder, not a file", param_hint="--out")
    found = run(BenchConfig(**options), _say)
    if out:
        replace_file(Path(out), (json.dumps(found, indent=2) + "\n").encode())
    _print(found, as_json, table(found))


if __name__ == "__main__":
    main()
