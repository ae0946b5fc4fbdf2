"""A file of text that grows by a line at a time, cheaply enough for epochs of a fraction of a second."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

from kdcache.cache.files import holds, naming, replace_file, sync_folder


class AppendedFile:
    """Holds what a run that goes on has logged so far, and takes lines at its end.

    A line is with the operating system as soon as it is appended, so that a kill of the process loses nothing. The disk
    is waited for only when the file is closed: what a loss of power takes away until then is written again when the run
    is resumed, since the state of a run, which is synced after every epoch, has all of its lines.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        """Make the file hold just `content`; where that is empty, it appears with its first line."""
        self._path = path
        self._stream: FileIO | None = None
        if not content:
            path.unlink(missing_ok=True)
        elif not holds(path, content):
            replace_file(path, content)

    def append(self, line: bytes) -> None:
        """Add a whole line, which ends in a newline."""
        with naming(self._path):
            if self._stream is None:
                self._stream = self._path.open("ab", buffering=0)
            left = memoryview(line)
            while left:  # a disk that is nearly full takes a part, and refuses the rest
                left = left[self._stream.write(left) :]

    def rewrite(self, content: bytes) -> None:
        """Put other content in the file's place, in one step and synced."""
        self.close()
        replace_file(self._path, content)

    def close(self) -> None:
        """Wait until all of it is on disk; a second time, do nothing."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        with naming(self._path), stream:
            os.fsync(stream.fileno())
        sync_folder(self._path.parent)
