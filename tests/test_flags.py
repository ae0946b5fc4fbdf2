"""The frozen set of flags: scripts and settings of users depend on every one."""

from typing import get_args, get_type_hints

import click
import pytest

from kdcache.cli import main
from kdcache.pipeline.commandline.parameters import options_of
from kdcache.pipeline.imports import config as import_config
from kdcache.pipeline.imports.imports import KINDS
from kdcache.pipeline.stores import STORES, FileStore
from kdcache.tests.helpers.places import ROOT
from kdcache.train.teach import build_and_teach

FILE = ROOT / "tests" / "data" / "flags.txt"


def flags() -> list[str]:
    """One line for each flag of each command: what is typed, and which values it takes, with its default."""
    lines = []
    for name, command in main.commands.items():
        for p in options_of(command):
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


# The command line names its choices itself, since it must not import the tables, which import torch.


PACKED = [name for name, store in STORES.items() if store.pack]


def choices(command: str, parameter: str) -> list[str]:
    """What a command admits for one of its parameters."""
    (found,) = [p for p in main.commands[command].params if p.name == parameter]
    assert isinstance(found.type, click.Choice)
    return list(found.type.choices)


@pytest.mark.parametrize(
    ("command", "parameter", "table", "place"),
    [
        ("build", "store", list(STORES), "STORES of pipeline/stores.py"),
        ("pack", "to", PACKED, "STORES of pipeline/stores.py, those with a `pack`,"),
        ("import", "kind", list(KINDS), "KINDS of pipeline/imports/imports.py"),
    ],
)
def test_the_command_line_offers_every_row_of_a_table(
    command: str, parameter: str, table: list[str], place: str
) -> None:
    offered = choices(command, parameter)
    where = f"the Literal of `{parameter}` in cli.py and the flag in {FILE.relative_to(ROOT)}"
    if command == "import":
        where = "Kind in pipeline/imports/config.py"
    assert offered == table, (
        f"`kdcache {command}` offers {offered} for {parameter}, and {place} holds {table}: bring {where} into line "
        "with the table, in its order"
    )


def test_the_types_of_the_tables_name_every_row() -> None:
    store = get_type_hints(build_and_teach)["store"]
    for name, type_, table in (
        ("the `store` of build_and_teach in train/teach.py", store, list(STORES)),
        ("FileStore in pipeline/stores.py", FileStore, PACKED),
        ("Kind in pipeline/imports/config.py", import_config.Kind, list(KINDS)),
    ):
        assert list(get_args(type_)) == table, f"{name} names {get_args(type_)}, its table {table}: bring it into line"
