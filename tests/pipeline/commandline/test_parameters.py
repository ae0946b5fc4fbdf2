"""Options that are made from annotations: each kind of type, a config's fields, and what a command is called with."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner, Result

from kdcache.pipeline.commandline.options import Argument, Option, parse_size, parse_views
from kdcache.pipeline.commandline.parameters import from_signature


@dataclass(frozen=True)
class Config:
    place: Annotated[str, Argument()]
    seed: Annotated[int, Option("Seed.", several=True, ge=0)] = 0
    rate: Annotated[float | None, Option("Rate.", gt=0, lt=1)] = None
    kind: Annotated[Literal["a", "b"], Option("Kind.", flags=("--kind", "--sort"))] = "a"
    size: Annotated[int | None, Option("Size.", parse=parse_size)] = None
    fast: Annotated[bool | None, Option("Fast.")] = None
    data: Annotated[
        str | None,
        Option("Data.", parts={"top": Option("Top.")}, join=lambda data, top: f"{data}?{top}"),
    ] = None
    inner: int = 7


CALLS: list[tuple[Config, tuple[int, ...], bool]] = []


@click.command()
@from_signature
def command(
    config: Config, seed: tuple[int, ...], as_json: Annotated[bool, Option("", flags=("--json",))] = False
) -> None:
    CALLS.append((config, seed, as_json))


def call(*args: str) -> Result:
    CALLS.clear()
    return CliRunner().invoke(command, args)


def test_defaults_are_the_fields() -> None:
    assert call("x").exit_code == 0 and CALLS == [(Config("x"), (0,), False)]


def test_every_kind_of_value() -> None:
    line = "x --seed 3,4 --seed 5 --rate 0.5 --sort b --size 2kB --no-fast --data d --top t --json"
    assert call(*line.split()).exit_code == 0
    assert CALLS == [(Config("x", 3, 0.5, "b", 2000, False, "d?t"), (3, 4, 5), True)]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "PLACE"),
        ("x --seed -1", "--seed"),
        ("x --rate 1", "0<x<1"),
        ("x --rate nan", "nan"),
        ("x --kind c", "'c'"),
        ("x --size much", "much is no size such as 500MB"),
        ("x --top t", "--top need --data"),
        ("x --inner 3", "--inner"),
    ],
)
def test_a_wrong_value_is_named(line: str, part: str) -> None:
    result = call(*line.split())
    assert result.exit_code == 2 and part in result.output and not CALLS


def test_a_type_that_no_text_gives_is_refused_when_the_command_is_made() -> None:
    def odd(value: Annotated[dict[str, Any], Option("")]) -> None: ...

    with pytest.raises(TypeError, match="give its Option a `parse`"):
        from_signature(odd)


def test_ranges_of_views() -> None:
    assert parse_views("2:5") == range(2, 5)
    for text in ("2", "5:2", "a:b", "2:2", "0:100001"):
        with pytest.raises(ValueError, match="is not a range A:B"):
            parse_views(text)
