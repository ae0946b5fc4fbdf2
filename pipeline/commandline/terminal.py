"""What a command prints: facts on standard output, everything else on standard error."""

import json
import sys
from typing import Any, TextIO

import click

from kdcache.cache.errors import InputError
from kdcache.cache.secrecy import hide
from kdcache.pipeline.process.progress import percent
from kdcache.pipeline.process.rank import this_rank
from kdcache.pipeline.process.screen import has_colours, is_wanted, room_for_lines, safe

_COLOURS = {"Error:": "red", "warning:": "yellow", "note:": "cyan"}  # of the first word of a line


def show(facts: dict[str, Any] | list[Any], as_json: bool, text: str) -> None:
    """Print the result of a command, as JSON or as text."""
    if not _is_later_rank():
        click.echo(json.dumps(facts, indent=2, default=str) if as_json else safe(text))


def say(text: str, out: bool = False, always: bool = False) -> None:
    """Print a line that is not part of the result, if the user asked for such lines, on standard error.

    out: on standard output instead, for a command that people run for its lines. always: also with --quiet.
    """
    if not _is_later_rank() and (always or is_wanted(text)):
        stream = sys.stdout if out else sys.stderr
        with room_for_lines():
            click.echo(coloured(safe(hide(text)), stream), err=not out, color=has_colours(stream))


def coloured(text: str, stream: TextIO) -> str:
    """The text as it is to be written to the stream: where that shows colours, with one for the kind of a line."""
    word, space, rest = text.partition(" ")
    if word not in _COLOURS or not has_colours(stream):
        return text
    return f"{click.style(word, fg=_COLOURS[word], bold=True)}{space}{rest}"


def confirm(question: str, yes: bool) -> None:
    """Ask before something is removed, unless `yes`; a no ends the process with status 1.

    Raises InputError where there is no terminal to ask on.
    """
    if yes:
        return
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():  # None where a shell has closed it
        raise InputError(f"there is no terminal to ask on: give --yes ({question})")
    if not click.confirm(safe(question), err=True):
        click.echo("nothing was removed", err=True)
        sys.exit(1)


def ask_secretly(question: str) -> str:
    """The user's answer, which is not shown while it is typed; InputError where there is no terminal to ask on."""
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        raise InputError(f"there is no terminal to ask on ({question}): take a key without a passphrase here")
    answer: str = click.prompt(safe(question), hide_input=True, default="", show_default=False, err=True)
    return answer


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


def _is_later_rank() -> bool:
    """Whether this is one of torchrun's processes that leave it to rank 0 to talk."""
    return this_rank().rank > 0
