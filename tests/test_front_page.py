"""What a stranger sees first: the README, whose figures are measured and whose code runs; the files of a release."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import kdcache
from kdcache.tests.helpers.commands import paint, works
from kdcache.tests.helpers.places import BENCH, ROOT, bench_script

README = (ROOT / "README.md").read_text()
PICTURES = ROOT / "docs" / "front"
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line[0] != "#"
]


def block(part: str) -> str:
    """The one block of Python in the README that holds this text."""
    (found,) = (one for one in PYTHON if part in one)
    return found


# The page


def test_the_readme_is_a_front_page() -> None:
    assert len(README.splitlines()) < 200
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in ("demo", "test"):
        assert re.search(rf"^    make {target}\b", README, re.MULTILINE) and target in targets


def anchors(page: str) -> set[str]:
    """The names by which a page's headings can be linked to, as the sites of repositories make them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(name: str) -> None:
    page = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", page)
    for link in (one or other for one, other in links):
        if not link.startswith(("http://", "https://")):
            file, _, anchor = link.partition("#")
            target = ROOT / file if file else ROOT / name
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link
    assert links or name != "README.md"


# Its figures


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script that makes them. Scripts import each other by their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield bench_script("front_page")
    for name in [name for name in sys.modules if name.split("_")[0] == "study"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    jobs: dict[str, Any] = json.loads((ROOT / "bench" / "results" / "study_again.json").read_text())["jobs"]
    return jobs


def test_the_figures_of_the_readme_are_those_of_the_study(script: ModuleType, results: dict[str, Any]) -> None:
    assert script.filled(README, script.parts(results)) == README, "run python bench/front_page.py"
    # One of them by hand.
    name = re.compile(r"resnet20-ce-.*-views20-epochs20-seed[0-4]")
    ce = [100 * job["test"]["top1"] for run, job in results.items() if name.fullmatch(run)]
    assert len(ce) == 5 and f"| {sum(ce) / 5:.2f} ±" in README


def test_the_plot_shows_the_figures_of_the_study(script: ModuleType, results: dict[str, Any]) -> None:
    for shade in ("light", "dark"):
        tree = ET.parse(PICTURES / f"results-{shade}.svg")
        (about,) = tree.iter("{http://purl.org/dc/elements/1.1/}description")
        assert json.loads(about.text or "") == script.plotted(results), "run python bench/front_page.py"


def test_the_dark_picture_is_the_light_one_in_other_colours(script: ModuleType) -> None:
    light = (PICTURES / "stages-light.svg").read_text()
    assert script.darkened(light) == (PICTURES / "stages-dark.svg").read_text(), "run python bench/front_page.py"
    with pytest.raises(ValueError, match="no dark ones: #ff0000"):
        script.darkened(light.replace("#f6f8fa", "#ff0000", 1))


# Its code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the README's photos and modules, in which commands take few epochs and views."""
    top = tmp_path_factory.mktemp("front")
    paint(top / "photos", each=20, side=8)
    (top / "birds.py").write_text(block("birds.py"))
    (top / "mine.py").write_text(block("mine.py"))
    project = (
        "from kdcache.train import build_network\n\ndef Network(classes): return build_network('resnet8', classes, 8)"
    )
    (top / "my_project.py").write_text(project)
    settings = {"HOME": top / "home", "BUILD_VIEWS": 1, "EPOCHS": 3, "BATCH_SIZE": 32, "TRAIN_STUDENT": "resnet8"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        patch.syspath_prepend(str(top))
        for name, value in settings.items():
            patch.setenv(f"KDCACHE_{name}", str(value))
        yield top
    for name in ("birds", "mine", "my_project"):
        sys.modules.pop(name, None)


def test_the_lines_for_ones_own_data_and_teacher_run(place: Path) -> None:
    """With a smaller teacher, and 80 small images."""
    commands = [line.split("#")[0].replace("resnet34", "resnet8").split() for line in LINES]
    names = ["teach", "build", "train", "build", "build"]
    assert [words[:2] for words in commands] == [["kdcache", name] for name in names]
    teach, build, train, with_weights, with_function = (words[1:] for words in commands)
    for line in (teach, build, train):
        works(line)
    (filed,) = (place / "home").rglob("resnet8*.safetensors")
    torch.save(load_file(filed), place / "mine.pth")
    works(with_weights)
    works(with_function)
    assert "birds:photos" in block("birds.py")
    works(["birds:photos" if word == "imagefolder:photos" else word for word in with_weights])


# The files of a release


def test_the_version_is_the_changelogs_and_the_citation_names_none() -> None:
    heads = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == ("Unreleased", "") and (heads[1][0], bool(heads[1][1])) == (kdcache.__version__, True)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"} and "version" not in citation


def test_issue_forms_are_what_a_repositorys_site_takes() -> None:
    for name in ("bug", "feature"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        assert form.keys() == {"name", "description", "labels", "body"}
        fields = [one for one in form["body"] if one["type"] != "markdown"]
        assert len({one["id"] for one in fields}) == len(fields) >= 4
        assert all(one["type"] in ("textarea", "checkboxes") and one["attributes"]["label"] for one in fields)
