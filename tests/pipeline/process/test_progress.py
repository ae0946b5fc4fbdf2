"""Bars and lines, as a user sees them on a real terminal, in a file, and among other lines."""

import io
import itertools
import re
import signal
import warnings

import pyte
import pytest

from kdcache.pipeline.process import screen
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.process.screen import Detail, Verbosity, WorkerStream, has_colours, is_wanted, room_for_lines
from kdcache.tests.helpers.terminals import script

# Forty steps, and on until the file `go` is there.
BAR = """
import sys, time, warnings
from pathlib import Path
from kdcache.pipeline.commandline.terminal import say
from kdcache.pipeline.process.progress import Progress

go = Path(__file__).with_name("go")
with Progress({title!r}, 40, "steps", facts=lambda: "loss 0.5000, lr 0.1") as progress:
    i = 0
    while i < 40 or not go.exists():
        time.sleep(0.02)
        progress.advance(int(i < 40))
        {then}
        i += 1
print("the result")
"""


class File(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def clock(monkeypatch):
    """A second passes at each look at the clock."""
    seconds = itertools.count()
    monkeypatch.setattr("kdcache.pipeline.process.progress.time.monotonic", lambda: float(next(seconds)))


@pytest.fixture
def asked():
    yield screen.set_verbosity
    screen.set_verbosity(Verbosity.USUAL)


def bar(tmp_path, then="", title="build", columns=100, **env):
    return script(BAR.format(title=title, then=then), tmp_path, columns, **env)


def test_a_bar_tells_how_far_and_leaves_nothing(tmp_path):
    terminal = bar(tmp_path)
    # The cursor comes back in the write after the bar's first.
    seen = terminal.until(lambda text: "of 40 steps" in text and not terminal.cursor_is_hidden)
    assert re.match(r"build [━╸╺ ]+ \d+ of 40 steps, \d+/s, \d\.\d s left, loss 0\.5000, lr 0\.1$", seen), seen
    assert terminal.finish(tmp_path / "go") == "the result"
    assert b"\x1b[38" in terminal.written or b"\x1b[3" in terminal.written


@pytest.mark.parametrize("columns", [50, 30, 8])
def test_a_narrow_terminal_gets_one_line(tmp_path, columns):
    terminal = bar(tmp_path, columns=columns)
    seen = terminal.until(lambda text: text.startswith("build"))
    assert "\n" not in seen and len(seen) < columns and "━" not in seen and seen.endswith("…")
    assert terminal.finish(tmp_path / "go").replace("\n", "") == "the result"


def test_lines_stand_above_the_bar(tmp_path):
    """Said lines, a warning of this process, and a line longer than the terminal."""
    terminal = bar(tmp_path, "if i == 30: say('x' * 150); warnings.warn('careful'); say('note: hello')")
    # The warning may show its line of the script, in which the note stands too.
    seen = terminal.until(lambda text: "\nnote: hello" in text and "of 40" in text.splitlines()[-1])
    lines = seen.splitlines()
    assert lines[0] + lines[1] == "x" * 150
    warning = " ".join(lines[2:-2])  # a long path may fill the line
    assert "UserWarning:" in warning and "careful" in warning and lines[-2] == "note: hello"
    assert "build" not in "".join(lines[:-1])
    assert terminal.finish(tmp_path / "go").endswith("note: hello\nthe result")


WORKERS = """
import sys, time, warnings
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from kdcache.pipeline.process.progress import Progress
from kdcache.pipeline.views.workers import _begin_worker

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, i):
        time.sleep(0.02)
        if i == 39:
            warnings.warn("of a worker")
        return i

go = Path(__file__).with_name("go")
with Progress("build", 40, "images") as progress:
    for _ in DataLoader(Data(), batch_size=None, num_workers=1, worker_init_fn=_begin_worker):
        progress.advance(1)
    while not go.exists():
        time.sleep(0.02)
        progress.advance(0)
"""


def test_a_warning_of_a_worker_does_not_break_the_bar(tmp_path):
    terminal = script(WORKERS, tmp_path, columns=300)
    terminal.until(lambda text: "UserWarning: of a worker" in text and "of 40 images" in text.splitlines()[-1])
    assert sum("of 40 images" in line for line in terminal.screen.splitlines()) == 1
    assert "build" not in terminal.finish(tmp_path / "go")


def test_codes_in_a_title_are_shown_and_not_obeyed(tmp_path):
    terminal = bar(tmp_path, title="a\x1b[2Jb [red]c[/red]")
    seen = terminal.until(lambda text: "of 40" in text)
    assert seen.startswith("a\\x1b[2Jb [red]c[/red] ")
    terminal.finish(tmp_path / "go")
    assert b"\x1b[2J" not in terminal.written


def test_ctrl_c_leaves_a_clean_terminal(tmp_path):
    terminal = bar(tmp_path, "")
    terminal.until(lambda text: "of 40" in text)
    terminal.type("\x03")
    assert "of 40" not in terminal.finish() and not terminal.cursor_is_hidden


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_ctrl_c_while_a_frame_is_drawn(write, clock, monkeypatch):
    """It comes once the terminal has the frame, and before rich knows of it."""
    out, shown = File(True), pyte.Screen(100, 5)
    writes = itertools.count(1)

    def flush():
        if next(writes) == write:
            signal.raise_signal(signal.SIGINT)

    def work():
        with Progress("build", 40, "steps", out) as progress:
            for _ in range(40):
                progress.advance(1)

    monkeypatch.setattr(out, "flush", flush)
    with pytest.raises(KeyboardInterrupt):
        work()
    pyte.Stream(shown).feed(out.getvalue().replace("\n", "\r\n"))
    assert "build" in out.getvalue() and not "".join(shown.display).strip(), shown.display


@pytest.mark.parametrize(
    "env", [{"TERM": "dumb"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}]
)
def test_no_bar_where_none_can_be_drawn_or_another_rank_draws_it(tmp_path, env):
    terminal = bar(tmp_path, **env)
    assert terminal.finish(tmp_path / "go") == "the result" and b"\x1b" not in terminal.written


def test_no_color_and_the_bar_is_the_same(tmp_path):
    terminal = bar(tmp_path, NO_COLOR="1")
    terminal.until(lambda text: "━" in text)
    terminal.finish(tmp_path / "go")
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]", terminal.written)


def test_a_bar_within_a_bar_is_not_shown(clock):
    outer, inner = File(True), File(True)
    with Progress("outer", 9, "steps", outer) as one, Progress("inner", 9, "steps", inner) as two:
        for _ in range(9):
            one.advance(1)
            two.advance(1)
    assert "outer" in outer.getvalue() and not inner.getvalue()


def test_plain_lines_become_rarer(clock):
    """A line each 15 seconds, and later each twentieth of the time so far."""
    out = File(False)
    with Progress("build", 10_000, "images", out, done=5) as progress:
        for _ in range(9_995):
            progress.advance(1, "(view 1)")
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"build: 20 of 10,000 images, 1\.0/s, \d+ h \d+ min left, \(view 1\)", lines[0])
    assert 60 < len(lines) < 100 and "\x1b" not in out.getvalue()


def test_bytes_are_told_in_units(clock):
    out = File(False)
    with Progress("pack", 30_000_000, "bytes", out) as progress:
        for _ in range(20):
            progress.advance(1_000_000)
    assert out.getvalue() == "pack: 15.0 MB of 30.0 MB, 1.0 MB/s, 15 s left\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_no_progress(clock, asked, terminal):
    asked(Verbosity.QUIET)
    out = File(terminal)
    with Progress("build", 100, "images", out) as progress:
        for _ in range(100):
            progress.advance(1)
    assert not out.getvalue()


def test_which_lines_are_wanted(asked):
    lines = ("built", "note: this", "warning: that", "   warning: that", Detail("each epoch"))
    wanted = {}
    for level in Verbosity:
        asked(level)
        wanted[level.name] = [is_wanted(line) for line in lines]
    assert wanted == {
        "QUIET": [False, False, True, True, False],
        "USUAL": [True, True, True, True, False],
        "VERBOSE": [True] * 5,
    }


CASES = itertools.product([True, False], ["xterm-256color", "dumb", "unknown", ""], [None, "", "1"], [None, "1"])


def test_colours_are_shown_where_rich_shows_them(monkeypatch):
    from rich.console import Console

    for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for case in CASES:
        terminal, *values = case
        for name, value in zip(("TERM", "NO_COLOR", "FORCE_COLOR"), values, strict=True):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        console = Console(file=File(terminal))
        assert has_colours(File(terminal)) == (console.color_system is not None and not console.no_color), case


def test_lines_within_room_are_not_drawn_over(clock):
    out = File(True)
    with Progress("build", 9, "steps", out) as progress:
        for _ in range(5):
            progress.advance(1)
        with room_for_lines(), room_for_lines():
            before = out.getvalue()
            progress.advance(1)
            assert "6 of 9" not in out.getvalue()[len(before) :]
        assert "build" in out.getvalue()[len(before) :]


def test_a_worker_clears_the_line_before_it_writes():
    out = io.StringIO()
    stream = WorkerStream(out)
    for text in ("", "one ", "line\n", "another\n"):
        assert stream.write(text) == len(text)
    stream.flush()
    assert out.getvalue() == "\r\x1b[Kone line\n\r\x1b[Kanother\n"
    with warnings.catch_warnings(record=True):
        assert stream.getvalue() == out.getvalue()
