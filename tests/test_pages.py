"""The pages for users: what can be copied from them works, and every link leads somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest

from kdcache.cache.home import caches_folder
from kdcache.cli import main
from kdcache.tests.helpers.commands import works
from kdcache.tests.helpers.pages import DOCS, PAGES, PROMPT, SHELL, Block, anchors, blocks, commands, links, prose
from kdcache.tests.helpers.places import ROOT

BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {*SHELL, "python", "toml", "yaml", "json", "text", "{toctree}", "{eval-rst}"}
# What stands on the pages, and what is small enough for a test. Everything else runs as it stands.
INSTEAD = (
    (r"\bresnet(20|34|50|56)\b", "resnet8"),
    (r"imagenet:(PATH|/data/imagenet)", "digits"),
    (r"--views \d+(?![\d:])", "--views 2"),
    (r"--views 0:\d+", "--views 0:2"),
    (r"s3://team/kd(cache)?\b", "../registry"),
    (r" --seed [1-9]", ""),
    (r"--epochs \d+\b", "--epochs 1"),
)


def named(block: Block) -> str:
    return block.where


# What is said of each block


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_no_code_hides_from_the_tests(page: Path) -> None:
    """Code is fenced, and says in which language it is."""
    text = re.sub(r"^ *[-*\d].*\n(?:(?:  +.*)?\n)*", "", prose(page), flags=re.MULTILINE)  # lists go on indented
    assert not re.findall(r"^ {4,}\S.*", text, re.MULTILINE)
    for block in blocks(page):
        assert block.language in LANGUAGES, block.where


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.note and b.page in DOCS], ids=named)
def test_a_block_that_does_not_run_here_says_why_or_where(block: Block) -> None:
    if found := re.fullmatch(r"run by (tests/\S+\.py)", block.note):
        assert block.page.name in (ROOT / found[1]).read_text(), f"{found[1]} does not read {block.page.name}"
    else:
        assert re.fullmatch(r"not run: \S.{9,}", block.note), block.note


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in SHELL], ids=named)
def test_commands_are_taken_by_what_they_are_for(block: Block) -> None:
    """By the command line, with every flag and value; scripts, targets and extras exist."""
    for line in block.lines():
        for words in commands(line):
            if words[0] in ("-h", "--help", "--version") or "--help" in words:
                continue
            assert words[0] in main.commands, line
            try:
                main.commands[words[0]].make_context(words[0], words[1:])
            except click.ClickException as e:
                pytest.fail(f"{line}: {e.format_message()}")
        for script in re.findall(r"\bpython\S* (\w+/\w+\.py)\b", line):
            text = (ROOT / script).read_text()
            shared = [(ROOT / script).parent / f"{m}.py" for m in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
            text += "".join(file.read_text() for file in shared if file.exists())
            flags = re.findall(r"(?<=\s)--[a-z-]+", line.split(script)[1])
            assert all(f'"{flag}"' in text for flag in flags), line
        for target in re.findall(r"^make (?:\w+=\S+ )*([a-z]+)", line):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        for extras in re.findall(r"'?\.\[([\w,]+)\]", line):
            assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras.split(",")), line


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=named)
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.where, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_exist_and_have_the_options_named(page: Path) -> None:
    for text in re.findall(r"`kdcache ([a-z]+\b[^`]*)`", prose(page)):
        name, *rest = text.split()
        assert name in main.commands, text
        known = {o for p in main.commands[name].params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", " " + " ".join(rest))) <= known, text


# Running


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, one_thread: None, no_fsync: None) -> Iterator[Path]:
    """The folder of a user who has a registry and a teacher for digits, and reads page after page.

    Settings in the environment keep it small: one epoch, two views. A teacher of one epoch is a bad one.
    """
    top = tmp_path_factory.mktemp("pages")
    settings = {
        "KDCACHE_HOME": str(top / "home"),
        "KDCACHE_EPOCHS": "1",
        "KDCACHE_BUILD_VIEWS": "2",
        "KDCACHE_ALLOW_LOW_ACCURACY": "true",
        "KDCACHE_TRAIN_STUDENT": "resnet8",
        "KDCACHE_TRAIN_BATCH_SIZE": "256",
        "KDCACHE_LOG": "none",
        "KDCACHE_REPORT_JUDGE": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        (top / "registry").mkdir()
        works("teach --teacher resnet8 --epochs 2 --batch-size 256")
        yield top


def made_small(text: str) -> str:
    """The same with small names for large ones, and with a key that is there for those on the pages."""
    for pattern, small in INSTEAD:
        text = re.sub(pattern, small, text)
    keys = sorted(caches_folder().iterdir(), key=lambda path: path.stat().st_ctime) if caches_folder().exists() else []
    if not keys:
        return text
    return re.sub(r"\b(966d|1f0c)[0-9a-f]*\b", keys[0].name[:12], text).replace('"CACHE', f'"{keys[0]}')


# Others name what these have made.
FIRST = ("quick-start.md", "sharing.md")
RUNNING = sorted((p for p in DOCS if any(b.runs for b in blocks(p))), key=lambda p: (p.name not in FIRST, p.name))


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_turn(page: Path, session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (session / page.stem).mkdir()
    monkeypatch.chdir(session / page.stem)
    for block in blocks(page):
        if not block.runs:
            continue
        if block.language == "python":
            exec(compile(made_small(block.text), block.where, "exec"), {})
            continue
        for line in block.lines():
            words = shlex.split(made_small(line))
            if words[0] == "export":
                monkeypatch.setenv(*words[1].split("=", 1))
            else:
                assert words[0] == "kdcache", f"{block.where}: {line}: only commands of kdcache run here"
                works(words[1:])


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=named)
def test_settings_are_known(block: Block, own_home: None) -> None:
    Path("kdcache.toml").write_text(block.text)
    works("ls")


# Links


@pytest.mark.parametrize("page", [*PAGES, ROOT / "bench" / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Those to other places have the form of an address; nothing is asked of a network."""
    for link in links(page):
        address = urlsplit(link)
        if address.scheme:
            assert address.scheme == "https" and "." in address.netloc and " " not in link, link
            continue
        target = (page.parent / address.path).resolve() if address.path else page
        assert target.exists(), f"{link}: no such file"
        if address.fragment:
            assert address.fragment in anchors(target), f"{link}: {target.name} has no such heading"


def test_pages_that_code_and_changelog_name_are_there() -> None:
    files = [ROOT / "CHANGELOG.md", *(p for top in ("cache", "pipeline", "train") for p in (ROOT / top).rglob("*.py"))]
    named = {name for file in files for name in re.findall(r"\bdocs/[\w-]+\.md", file.read_text())}
    assert len(named) > 5 and not [name for name in named if not (ROOT / name).exists()]


def test_every_page_is_in_the_table_of_contents() -> None:
    entries = [line for block in blocks(ROOT / "docs" / "index.md") if block.language == "{toctree}"
               for line in block.text.splitlines() if line and not line.startswith(":")]  # fmt: skip
    assert sorted([*entries, "index"]) == sorted(page.stem for page in (ROOT / "docs").glob("*.md"))


def test_a_wrong_flag_and_a_broken_link_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A *page*\n\n<!-- not run: only an example -->\n```console\n$ kdcache build --no-such 1 | tail\nout\n```\n"
        "See [it](#a-page) and `kdcache ls`.\n\n    kdcache ls\n"
    )
    (block,) = blocks(page)
    assert (block.note, block.lines()) == ("not run: only an example", ["kdcache build --no-such 1 | tail"])
    assert list(commands(block.lines()[0])) == [["build", "--no-such", "1"]]
    assert list(links(page)) == ["#a-page"] and anchors(page) == {"a-page"}
    assert PROMPT not in prose(page) and "    kdcache ls" in prose(page)
