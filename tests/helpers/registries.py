"""Commands on registries, and what lies in those."""

import json
import os
import shlex
import time

from click.testing import CliRunner

from kdcache.cache import care
from kdcache.cache.registry.backends import open_objects
from kdcache.cli import main
from kdcache.tests.helpers.caches import identity


def about(**record):
    """Two parts a view, one of the evaluation split."""
    return identity(part=12, **record)


def quiet(line):
    pass


def run(line, **env):
    return CliRunner().invoke(main, shlex.split(line), env=env, catch_exceptions=False)


def refused(line, words):
    """One line that says `words`, and exit status 2."""
    result = run(line)
    assert result.exit_code == 2 and words in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1, result.output
    return result.output


def content(folder):
    """Every file of a cache's folder but what is left of builders."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(("leases", "scratch", "published"))}


def stored(root):
    """Everything in a registry by its path."""
    there = open_objects(root)
    return {f"caches/{path}": there.read(f"caches/{path}", 1 << 20) for path in there.sizes("caches")}


OLD = 40 * care.DAY


def age(path, seconds=OLD):
    then = time.time() - seconds
    for one in [path, *path.rglob("*")]:
        os.utime(one, (then, then), follow_symlinks=False)


def collect(line="gc"):
    return json.loads(run(f"{line} --json").stdout)
