"""Settings from the environment (KDCACHE_*) and from kdcache.toml, below the flags of the command line."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.cache.errors import InputError

FILE = "kdcache.toml"
_PREFIX = "KDCACHE_"
_OWN = {"KDCACHE_HOME"}

Options = Mapping[str, set[str]]  # of each command, as on the command line: batch-size


class Setting(NamedTuple):
    """What would stand on the command line, and where it was found."""

    value: str
    origin: str


def load_settings(commands: Options, environment: Mapping[str, str], file: Path) -> dict[str, dict[str, Setting]]:
    """Settings by command and option: the environment over the file, what names the command over what does not.

    In the file an option stands at the top, for every command that has it, or in a table [command]; in the
    environment as KDCACHE_OPTION or KDCACHE_COMMAND_OPTION (empty: not set). InputError for a key that no command
    has.
    """
    found: dict[str, dict[str, Setting]] = {command: {} for command in commands}
    _from_file(found, commands, file)
    _from_environment(found, commands, environment)
    return found


def _from_file(found: dict[str, dict[str, Setting]], commands: Options, file: Path) -> None:
    if not file.exists():
        return
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{file} is not valid TOML: {e}") from e
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    for key, value in content.items():
        if key not in tables:
            where = f"{file}: {key}"
            _everywhere(found, commands, _spelled(key), Setting(_text(value, where), where))
    for command, table in tables.items():
        if command not in commands:
            raise InputError(f"{file}: no command [{command}]{_nearest(command, commands)}")
        for key, value in table.items():
            where, option = f"{file}: [{command}] {key}", _spelled(key)
            if option not in commands[command]:
                raise InputError(f"{where}: {command} has no such option{_nearest(option, commands[command])}")
            found[command][option] = Setting(_text(value, where), where)


def _from_environment(found: dict[str, dict[str, Setting]], commands: Options, environment: Mapping[str, str]) -> None:
    for_one: list[tuple[str, str, Setting]] = []
    for variable, text in environment.items():
        if not variable.startswith(_PREFIX) or variable in _OWN or not text:
            continue
        setting, name = Setting(_home(text), variable), _spelled(variable.removeprefix(_PREFIX).lower())
        command, _, option = name.partition("-")
        if option in commands.get(command, ()):
            for_one.append((command, option, setting))
        elif command in commands and option:
            raise InputError(f"{variable}: {command} has no such option{_nearest(option, commands[command])}")
        else:
            _everywhere(found, commands, name, setting)
    for command, option, setting in for_one:
        found[command][option] = setting


def _everywhere(found: dict[str, dict[str, Setting]], commands: Options, option: str, setting: Setting) -> None:
    having = [command for command, options in commands.items() if option in options]
    if not having:
        near = _nearest(option, set().union(*commands.values()))
        raise InputError(f"{setting.origin}: no command has such an option{near}")
    for command in having:
        found[command][option] = setting


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
    # The shell would do it for a flag.
    return os.path.expanduser(text) if text.startswith("~/") else text  # noqa: PTH111


def _spelled(key: str) -> str:
    return key.replace("_", "-")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 2)
    return f": did you mean {' or '.join(near)}?" if near else ""
