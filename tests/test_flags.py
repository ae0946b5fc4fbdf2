"""The frozen set of flags: scripts and settings of users depend on every one."""

import click

from kdcache.cli import main
from kdcache.pipeline.commandline.parameters import options_of
from kdcache.tests.helpers.places import ROOT

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
