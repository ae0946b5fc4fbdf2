"""The files that a run's lines are appended to: killed, full, resumed, and read while they are written."""

import json
import signal
import subprocess
import sys

import pytest

from kdcache.tests.contracts.loggers import lines
from kdcache.tests.helpers.reports import write_run
from kdcache.train.loop.logs.appended import AppendedFile
from kdcache.train.loop.logs.csvfile import Csv
from kdcache.train.loop.logs.jsonlines import JsonLines
from kdcache.train.report.facts.runs import read_run

KILLED = """
import json, os, sys
from pathlib import Path
from kdcache.train.loop.logs.csvfile import Csv
from kdcache.train.loop.logs.jsonlines import JsonLines
loggers = [kind(Path(sys.argv[1]), []) for kind in (Csv, JsonLines)]
for line in json.loads(sys.argv[2]):
    for logger in loggers:
        logger.line(line)
os.kill(os.getpid(), 9)
"""
FULL = """
import resource, sys
from pathlib import Path
from kdcache.train.loop.logs.appended import AppendedFile
file = AppendedFile(Path(sys.argv[1]), b"")
file.append(b"first\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))
try:
    file.append(b"second\\n")
except OSError as e:
    print(e.filename)
"""


def run(code, *given):
    return subprocess.run([sys.executable, "-c", code, *map(str, given)], capture_output=True, text=True, timeout=60)


def written(folder, done):
    """What files hold in which these lines were written at once."""
    folder.mkdir()
    for kind in (Csv, JsonLines):
        kind(folder, done).close()
    return contents(folder)


def contents(folder):
    return [(folder / name).read_bytes() for name in ("metrics.csv", "metrics.jsonl")]


def test_what_a_killed_process_has_logged_is_there_and_a_resumed_run_goes_on(tmp_path):
    """The second epoch has fewer figures than the first, the fourth one more."""
    logged = [*lines(1, 2, 3), {**lines(4)[0], "temperature": 1.5}]
    killed = run(KILLED, tmp_path, json.dumps(logged))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert contents(tmp_path) == written(tmp_path / "four", logged)
    for kind in (Csv, JsonLines):
        resumed = kind(tmp_path, logged[:3])  # the state of the fourth epoch was not kept
        assert contents(tmp_path)[kind is JsonLines] == written(tmp_path / kind.__name__, logged[:3])[kind is JsonLines]
        for line in logged[3:]:
            resumed.line(line)
        resumed.close()
    assert contents(tmp_path) == contents(tmp_path / "four")


def test_lines_that_a_loss_of_power_took_are_written_again(tmp_path):
    whole = written(tmp_path / "whole", lines(1, 2, 3))
    for name, content in zip(("metrics.csv", "metrics.jsonl"), whole, strict=True):
        (tmp_path / name).write_bytes(content[:-20])
    for kind in (Csv, JsonLines):
        kind(tmp_path, lines(1, 2, 3)).close()
    assert contents(tmp_path) == whole


def test_a_full_disk_names_the_file_and_what_it_took_is_cut_back(tmp_path):
    file = tmp_path / "log"
    assert run(FULL, file).stdout == f"{file}\n"
    assert file.read_bytes() == b"first\nsec"
    again = AppendedFile(file, b"first\n")
    again.append(b"second\n")
    again.close()
    again.close()
    assert file.read_bytes() == b"first\nsecond\n"


def test_a_run_is_read_while_its_last_line_is_written(tmp_path):
    folder = write_run(tmp_path / "run")
    whole = read_run(folder).lines
    (folder / "summary.json").unlink(missing_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "lo')
    assert read_run(folder).lines == whole and whole


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_a_log_that_belongs_to_no_kept_epoch_goes(tmp_path, kind):
    """A run that was killed in its first epoch's end begins anew."""
    first = kind(tmp_path, [])
    first.line(lines(1)[0])
    first.close()
    kind(tmp_path, [])
    assert not list(tmp_path.iterdir())
