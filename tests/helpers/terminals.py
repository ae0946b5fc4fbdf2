"""Commands and code on a real pseudo-terminal, and what a user sees there in the end."""

import fcntl
import os
import pty
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte

from kdcache.tests.helpers import warm


class Terminal:
    """A terminal of some columns on which a process runs. `written` is all that came, byte by byte."""

    def __init__(self, line: list[str], columns: int = 100, rows: int = 50, **env: str) -> None:
        self.written = b""
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self._screen)
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
        self.process = warm.Popen(
            line, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, terminal=True,
            env={**kept, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **env},
        )  # fmt: skip
        os.close(theirs)

    def until(self, seen: Callable[[str], bool], seconds: float = 60) -> str:
        """Read on until the screen is as wanted, and return it."""
        end = time.monotonic() + seconds
        while not seen(self.screen):
            if time.monotonic() > end or not self._read():
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"not seen in time, but this:\n{self.screen}")
        return self.screen

    def finish(self, go: Path | None = None) -> str:
        """Read to the end, and return the screen. go: a file to make, which the process waits for."""
        if go is not None:
            go.touch()
        while self._read():
            pass
        self.process.wait(60)
        return self.screen

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    @property
    def screen(self) -> str:
        """What stands on the screen, with what was scrolled out above it."""
        top = ["".join(row[i].data for i in range(self._screen.columns)) for row in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*top, *self._screen.display]).rstrip()

    @property
    def cursor_is_hidden(self) -> bool:
        return bool(self._screen.cursor.hidden)

    def _read(self) -> bool:
        try:
            found = os.read(self._ours, 65536)
        except OSError:  # all that had it open have ended
            return False
        self.written += found
        self._stream.feed(found)
        return bool(found)


def kdcache(line: str, columns: int = 100, **env: str) -> Terminal:
    return Terminal([sys.executable, "-m", "kdcache.cli", *line.split()], columns, **env)


def script(code: str, folder: Path, columns: int = 100, **env: str) -> Terminal:
    (folder / "script.py").write_text(code)
    return Terminal([sys.executable, str(folder / "script.py")], columns, **env)
