"""Settings from the environment (KDCACHE_*) and from kdcache.toml, below the flags of the command line."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcache.cache.errors import InputError

FILE = "kdcache.toml"
_OWN = {"KDCACHE_HOME"}


def load_settings(
    commands: Mapping[str, set[str]], environment: Mapping[str, str], file: Path
) -> dict[str, dict[str, Any]]:
    """Defaults by command and option name, the environment over the file.

    In the file an option stands at the top, for every command that has it, or in a table [command]; in the
    environment as KDCACHE_OPTION or KDCACHE_COMMAND_OPTION. InputError for a key that no command has.
    """
    found: dict[str, dict[str, Any]] = {command: {} for command in commands}
    if file.exists():
        try:
            content = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise InputError(f"{file} is not valid TOML: {e}") from e
        tables = {k: v for k, v in content.items() if isinstance(v, dict)}
        for key, value in content.items():
            if key not in tables:
                _everywhere(found, commands, key.replace("-", "_"), value, f"{file}: {key}")
        for command, table in tables.items():
            if command not in commands:
                raise InputError(f"{file}: no command [{command}]{_nearest(command, set(commands))}")
            for key, value in table.items():
                name = key.replace("-", "_")
                if name not in commands[command]:
                    raise InputError(f"{file}: [{command}] has no option {key!r}{_nearest(name, commands[command])}")
                found[command][name] = value
    for variable, text in environment.items():
        if variable.startswith("KDCACHE_") and variable not in _OWN:
            _from_variable(found, commands, variable, text)
    return found


def _from_variable(
    found: dict[str, dict[str, Any]], commands: Mapping[str, set[str]], variable: str, text: str
) -> None:
    name = variable.removeprefix("KDCACHE_").lower()
    command, _, option = name.partition("_")
    if option in commands.get(command, ()):
        found[command][option] = text
    else:
        _everywhere(found, commands, name, text, variable)


def _everywhere(
    found: dict[str, dict[str, Any]], commands: Mapping[str, set[str]], name: str, value: Any, where: str
) -> None:
    having = [command for command, options in commands.items() if name in options]
    if not having:
        raise InputError(f"{where}: no command has this option{_nearest(name, set().union(*commands.values()))}")
    for command in having:
        found[command].setdefault(name, value)


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 2)
    return f": did you mean {' or '.join(near)}?" if near else ""
