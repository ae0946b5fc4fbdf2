"""docs/cluster.md: what can be copied from it is accepted by what it is meant for."""

import kubernetes_validate
import pytest
import yaml

from kdcache.cli import main
from kdcache.tests.helpers.pages import blocks, commands
from kdcache.tests.helpers.places import ROOT

PAGE = ROOT / "docs" / "cluster.md"
RESOURCES = [yaml.safe_load(block.text) for block in blocks(PAGE) if block.language == "yaml"]


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda found: found["kind"])
@pytest.mark.parametrize("version", ["1.30", "1.35"])
def test_resources_pass_the_schemas_of_kubernetes(resource: dict, version: str) -> None:
    kubernetes_validate.validate(resource, version, strict=True)


def test_a_resource_with_a_field_that_does_not_exist_does_not_pass() -> None:
    (job,) = [found for found in RESOURCES if found["kind"] == "Job"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**job, "spec": {**job["spec"], "completionsMode": "Indexed"}}, "1.35", strict=True
        )


def test_the_pods_of_the_job_run_a_build_that_the_command_line_takes() -> None:
    (job,) = [found for found in RESOURCES if found["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (rule,) = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]}
    program, name = container["command"]
    assert program == "kdcache"
    asked = main.commands[name].make_context(name, container["args"]).params
    assert (asked["teacher"], asked["views"], asked["publish"]) == ("resnet34", 16, True)


def test_every_command_of_the_page_is_one_that_the_command_line_takes() -> None:
    lines = [
        words
        for block in blocks(PAGE)
        if block.language == "bash"
        for text in block.lines()
        for words in commands(text)
    ]
    assert len(lines) == 5
    for line in lines:
        name, *words = line
        assert main.commands[name].make_context(name, words).params["views"] == 16, line
