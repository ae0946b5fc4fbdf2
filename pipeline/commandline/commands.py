"""What all commands have in common.

Every mistake is one clear line. Settings come from flags, then from the environment, then from kdcache.toml. An option
that is given twice is refused.
"""

from __future__ import annotations

import _thread
import errno
import os
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kdcache.cache.errors import KdcacheError, in_one_line, machine_error
from kdcache.cache.secrecy import hide
from kdcache.pipeline.commandline.options import Option
from kdcache.pipeline.commandline.parameters import CommandOption, flag_of, options_of
from kdcache.pipeline.commandline.settings import FILE, KnownOption, Setting, load_settings
from kdcache.pipeline.commandline.terminal import coloured, say
from kdcache.pipeline.process.rank import share_cores
from kdcache.pipeline.process.screen import Detail, Verbosity, has_colours, safe, set_verbosity

INTERRUPTED = 130
# Where click's context keeps the settings that were found, and which of --quiet and --verbose was given.
_SETTINGS, _VERBOSITY = "kdcache.settings", "kdcache.verbosity"


class Command(click.Command):
    """A command with --quiet and --verbose that refuses an option given twice; click would take the last value."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.params += _verbosity_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell completes a line that is not whole yet
            return super().parse_args(ctx, args)
        parser = self.make_parser(ctx)
        once = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and not (p.multiple or p.count)]
        for p in once:  # the same options again, but every value that is typed is kept
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
                raise click.UsageError(f"--{flag_of(p)} is given {often}: {given}.", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        _tell_settings(ctx)
        _tell_code(ctx)
        return super().invoke(ctx)


def _verbosity_options() -> list[click.Parameter]:
    """--quiet and --verbose, which every command has."""
    levels = (
        ("quiet", Verbosity.QUIET, Option("Say nothing but results, warnings and errors.")),
        ("verbose", Verbosity.VERBOSE, Option("Say everything: each epoch, each setting and where it is from.")),
    )
    return [
        CommandOption(
            (f"--{name}", f"-{name[0]}"), spec=spec, help=spec.help, is_flag=True, expose_value=False,
            callback=partial(_be, level),
        )
        for name, level, spec in levels
    ]  # fmt: skip


def _be(level: Verbosity, ctx: click.Context, param: click.Parameter, given: bool) -> None:
    """Set how much is said. click calls this for what is typed first, which goes before settings."""
    typed = ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
    if ctx.resilient_parsing:
        return
    if given and typed and _VERBOSITY in ctx.meta:
        raise click.UsageError("--quiet and --verbose contradict each other: give one.", ctx)
    if given:
        ctx.meta.setdefault(_VERBOSITY, level)
    set_verbosity(ctx.meta.get(_VERBOSITY, Verbosity.USUAL))


def _tell_settings(ctx: click.Context) -> None:
    """Tell with --verbose which options are not typed, and where each is from. Addresses may hold secrets."""
    for param in options_of(ctx.command):
        if is_set(str(param.name), ctx):
            setting = _setting(ctx, param)
            value = "an address" if "://" in setting.value else setting.value
            say(Detail(f"setting: --{flag_of(param)} is {value}, by {setting.origin}"))


def _tell_code(ctx: click.Context) -> None:
    """Tell which code a kdcache.toml in the working directory makes this command run, since nobody has typed it."""
    for param in options_of(ctx.command):
        if (is_code := param.spec.is_code) is None or not is_set(str(param.name), ctx):
            continue
        setting = _setting(ctx, param)
        if setting.origin.startswith(FILE) and is_code(setting.value):
            say(f"note: {setting.origin} = {setting.value} is a function of your own, which is imported and called")


def typed_names() -> set[str]:
    """The parameters of the running command that stand on the command line."""
    ctx = click.get_current_context()
    return {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def is_set(name: str, ctx: click.Context | None = None) -> bool:
    """Whether a command, by default the one that is running, has the parameter from a setting."""
    return (ctx or click.get_current_context()).get_parameter_source(name) is ParameterSource.DEFAULT_MAP


def is_set_for_all(name: str) -> bool:
    """Whether the running command has the parameter from a setting that names no command."""
    ctx = click.get_current_context()
    param = next(p for p in ctx.command.params if p.name == name)
    return is_set(name) and _setting(ctx, param).for_all


def _setting(ctx: click.Context, param: click.Parameter) -> Setting:
    """The setting that a parameter of the running command has its value from."""
    found: Setting = ctx.meta[_SETTINGS][str(ctx.info_name)][flag_of(param)]
    return found


def command(name: str | None = None) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function, whose name it has where none is given."""
    return click.command(name, cls=Command)


# The group of all commands


class Failure(click.ClickException):
    """An error of kdcache's as click prints it: one line."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(safe(hide(" ".join(message.splitlines()))))

    def show(self, file: Any = None) -> None:
        click.echo(coloured(f"Error: {self.message}", sys.stderr), err=True, color=has_colours(sys.stderr))


class Main(click.Group):
    """The group of all commands. first_to_say: whether no other rank of torchrun's has ended with the same message."""

    def __init__(self, *args: Any, first_to_say: Callable[[str], bool] = lambda _: True, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.first_to_say = first_to_say

    def invoke(self, ctx: click.Context) -> Any:
        before: Callable[[Any], object] = sys.unraisablehook
        sys.unraisablehook = lambda unraisable: _unraisable(unraisable, before)
        try:
            return self._invoke(ctx)
        except click.ClickException as e:
            raise self._once(_one_line(e)) from e
        except KeyboardInterrupt:
            # What is half made, such as a loader with its worker processes, complains as the process ends.
            before = _silent
            say("stopped; nothing is lost: the same command (train: with --resume) goes on", always=True)
            sys.exit(INTERRUPTED)
        finally:
            sys.unraisablehook = before
            set_verbosity(Verbosity.USUAL)

    def _invoke(self, ctx: click.Context) -> Any:
        found: dict[str, dict[str, Setting]] = {}
        try:
            share_cores()
            found = load_settings(known_options(self.commands), os.environ, Path(FILE))
            ctx.meta[_SETTINGS] = found
            ctx.default_map = {
                name: {
                    str(p.name): [found[name][flag_of(p)].value] if p.multiple else found[name][flag_of(p)].value
                    for p in options_of(command)
                    if flag_of(p) in found[name]
                }
                for name, command in self.commands.items()
            }
            return super().invoke(ctx)
        except click.BadParameter as e:
            if e.ctx and e.param and is_set(str(e.param.name), e.ctx):
                origin = found[str(e.ctx.info_name)][flag_of(e.param)].origin
                raise click.BadParameter(f"{e.message} (from {origin})", e.ctx, e.param, e.param_hint) from e
            raise
        except KdcacheError as e:
            raise Failure(str(e)) from e
        except OSError as e:
            if e.errno == errno.EPIPE:
                raise  # the reader of our output has gone, as in `kdcache ls | head`: click ends quietly
            raise Failure(_system_error(e)) from e
        except (MemoryError, RuntimeError) as e:
            if (reason := machine_error(e)) is None:
                raise
            raise Failure(reason) from e

    def _once(self, e: click.ClickException) -> click.ClickException | SystemExit:
        """Return the error for one of torchrun's ranks that fail alike, and a silent end for the others."""
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        return e if alone or self.first_to_say(e.format_message()) else SystemExit(e.exit_code)


def _one_line(e: click.ClickException) -> click.ClickException:
    """The error in one line, without secrets: click lists choices below each other, and repeats whole values."""
    text = e.format_message()
    if (line := in_one_line(hide(text))) == text:
        return e
    return click.UsageError(" ".join(line.split()), getattr(e, "ctx", None))


def _unraisable(unraisable: Any, otherwise: Callable[[Any], object]) -> None:
    """Repeat a Ctrl-C a moment later that came where Python drops exceptions, as when worker processes start."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        otherwise(unraisable)


def _silent(unraisable: Any) -> None:
    pass


def _system_error(e: OSError) -> str:
    what = f"{e.filename}: {e.strerror}" if e.filename else str(e)
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}: free some space and run the same command again, it goes on where it was"
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}: give a place that can be written with --out or KDCACHE_HOME"
    if e.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{what}: a folder is needed there; give another --out or KDCACHE_HOME"
    return what


# Options as the settings see them


def known_options(commands: Mapping[str, click.Command]) -> dict[str, dict[str, KnownOption]]:
    """The options of each command by every spelling, for the settings."""
    lists = {flag_of(p): p for command in commands.values() for p in options_of(command) if p.multiple}
    known: dict[str, dict[str, KnownOption]] = {}
    for name, command in commands.items():
        known[name] = {}
        for p in options_of(command):
            option = KnownOption(flag_of(p), p.spec.own, partial(_takes, p, lists.get(flag_of(p))))
            known[name].update({spelling.lstrip("-"): option for spelling in p.opts if spelling.startswith("--")})
    return known


def _takes(param: click.Option, as_list: click.Option | None, value: str) -> bool:
    """Whether a setting for all commands is for this one too.

    It is not if it is a choice that others offer and this one does not (amp = "fp16"), nor if it is several values
    where another command takes a list (`as_list`) and this one does not (seed = [0, 1]).
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
