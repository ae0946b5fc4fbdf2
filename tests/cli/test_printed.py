"""What commands print: help, and facts as text and as JSON."""

import json
import re
from pathlib import Path

import click
import pytest

from kdcache.cli import main
from kdcache.tests.helpers.commands import Place, invoke, works

COMMANDS = sorted(main.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_explains_every_option(command: str) -> None:
    text = works([command, "--help"]).stdout
    assert f"Example: kdcache {command}" in text and text == works([command, "-h"]).stdout
    assert "--json" in text
    assert all(p.help for p in main.commands[command].params if isinstance(p, click.Option))


def test_the_list_of_commands_and_the_version() -> None:
    text = works("--help").stdout
    assert all(re.search(rf"^  {command} ", text, re.M) for command in COMMANDS)
    assert re.fullmatch(r"kdcache, version \S+\n", works("--version").stdout)
    assert invoke("").exit_code == 2


def test_facts_as_json(place: Place, data: str, quick: str) -> None:
    """Nothing but JSON on standard output."""
    key = place.cache.name
    listed = json.loads(works("ls --json").stdout)
    assert [c["key"] for c in listed] == [key]
    told = json.loads(works(f"info {key[:6]} --json").stdout)
    assert told.items() >= listed[0].items() and told["under_way"] == []
    fidelity = told["fidelity"]
    assert 0.25 < fidelity["evaluation_top1"] <= 1 and set(fidelity["view_top1"]) == {"0", "1"}
    assert fidelity["mass"] == {}
    assert set(json.loads(works(f"info {place.top2} --json").stdout)["fidelity"]["mass"]["2"]) == {"head", "tail"}
    assert listed[0]["views"] == 2 and listed[0]["samples"] == 128
    checked = json.loads(works(f"verify {key} {data} --replay 8 --json").stdout)
    assert checked["passed"] is True and checked["replayed"] == 24 and checked["problems"] == []
    trained = json.loads(works(f"{quick} --epochs 1 --json").stdout)
    assert trained["epochs"] == 1 and Path(trained["run"]).is_dir()
    built = json.loads(works(f"build --teacher resnet8 {data} --views 2 --json").stdout)
    assert built["key"] == key and built["teacher_images"] == 0
    assert json.loads(works(f"build {data} --list-unreadable --json").stdout) == []


def test_facts_as_text(place: Place, data: str) -> None:
    key = place.cache.name
    assert re.fullmatch(
        rf"{key[:12]}  resnet8 on imagefolder \(128\), crop,flip, 2 views, dense, float16, \d+\.\d kB\n",
        works("ls").stdout,
    )
    text = works(f"info {place.top2}").stdout
    for line in (
        f"path +{place.top2}",
        "views +1 complete",
        r"teacher +top-1 \d+\.\d\d% on the evaluation split$",
        r"mass +\d+\.\d\d% stored, \d+\.\d\d% in the tail, at temperature 1",
        "record.k = 2",
    ):
        assert re.search(rf"^{line}", text, re.M), line
    assert "3 shards of 2 complete views read" in works(f"verify {key} --depth contents").stdout
    text = works(f"verify {key} {data} --replay 20").stdout
    assert "60 records replayed" in text and text.endswith("passed\n")


def test_ls_of_an_empty_home_and_of_one_with_other_things(place: Place) -> None:
    home = place.work / "home"
    assert "no caches" in works("ls", KDCACHE_HOME=str(home)).stdout
    assert json.loads(works("ls --json", KDCACHE_HOME=str(home)).stdout) == []
    assert not home.exists()
    (home / "caches/junk").mkdir(parents=True)
    result = works("ls", KDCACHE_HOME=str(home))
    assert "no caches" in result.stdout and f"not a cache: {home}/caches/junk" in result.stderr
