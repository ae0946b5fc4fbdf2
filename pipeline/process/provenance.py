"""Who built a cache, with what and how: kept in every commit, for people; nothing depends on it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import kdcache
from kdcache.cache.secrecy import HIDDEN, hide, names_a_secret

_LONGEST = 2000  # characters of a command line
_FLAG = re.compile(r"(--?[\w-]+)(=|$)")


def writer(device: str | None = None, compiled: bool = False) -> dict[str, str]:
    """Versions, host, process, time, command line, device, and the git commits of kdcache and of the folder worked in.

    A "+" after a commit tells that files were changed since.
    """
    package = Path(kdcache.__file__).parent
    # Where it is installed, it may lie in another project's work tree.
    own = _commit(package) if (package / ".git").exists() else None
    commits = {"kdcache_commit": own, "commit": _commit(Path.cwd())}
    teacher = {} if device is None else {"device": device, "compiled": "yes" if compiled else "no"}
    return {
        "kdcache": kdcache.__version__,
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "host": socket.gethostname(),
        "process": str(os.getpid()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command_line(sys.argv, os.environ),
        **teacher,
        **{name: commit for name, commit in commits.items() if commit},
    }


def command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command for people to read and run again, with *** for what is, or may be, a secret.

    That is the value of a flag whose name says so, what stands in an address for a user or a query, and whatever a
    variable of the environment holds whose name says so.
    """
    program = Path(arguments[0]).name
    words, is_secret = ["kdcache" if program == "cli.py" else program], False
    for word in arguments[1:]:
        flag = _FLAG.match(word)
        if is_secret and not flag:
            words.append(HIDDEN)
            is_secret = False
            continue
        is_secret = bool(flag and names_a_secret(flag[1]))
        if flag and is_secret and flag[2]:
            word, is_secret = f"{flag[1]}={HIDDEN}", False
        words.append(hide(word, environment))
    line = " ".join(word if HIDDEN in word else shlex.quote(word) for word in words)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def public(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts, nested or not, without what `hide` hides."""

    def shown(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: shown(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [shown(one) for one in value]
        return hide(value) if isinstance(value, str) else value

    return {name: shown(value) for name, value in facts.items()}


def _commit(folder: Path) -> str | None:
    """The commit of the git work tree that holds the folder, if there is one and git is installed."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        line = ["git", "--no-optional-locks", "-C", str(folder), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=10)

    try:
        found = git("rev-parse", "--verify", "HEAD")
        if found.returncode:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no").stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() + ("+" if changed else "")
