"""--quiet and --verbose, and what a training shows on a terminal and in a file."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from kdcache.pipeline.process.screen import is_wanted
from kdcache.tests.helpers.commands import Place, invoke, works
from kdcache.tests.helpers.terminals import kdcache
from kdcache.train.demo import demo

EIGHT = [True, True, False, True, False, True, False, True]  # which of eight epochs are told of


def epochs(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"^epoch (\d+)/", text, re.MULTILINE)]


def test_lines_of_epochs(place: Place, quick: str) -> None:
    """The first, four besides, and with --verbose every one; with --quiet none, and no other line."""
    line = f"{quick} --epochs 9 --evaluate-every 9"
    usual = works(f"{line} --out usual").stderr
    assert epochs(usual) == [1, 3, 6, 9] and f": {Path('usual')}" in usual
    verbose = works(f"{line} --out verbose -v", KDCACHE_SEED="0")
    assert epochs(verbose.stderr) == list(range(1, 10))
    assert "setting: --seed is 0, by KDCACHE_SEED\n" in verbose.stderr
    quiet = works(f"{line} --out quiet --quiet")
    assert not quiet.stderr and quiet.stdout.startswith("quiet: ")
    lines = [len((Path(name) / "metrics.jsonl").read_text().splitlines()) for name in ("usual", "verbose", "quiet")]
    assert lines == [9, 9, 9]


def test_as_a_setting_and_in_contradiction(place: Place) -> None:
    both = invoke("ls -q --verbose")
    assert both.exit_code == 2 and "--quiet and --verbose contradict each other" in both.stderr
    Path("kdcache.toml").write_text("quiet = true\n")
    try:
        assert not works(f"build --teacher resnet8 --data imagefolder:{place.pics} --views 2").stderr
        told = works(f"build --teacher resnet8 --data imagefolder:{place.pics} --views 2 -v").stderr
        assert "setting: --quiet is true, by kdcache.toml: quiet\n" in told and "nothing to compute" in told
    finally:
        Path("kdcache.toml").unlink()


def test_addresses_among_settings_are_not_shown(place: Place) -> None:
    told = works("ls -v", KDCACHE_LS_REGISTRY=str(place.work / "none")).stderr
    assert f"setting: --registry is {place.work}/none, by KDCACHE_LS_REGISTRY\n" in told
    told = invoke("ls -v", KDCACHE_REGISTRY="https://me:secret@localhost:1/kd").stderr
    assert "setting: --registry is an address, by KDCACHE_REGISTRY\n" in told and "secret@" not in told.splitlines()[0]


def test_an_error_and_ctrl_c_are_told_in_any_case(place: Place, quick: str) -> None:
    assert invoke("info 00000000 -q").stderr.startswith("Error: ")
    endless = quick.replace("--epochs 2", "--epochs 400 --evaluate-every 400")
    terminal = kdcache(f"{endless} --out stopped -q", columns=300)
    while not Path("stopped/state.pt").exists():
        assert terminal.process.poll() is None
        time.sleep(0.02)
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.finish().startswith("stopped; nothing is lost") and terminal.process.returncode == 130


def test_a_training_on_a_terminal(place: Place, quick: str) -> None:
    """A bar with loss and learning rate for the whole run; lines above it; after Ctrl-C a clean terminal."""
    endless = quick.replace("--epochs 2", "--epochs 400 --evaluate-every 400")
    terminal = kdcache(f"{endless} --out bar", columns=160)
    bar = r"^epoch \d+/400 [━╸╺ ]+ [\d,]+ of [\d,]+ steps, .* left, loss \d\.\d{4}, lr \S+$"
    seen = terminal.until(lambda text: re.search(bar, text, re.MULTILINE) is not None and "epoch 1/400  loss" in text)
    assert re.search(bar, seen.splitlines()[-1])
    terminal.type("\x03")
    text = terminal.finish()
    assert "steps" not in text and text.splitlines()[-1].startswith("stopped; nothing is lost"), text
    assert terminal.process.returncode == 130 and not terminal.cursor_is_hidden


def test_errors_and_notes_have_colours_on_a_terminal(place: Place) -> None:
    terminal = kdcache("info 00000000")
    assert terminal.finish().startswith("Error: no cache")
    assert b"\x1b[31m\x1b[1mError:\x1b[0m no cache" in terminal.written
    plain = kdcache("info 00000000", NO_COLOR="1")
    assert plain.finish() == terminal.screen and b"\x1b" not in plain.written


def test_the_demo_in_a_dozen_or_two_of_lines(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five lines for each of its networks; the last screen also with --quiet."""
    for name, value in {"TEACHER": "resnet8", "LOSSES": ("ce",), "VIEWS": 1}.items():
        monkeypatch.setattr(f"kdcache.train.demo.{name}", value)
    for name in ("TEACHER_EPOCHS", "STUDENT_EPOCHS"):
        monkeypatch.setattr(f"kdcache.train.demo.{name}", 8)
    said: list[str] = []
    shown: list[str] = []
    demo(None, said.append, shown.append)
    assert [is_wanted(line) for line in said if line.startswith("   epoch ")] == 2 * EIGHT
    assert len(shown) == 8 and shown[3].startswith("student, ce")
