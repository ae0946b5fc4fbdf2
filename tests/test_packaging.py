"""The wheel holds the package and nothing else, and works without the repository around it."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kdcache
from kdcache.tests.helpers.places import ROOT

AT_ROOT = {"__init__.py", "cli.py", "py.typed"}
FOLDERS = {"cache", "pipeline", "train"}


@pytest.fixture(scope="module")
def sources() -> list[Path]:
    """What a commit of the working tree would hold, relative to the root: new files too, ignored ones not."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to tell sources from what lies around")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = {Path(name) for name in listing.split("\0") if name}
    return sorted(name for name in names if (ROOT / name).is_file())


@pytest.fixture(scope="module")
def wheel(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, tests and all, so that no build folder is left in the repository."""
    copy, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in sources:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, copy]
    build = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert build.returncode == 0, build.stdout
    (built,) = dist.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, sources: list[Path]) -> None:
    expected = {
        f"kdcache/{name.as_posix()}"
        for name in sources
        if name.as_posix() in AT_ROOT
        or (name.parts[0] in FOLDERS and (name.suffix == ".py" or name.parent.name == "templates"))
    }
    dist_info = f"kdcache-{kdcache.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if not name.startswith(dist_info)}
    assert {"kdcache/__init__.py", "kdcache/cli.py"} <= expected
    assert shipped == expected


def test_wheel_metadata(wheel: Path) -> None:
    dist_info = f"kdcache-{kdcache.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{dist_info}/METADATA"))
        scripts = archive.read(f"{dist_info}/entry_points.txt").decode()
        licence = archive.read(f"{dist_info}/licenses/LICENSE")
    assert metadata["Version"] == kdcache.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert "kdcache = kdcache.cli:main" in scripts


def test_command_line_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    where = "import kdcache.cli; print(kdcache.cli.__file__)"
    for command, answer in (
        (["-c", where], str(tmp_path / "site" / "kdcache" / "cli.py")),
        (["-m", "kdcache.cli", "--help"], "Usage: "),
    ):
        run = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(answer)


def test_command_line_runs_as_installed_here(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "kdcache.cli", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Usage: ")


def test_no_committed_file_names_a_registry(sources: list[Path]) -> None:
    # in two pieces each, so that this file passes its own test
    hosts = ["pypi" + ".org", "python" + "hosted", "registry." + "npmjs"]
    found = []
    for name in sources:
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # not a text
            continue
        found += [f"{name}: {host}" for host in hosts if host in text]
    assert not found
