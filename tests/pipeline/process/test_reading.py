"""A worker that was killed is told by torch's error, whatever is noticed first."""

import os
import signal
import threading

import pytest

from kdcache.pipeline.process.reading import deaths_first

KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "


@pytest.fixture
def dying():
    """Sends the signal, a moment later, at which torch's handler of a child's death would raise its error."""

    def raises(number, frame):
        raise RuntimeError(KILLED)

    before = signal.signal(signal.SIGUSR1, raises)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    yield timer
    timer.cancel()
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("broken", [ConnectionResetError, EOFError])
def test_a_pipe_that_broke_first_gives_way_to_the_death(dying, broken):
    dying.start()
    with pytest.raises(RuntimeError, match=r"worker \(pid 7\) is killed"), deaths_first():
        raise broken


def test_other_errors_stay(monkeypatch):
    monkeypatch.setattr("kdcache.pipeline.process.reading._NOTICED_SECONDS", 0.01)
    for error in (ConnectionResetError, KeyError):
        with pytest.raises(error), deaths_first():
            raise error
