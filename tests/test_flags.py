"""The frozen set of flags: scripts and settings of users depend on every one."""

import click
import pytest

from kdcache.cli import main
from kdcache.pipeline.commandline.parameters import options_of
from kdcache.pipeline.imports.imports import KINDS
from kdcache.pipeline.stores import STORES
from kdcache.tests.helpers.places import ROOT
from kdcache.train.export.formats import FORMATS

FILE = ROOT / "tests" / "data" / "flags.txt"


EVERYWHERE = ("quiet", "verbose")  # which every command has by itself


def flags() -> list[str]:
    """One line for each flag of each command: what is typed, and which values it takes, with its default."""
    lines = []
    for name, command in main.commands.items():
        for p in [p for p in options_of(command) if p.name not in EVERYWHERE]:
            spellings = " ".join([*p.opts, *p.secondary_opts])
            kinds = "|".join(p.type.choices) if isinstance(p.type, click.Choice) else p.metavar or p.type.name.upper()
            takes = "" if p.is_flag else f" {kinds}"
            is_shown = not p.is_flag and p.show_default
            default = f" = {' '.join(p.default) if p.multiple else p.default}" if is_shown else ""
            lines.append(f"{name} {spellings}{takes}{default}{' several' if p.multiple else ''}")
    return sorted(lines)


def test_the_flags_are_those_that_are_frozen() -> None:
    frozen = FILE.read_text().splitlines()
    new, gone = set(flags()) - set(frozen), set(frozen) - set(flags())
    assert flags() == frozen, (
        f"new: {sorted(new)}; gone: {sorted(gone)}. A new flag is put into {FILE.relative_to(ROOT)} by hand, on "
        "purpose, in alphabetical order. A flag that goes or changes breaks what users have written: keep it, or say "
        "so in CHANGELOG.md."
    )


# The tables import torch, and the command line must not, so it has names of its own for their rows.


@pytest.mark.parametrize(
    ("command", "parameter", "table", "names"),
    [
        ("build", "store", list(STORES), "StoreName in cache/records/choices.py"),
        ("pack", "to", [name for name, store in STORES.items() if store.pack], "FileStore in cache/records/choices.py"),
        ("export", "to", list(FORMATS), "FormatName in train/export/config.py"),
        ("import", "kind", list(KINDS), "Kind in pipeline/imports/config.py"),
    ],
)
def test_the_command_line_offers_every_row_of_a_table(
    command: str, parameter: str, table: list[str], names: str
) -> None:
    (found,) = [p for p in main.commands[command].params if p.name == parameter]
    assert isinstance(found.type, click.Choice)
    offered = list(found.type.choices)
    assert offered == table, (
        f"`kdcache {command}` offers {offered} for {parameter}, and the table holds {table}: give {names} the same "
        f"names in the same order, and {FILE.relative_to(ROOT)} where a flag shows them"
    )


def test_every_command_says_more_or_less() -> None:
    for name, command in main.commands.items():
        found = {str(p.name): p.opts for p in options_of(command) if p.name in EVERYWHERE}
        assert found == {"quiet": ["--quiet", "-q"], "verbose": ["--verbose", "-v"]}, name
