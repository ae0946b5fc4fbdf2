"""The first five minutes: what starts quickly, how a cache is named, and that messages tell commands which run."""

import ast
import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import kdcache.cache
from kdcache.cache import open_cache
from kdcache.cache.errors import InputError, NotFoundError
from kdcache.cache.home import open_registry
from kdcache.cache.identity import canonical
from kdcache.cache.registry.registry import Named
from kdcache.cli import main
from kdcache.pipeline.process.progress import percent
from kdcache.pipeline.share import push

ROOT = Path(__file__).parent.parent
# Words after kdcache that are no commands.
PROSE = {
    "writes",
    "cuts",
    "gives",
    "reads",
    "renders",
    "draws",
    "knows",
    "did",
    "cache",
    "x",
    "spread",
    "spells",
    "cannot",
}
FORMAT_1 = Path(__file__).parent / "data" / "format-1"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """KDCACHE_HOME with a cache in a folder."""
    source = FORMAT_1 / "cache"
    shutil.copytree(source, tmp_path / "home" / "caches" / open_cache(source).key)
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KDCACHE_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def key(home: Path) -> str:
    return next((home / "caches").iterdir()).name


@pytest.fixture
def registry(home: Path, key: str, tmp_path: Path) -> str:
    """A registry that holds the cache too."""
    (tmp_path / "registry").mkdir()
    push(key, str(tmp_path / "registry"), say=lambda _: None)
    return str(tmp_path / "registry")


def invoke(line: str) -> Result:
    return CliRunner().invoke(main, shlex.split(line), catch_exceptions=False)


# Torch


def test_torch_is_imported_only_where_tensors_are(home: Path, key: str, registry: str) -> None:
    """It takes seconds. What has not been imported after all of these was not imported by one of them."""
    shutil.copy(FORMAT_1 / "dense.h5", home / "caches" / f"{open_cache(FORMAT_1 / 'dense.h5').key}.h5")
    code = f"""
import contextlib, sys
import kdcache.cache
from kdcache.cache import Cache, Identity, KdcacheError, open_cache
from kdcache.cli import main

cache = open_cache({key!r})
assert cache.views == (0, 1) and cache.complete and cache.size() and cache.identity.key == cache.key
lines = ["--help", "--version", "ls", "ls --json", "ls --registry {registry}", "gc", "gc --registry {registry}"]
lines += [*(f"{{c}} --help" for c in main.commands), "info 00000000", "build --nothing", "train", "rm {key} --yes"]
for line in lines:
    with contextlib.suppress(SystemExit):
        main(line.split()) if line != "train" else main(["train", "--lr", "1", "--lr", "2"])
    found = [name for name in ("torch", "torchvision", "sklearn") if name in sys.modules]
    assert not found, (line, found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{key[:12]}  " in done.stdout and "packed" in done.stdout and not (home / "caches" / key).exists()


def test_the_package_has_its_names() -> None:
    names: dict[str, object] = {}
    exec("from kdcache.cache import *", names)
    assert names.keys() >= {"Cache", "Identity", "KdcacheError", "Records", "encode", "open_cache"}
    with pytest.raises(AttributeError, match=r"'kdcache\.cache' has no attribute 'nothing'"):
        _ = kdcache.cache.nothing


# Keys


def test_four_digits_of_a_key_are_enough(home: Path, key: str) -> None:
    for digits in (4, 5, 6, 12, 64):
        assert open_cache(key[:digits]).key == key
    assert invoke(f"info {key[:4]}").exit_code == 0
    with pytest.raises(NotFoundError, match=f"no cache at {key[:3]}: give at least four digits"):
        open_cache(key[:3])
    shutil.copytree(home / "caches" / key, home / "caches" / (key[:4] + "0" * 60))
    with pytest.raises(InputError, match=f"begin with {key[:4]}: ") as several:
        open_cache(key[:4])
    assert key[:16] in str(several.value) and key[:4] + "0" * 12 in str(several.value)
    assert open_cache(key[:8]).key == key


def test_four_digits_in_a_registry(home: Path, key: str, registry: str) -> None:
    """A name of four or five digits comes first; where it may mean a cache here, it means neither."""
    shared = open_registry(registry)
    assert shared.find(key[:4]) == key
    shutil.copytree(Path(registry) / "caches" / key, Path(registry) / "caches" / (key[:4] + "0" * 60))
    with pytest.raises(InputError, match=f"begin with {key[:4]}: {key[:4]}0+, {key[:16]}|{key[:16]}, {key[:4]}0+"):
        shared.find(key[:4])
    (Path(registry) / "names").mkdir(exist_ok=True)
    (Path(registry) / "names" / key[:4]).write_bytes(canonical(Named(key=key, by="me", time="now")))
    assert shared.find(key[:4]) == key
    with pytest.raises(InputError, match=f"{key[:4]} is a name in .* cache {key[:16]} here begins with it"):
        open_cache(key[:4], registry)
    assert open_cache(key[:6], registry).key == open_cache(key[:4]).key == key


# Messages


@functools.cache
def texts() -> list[tuple[str, str]]:
    """What the code may say, by file: every string but docstrings, what it puts in as x."""
    found = []
    for file in [
        ROOT / "cli.py",
        *(p for folder in ("cache", "pipeline", "train") for p in (ROOT / folder).rglob("*.py")),
    ]:
        tree = ast.parse(file.read_text())
        inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.JoinedStr) for n in ast.walk(f) if n is not f}
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in inner | docs:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "x" for v in node.values]
                found.append((file.name, "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((file.name, node.value))
    return found


def test_commands_in_messages_exist_and_have_the_options_named() -> None:
    seen = 0
    for file, text in texts():
        for command, rest in re.findall(r"\bkdcache ([a-z]+)\b([^,;:()]*)", text):
            if command in PROSE:
                continue
            assert command in main.commands, f"{file}: {text}"
            options = {o for p in main.commands[command].params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
            assert set(re.findall(r"--[a-z-]+", rest.split(" and ")[0])) <= options, f"{file}: {text}"
            seen += 1
    assert seen > 20


def test_nothing_says_to_install_kdcache_from_an_index() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for name, text in [*texts(), *((p.name, p.read_text()) for p in pages)]:
        assert not re.search(r"kdcache\[|pip install '?kdcache", text), name


def test_a_missing_cache_names_a_listing_that_runs(home: Path, registry: str) -> None:
    for line in ("info 00000000", f"info 00000000 --registry {registry}", f"info nowhere --registry {registry}"):
        said = invoke(line).stderr
        command = re.search(r"see kdcache (ls.*)$", said.strip())
        assert command and ("--registry" in line) == ("--registry" in command[1]), said
        assert invoke(command[1]).exit_code == 0


def test_gc_of_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    for line in ("gc", "gc --delete"):
        assert invoke(line).stdout == "nothing to remove\n"


def test_rates_are_percent_for_people() -> None:
    assert [percent(rate) for rate in (0, 0.97746, 1.0)] == ["0.00%", "97.75%", "100.00%"]
