"""Processes that need no seconds for imports: each is forked from one that has imported torch and kdcache already.

They are processes as `subprocess.Popen` starts them: each with a pid, streams, signals and, where asked for, a session
of its own; each runs its code as `python -m`, `python -c` or `python FILE` would. What a command imports, and when, can
be tested in a fresh interpreter alone.
"""

from __future__ import annotations

import atexit
import builtins
import fcntl
import functools
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import termios
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_MOST = 1 << 17  # bytes of a request: the code, the arguments and the environment of a process


class Popen(subprocess.Popen[Any]):
    """As subprocess.Popen of a line that begins with sys.executable; `terminal`: its input is its controlling one.

    Of Python's own options there may be -W ACTION or -W ACTION::CATEGORY before the -m, -c or file.
    """

    def __init__(self, line: list[Any], *, terminal: bool = False, **options: Any) -> None:
        assert line[0] == sys.executable and not options.keys() - _OPTIONS, options
        self._about = {"session": options.get("start_new_session", False), "terminal": terminal}
        super().__init__([str(word) for word in line], **options)

    def _execute_child(self, args: list[str], *more: Any) -> None:  # type: ignore[override]
        cwd, env = more[4:6]
        read, written, told = more[9], more[12], more[14]
        about = {"line": args[1:], "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ), **self._about}
        streams = [own if own != -1 else usual for own, usual in ((read, 0), (written, 1), (told, 2))]
        self.pid = _ask(about, streams)
        self._child_created = True
        self._close_pipe_fds(*more[9:15])  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:  # type: ignore[override]
        while not (found := _ask({"ended": self.pid}))[0] and not wait_flags & os.WNOHANG:
            time.sleep(0.01)
        return found[0], found[1]

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:  # type: ignore[override]
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


_one_at_a_time = threading.Lock()
_OPTIONS = {"stdin", "stdout", "stderr", "cwd", "env", "text", "start_new_session"}


def run(line: list[Any], *, timeout: float = 250, check: bool = False, **options: Any) -> Any:
    """As subprocess.run with capture_output and text."""
    with Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(line, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


@functools.cache
def _parent() -> socket.socket:
    """The connection to the process that all are forked from; it ends when the connection does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _ask(about: dict[str, Any], streams: list[int] | None = None) -> Any:
    with _one_at_a_time:
        socket.send_fds(_parent(), [json.dumps(about).encode()], streams or [])
        return json.loads(_parent().recv(_MOST))


# ---- in the process that all are forked from ----


def _serve(ours: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork processes until nobody is there to ask for one; in each of them, return what it is to be."""
    while True:
        data, streams, _, _ = socket.recv_fds(ours, _MOST, 3)
        if not data:
            os._exit(0)
        about = json.loads(data)
        if "ended" in about:
            answer: Any = os.waitpid(about["ended"], os.WNOHANG)
        elif not (answer := os.fork()):
            ours.close()
            return about, streams
        for stream in streams:
            os.close(stream)
        ours.send(json.dumps(answer).encode())


def _become(about: dict[str, Any], streams: list[int], path: list[str]) -> None:
    """Be the process that was asked for, up to its first line."""
    if about["session"]:
        os.setsid()
    for own, given in enumerate(streams):
        os.dup2(given, own)
        os.close(given)
    if about["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(about["cwd"])
    os.environ.clear()
    os.environ.update(about["env"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", 1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path]


def _work(line: list[str]) -> None:
    """Do what Python does with these arguments."""
    while line[0] == "-W":
        action, _, category = line[1].partition("::")
        warnings.simplefilter(action, getattr(builtins, category or "Warning"))  # type: ignore[arg-type]
        line = line[2:]
    kind, name, *rest = line if line[0] in ("-m", "-c") else ("", *line)
    sys.argv = [kind or name, *rest]
    sys.path.insert(0, str(Path(name).resolve().parent) if not kind else str(Path.cwd()) if kind == "-m" else "")
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if kind == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(name, "<string>", "exec"), main.__dict__)
    else:
        runpy.run_path(name, run_name="__main__")


def _end(work: Callable[[], None]) -> NoReturn:
    """Do this and end as Python does, but without taking apart all that was imported, which takes a second."""
    code: object = 0
    try:
        work()
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import_all() -> None:
    import torch._dynamo  # which torch imports when a first optimiser is made

    assert torch._dynamo
    import kdcache.train.run
    import kdcache.train.sweep
    import kdcache.train.teach  # noqa: F401

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread would be missing in what is forked"


if __name__ == "__main__":
    _import_all()
    known = set(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    path = [place for place in sys.path[1:] if place not in known]
    gc.freeze()  # so that no process copies all of it to look for garbage in it
    about, streams = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(about, streams, path)
    _end(lambda: _work(about["line"]))
