"""Nothing is missing in the list of operations, nor in the page about them and its pictures."""

import dataclasses
import json
import re

import pytest
from click.testing import CliRunner
from PIL import Image

from kdcache.cli import main
from kdcache.pipeline.views.policy import NAMED, OPERATIONS, check_policy
from kdcache.tests.helpers.places import ROOT

PAGE = (ROOT / "docs" / "views.md").read_text()
PICTURES = ROOT / "docs" / "views"


def kdcache(line):
    result = CliRunner().invoke(main, line.split(), catch_exceptions=False)
    assert result.exit_code == 0 and not result.stderr
    return result.stdout


def test_every_operation_and_every_named_policy_has_a_line():
    lines = kdcache("views --list").splitlines()
    for name, kind in OPERATIONS.items():
        (line,) = [line for line in lines if re.match(rf"  {name}\b(?!-)", line)]
        call = line.split()[0]
        assert check_policy(call) in (call, name) and parsed(call) == kind()
        assert all(f"{of.name} {of.metadata['least']:g} to " in line for of in dataclasses.fields(kind))
        assert kind.__doc__.strip().splitlines()[0] in line
    for name, text in NAMED.items():
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert line.split() == [name, check_policy(text)]


def parsed(call):
    """The operation in a policy of it alone."""
    from kdcache.pipeline.views.policy import parse_policy

    policy = parse_policy(call)
    found = [op for op in (policy.geometry, policy.flip, *policy.operations, *policy.mixes) if hasattr(op, "name")]
    assert len(found) == 1
    return found[0]


def test_the_list_as_json():
    found = json.loads(kdcache("views --list --json"))
    assert [of["name"] for of in found["operations"]] == list(OPERATIONS)
    (color,) = [of for of in found["operations"] if of["name"] == "color"]
    assert color["stage"] == "colour"
    assert color["arguments"][3] == {"name": "hue", "default": 0.0, "range": [0, 0.5]}
    assert found["named"] == {name: check_policy(text) for name, text in NAMED.items()}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_page_has_a_section_with_a_picture_for_every_operation(name):
    assert re.search(rf"^### {name}(\(|$)", PAGE, re.M) and f"](views/{name}.png)" in PAGE


def test_the_page_has_every_named_policy_and_all_pictures_which_are_small():
    for name, text in NAMED.items():
        assert f"| `{name}` | `{check_policy(text)}` |" in PAGE
    linked = set(re.findall(r"\]\(views/(\S+\.png)\)", PAGE))
    there = sorted(PICTURES.iterdir())
    assert {path.name for path in there} == linked
    assert sum(path.stat().st_size for path in there) < 1_500_000
    for path in there:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width <= 1200
