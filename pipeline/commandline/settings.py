"""Settings from the environment (KDCACHE_*) and from kdcache.toml, below the flags of the command line."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.cache.errors import InputError
from kdcache.cache.files import read_plain

FILE = "kdcache.toml"
_PREFIX = "KDCACHE_"
_OWN = {"KDCACHE_HOME"}
_MOST_BYTES = 24 << 10  # tomllib takes seconds for a longer name with dots


class KnownOption(NamedTuple):
    """What the settings need to know of an option of a command.

    name: as on the command line, batch-size; an option with two spellings has the first. own: it means something else
    than the options of that name in other commands, so that no setting for all commands is meant for it. takes:
    whether a value for all commands is one for this command, where others take more kinds of values than it does.
    """

    name: str
    own: bool = False
    takes: Callable[[str], bool] = lambda value: True


Options = Mapping[str, Mapping[str, KnownOption]]  # the options of each command, by every spelling


class Setting(NamedTuple):
    """What would stand on the command line, and where it was found; for_all: it names no command."""

    value: str
    origin: str
    for_all: bool = False


def load_settings(commands: Options, environment: Mapping[str, str], file: Path) -> dict[str, dict[str, Setting]]:
    """Load settings by command and option. The environment goes before the file, a named command before all commands.

    In the file an option stands at the top, for every command in which it has this meaning, or in a table [command];
    in the environment as KDCACHE_OPTION or KDCACHE_COMMAND_OPTION (empty: not set). InputError for a key that no
    command has, for one that means something else in each command and names none, and for one that stands twice.
    """
    found: dict[str, dict[str, Setting]] = {command: {} for command in commands}
    _from_file(found, commands, file)
    _from_environment(found, commands, environment)
    return found


def _from_file(found: dict[str, dict[str, Setting]], commands: Options, file: Path) -> None:
    if not os.path.lexists(file):
        return
    try:
        content = tomllib.loads(read_plain(file, _MOST_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as e:  # also where it is no text, or nested too deeply
        raise InputError(f"{file} is not valid TOML: {e}") from e
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    top: dict[str, str] = {}
    for key, value in content.items():
        if key not in tables:
            where = f"{file}: {key}"
            _everywhere(found, commands, _spelled(key), Setting(_text(value, where), where, for_all=True), top)
    for command, table in tables.items():
        if command not in commands:
            raise InputError(f"{file}: no command [{command}]{_nearest(command, commands)}")
        inside: dict[str, str] = {}
        for key, value in table.items():
            where, option = f"{file}: [{command}] {key}", _spelled(key)
            if option not in commands[command]:
                raise InputError(f"{where}: {command} has no such option{_nearest(option, commands[command])}")
            _once(inside, commands[command][option].name, where)
            found[command][commands[command][option].name] = Setting(_text(value, where), where)


def _from_environment(found: dict[str, dict[str, Setting]], commands: Options, environment: Mapping[str, str]) -> None:
    for_one: list[tuple[str, str, Setting]] = []
    top: dict[str, str] = {}
    for variable, text in environment.items():
        if not variable.startswith(_PREFIX) or variable in _OWN or not text:
            continue
        name = _spelled(variable.removeprefix(_PREFIX).lower())
        command, _, option = name.partition("-")
        if option in commands.get(command, ()):
            for_one.append((command, commands[command][option].name, Setting(_home(text), variable)))
        elif command in commands and option and not any(name in options for options in commands.values()):
            raise InputError(f"{variable}: {command} has no such option{_nearest(option, commands[command])}")
        else:
            _everywhere(found, commands, name, Setting(_home(text), variable, for_all=True), top)
    inside: dict[str, str] = {}
    for command, option, setting in for_one:
        _once(inside, f"{command} {option}", setting.origin)
        found[command][option] = setting


def _everywhere(
    found: dict[str, dict[str, Setting]], commands: Options, name: str, setting: Setting, before: dict[str, str]
) -> None:
    """Give every command the setting for which it is meant. before: the settings for all so far, with their origins."""
    having = {command: options[name] for command, options in commands.items() if name in options}
    if not having:
        near = _nearest(name, set().union(*commands.values()))
        raise InputError(f"{setting.origin}: no command has such an option{near}")
    shared = {command: option for command, option in having.items() if not option.own}
    if not shared:
        first = next(iter(having))
        variable = f"{_PREFIX}{first}_{name}".upper().replace("-", "_")
        raise InputError(
            f"{setting.origin}: {name} means something else in each of {', '.join(having)}: name the command, as in "
            f"a table [{first}] of {FILE} or in {variable}"
        )
    _once(before, next(iter(shared.values())).name, setting.origin)
    # A value that none of them takes goes to all: their own checks say what is wrong with it.
    for command, option in ({c: o for c, o in shared.items() if o.takes(setting.value)} or shared).items():
        found[command][option.name] = setting


def _once(before: dict[str, str], option: str, origin: str) -> None:
    if option in before:
        raise InputError(f"{origin}: the same stands in {before[option]}; remove one of the two")
    before[option] = origin


def _text(value: Any, where: str) -> str:
    """A value of the file as one would type it, so that the command line checks it like any other."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _home(value)
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return ",".join(_text(item, where) for item in value)
    raise InputError(f"{where}: must be a string, a number, true or false, or a list of these")


def _home(text: str) -> str:
    # For a flag, the shell expands it.
    return os.path.expanduser(text) if text.startswith("~/") else text  # noqa: PTH111


def _spelled(key: str) -> str:
    return key.replace("_", "-")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 2)
    return f": did you mean {' or '.join(near)}?" if near else ""
