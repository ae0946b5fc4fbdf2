"""What a shell is offered, as fast as one waits for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.pipeline.commandline import completion
from kdcache.pipeline.data.dataset import KINDS
from kdcache.pipeline.teachers.networks import names
from kdcache.pipeline.views.policy import NAMED
from kdcache.train.losses.options import LOSSES

CODE = """
import sys
from kdcache.cli import main
try:
    main(prog_name="kdcache")
finally:
    print([name for name in sys.modules if name.partition(".")[0] in ("torch", "numpy", "pydantic")], file=sys.stderr)
"""


def offered(words: str, home: Path) -> list[str]:
    """What bash is offered for the last of the words; nothing that is slow may be imported for it."""
    line = ["kdcache", *words.split(" ")]
    env = {
        **os.environ, "KDCACHE_HOME": str(home), "_KDCACHE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env)
    assert done.stderr == "[]\n", done.stderr
    return [found.partition(",")[2] for found in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("verif", ["verify"]),
        ("train --evaluate", ["--evaluate-every"]),
        ("train --loss skew", ["skew-kl", "skew-rkl"]),
        ("train --loss nkd,tf", ["nkd,tf-nkd"]),
        ("train --loss nkd --loss k", ["kd"]),
        ("train --loss nkd --student resnet32", ["resnet32", "resnet32x4", "resnet32_a"]),
        ("build --teacher wide_resnet50", ["wide_resnet50_2"]),
        ("build --teacher resnet34 --data cifar", ["cifar10", "cifar100"]),
        ("build --store h", ["hdf5"]),
        ("views three", ["three-augment"]),
        ("info ab", ["ab" + "0" * 10]),
        ("train --cache ", ["ab" + "0" * 10, "cd" + "1" * 10]),
        ("info ./he", ["./he"]),
    ],
)
def test_values_complete(tmp_path: Path, words: str, found: list[str]) -> None:
    for key in ("ab" + "0" * 62, "cd" + "1" * 62 + ".h5", "junk"):
        (tmp_path / "caches" / key).mkdir(parents=True)
    assert offered(words, tmp_path) == found


def test_words_are_those_of_the_tables() -> None:
    assert completion.LOSSES.split() == list(LOSSES)
    assert list(completion.DATA) == list(KINDS)
    assert set(completion.NETWORKS.split()) <= set(names())
    assert set(NAMED) <= set(completion.AUGMENT)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str) -> None:
    env = {**os.environ, "_KDCACHE_COMPLETE": f"{shell}_source"}
    code = "from kdcache.cli import main; main(prog_name='kdcache')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "_KDCACHE_COMPLETE" in done.stdout, done.stderr
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)
