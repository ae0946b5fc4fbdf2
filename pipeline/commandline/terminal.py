"""What a command prints: facts on standard output, everything else on standard error."""

import json
import sys
from typing import Any

import click

from kdcache.cache.errors import InputError
from kdcache.pipeline.process.progress import percent
from kdcache.pipeline.process.rank import this_rank


def show(facts: dict[str, Any] | list[Any], as_json: bool, text: str) -> None:
    """Print the result of a command, as JSON or as text."""
    if not _is_later_rank():
        click.echo(json.dumps(facts, indent=2, default=str) if as_json else safe(text))


def say(text: str) -> None:
    """Print a line that is not part of the result, on standard error."""
    if not _is_later_rank():
        click.echo(safe(text), err=True)


def confirm(question: str, yes: bool) -> None:
    """Ask before something is removed, unless `yes`; a no ends the process with status 1.

    Raises InputError where there is no terminal to ask on.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError(f"there is no terminal to ask on: give --yes ({question})")
    if not click.confirm(safe(question), err=True):
        say("nothing was removed")
        sys.exit(1)


def figure(name: str, value: float) -> str:
    """A figure for people: rates in percent, all others as they are."""
    return percent(value) if name.split("_")[-1] in ("top1", "top5", "agreement") else f"{value:.4f}"


def figures(facts: dict[str, Any]) -> str:
    """All figures among the facts, in one line."""
    return "  ".join(f"{k} {figure(k, v)}" for k, v in facts.items() if isinstance(v, float))


def of_run(summary: dict[str, Any]) -> str:
    """The summary of a run for people: its figures, and those of its best weights where some were chosen."""
    lines = [f"{summary['run']}: {figures(summary)}"]
    if best := summary.get("best"):
        lines.append(f"best on the validation images: epoch {best['epoch']}  {figures(best)}")
    return "\n".join(lines)


def safe(text: str) -> str:
    """Escape what a terminal would obey and not show, since others have written the names that are printed here."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _is_later_rank() -> bool:
    """Whether this is one of torchrun's processes that leave it to rank 0 to talk."""
    return this_rank().rank > 0
