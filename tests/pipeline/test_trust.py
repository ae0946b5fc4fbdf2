"""No code from a cache, a run folder or a weights file: no command imports what only they name."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcache.cache.errors import InputError
from kdcache.cli import main
from kdcache.pipeline.trust import images_of
from kdcache.tests.helpers.signing import write_key

GOOD = """
import numpy as np
import torch

def images(split):
    rng = np.random.default_rng(split == "train")
    labels = np.arange(40 if split == "train" else 20) % 4
    pixels = rng.integers(0, 60, (len(labels), 16, 16, 3)) + 60 * labels[:, None, None, None]
    return pixels.astype(np.uint8), labels

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = torch.nn.Linear(3, classes)
        torch.nn.init.eye_(self.fc.weight)
        torch.nn.init.zeros_(self.fc.bias)
    def forward(self, x):
        return self.fc(x.mean((2, 3)))

def net(classes):
    return Net(classes)
"""
BAD = """
from pathlib import Path
Path("imported").touch()
def images(split): Path("called").touch()
def net(*classes): Path("called").touch()
"""


def kdcache(line):
    return CliRunner().invoke(main, line.split(), catch_exceptions=False)


def works(line):
    result = kdcache(line)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """Keys of caches, and two runs, whose makers named functions of the module `theirs`, which is now another's.

    The cache OURS has its images from the module `ours`, which stays as it is.
    """
    root = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("KDCACHE_")]:
            patch.delenv(variable)
        patch.setenv("KDCACHE_HOME", str(root / "home"))
        patch.chdir(root)
        patch.setattr(sys, "path", [*sys.path])
        for module in ("theirs", "ours"):
            (root / f"{module}.py").write_text(GOOD)
        build = "build --teacher theirs:net --views 1 --allow-low-accuracy --augment crop --json"
        keys = {
            whose.upper(): json.loads(works(f"{build} --data {whose}:images").stdout)["key"]
            for whose in ("theirs", "ours")
        }
        train = "train --data theirs:images --student theirs:net --epochs 1 --batch-size 16"
        works(f"{train} --loss nkd --out run")
        works(f"{train} --loss bdkd --online --teacher theirs:net --out beside")
        write_key(root / "alice")
        (root / "theirs.py").write_text(BAD)
        sys.modules.pop("theirs")
        shutil.rmtree(root / "__pycache__", ignore_errors=True)
        yield keys
        for module in ("theirs", "ours"):
            sys.modules.pop(module, None)


def untouched(result, *, status):
    assert result.exit_code == status, result.output
    assert "theirs" not in sys.modules and not Path("imported").exists() and not Path("called").exists()
    if status:
        lines = result.stderr.splitlines()
        assert lines[-1].startswith("Error: ") and "Traceback" not in result.output
        return lines[-1]
    return result.output


LINES = [
    ("verify THEIRS", 2, "--teacher theirs:net"),
    ("verify THEIRS --teacher resnet8", 2, "--data theirs:images"),
    ("verify THEIRS --depth contents", 0, ""),
    ("verify THEIRS --depth commits --repair", 0, ""),
    ("pack THEIRS --to ffcv", 2, "--data theirs:images"),
    ("pack THEIRS --to hdf5 --out c.h5", 0, ""),
    ("unpack c.h5 --out unpacked", 0, ""),
    ("train --loss nkd --cache OURS --data ours:images --student resnet8 --epochs 1 --out plain", 0, ""),
    ("train --loss nkd --online --cache OURS --data ours:images --student resnet8", 2, "--teacher theirs:net"),
    ("train --loss bdkd --online --cache OURS --data ours:images --student resnet8", 2, "--teacher theirs:net"),
    ("eval run", 2, "--student theirs:net"),
    ("eval run/last.safetensors", 2, "--student theirs:net"),
    ("eval run --student resnet8", 2, "do not fit"),
    ("eval beside", 2, "--student theirs:net"),
    ("export run --to torchscript", 2, "--student theirs:net"),
    ("export run --to torchscript --student ours:net", 2, "--data theirs:images"),
    ("build --teacher resnet8 --weights run/last.safetensors --data digits", 2, "do not fit"),
    ("plan --teacher resnet8 --weights run/last.safetensors --data digits", 2, "do not fit"),
    ("mix THEIRS OURS", 2, "data.name"),
    ("report THEIRS run beside --out theirs.html", 0, "theirs.html"),
    ("push THEIRS --registry registry", 0, ""),
    ("sign THEIRS --key alice", 0, "SHA256:"),
    ("pull THEIRS --registry registry --out pulled", 0, ""),
    ("pull THEIRS --registry registry --replay 5", 2, "--teacher theirs:net"),
    ("ls --registry registry", 0, ""),
    ("info THEIRS", 0, ""),
    ("rm THEIRS --registry registry --yes", 0, ""),
    ("gc", 0, ""),
    ("views crop --data ours:images --samples 2 --views 2", 0, "views.png"),
]


@pytest.mark.parametrize(("line", "status", "flag"), LINES)
def test_nothing_is_imported_that_only_a_file_names(victim, line, status, flag):
    message = untouched(
        kdcache(line.replace("THEIRS", victim["THEIRS"]).replace("OURS", victim["OURS"])), status=status
    )
    assert flag in message


def test_what_the_user_names_is_imported(victim):
    """So that caches by people's own functions stay usable: refused before, not after."""
    result = kdcache(f"verify {victim['THEIRS']} --data theirs:images --teacher theirs:net")
    assert result.exit_code == 2 and Path("called").exists() and Path("imported").exists()
    for name in ("imported", "called"):
        Path(name).unlink()
    sys.modules.pop("theirs")


def test_every_command_that_reads_what_others_wrote_is_tried():
    """A new command must take its place here."""
    assert {line.split()[0] for line, _, _ in LINES} == main.commands.keys() - {"bench", "demo", "import", "teach"}


def test_a_settings_file_that_names_code_says_so(victim):
    Path("kdcache.toml").write_text('data = "ours:images"')
    says = "note: kdcache.toml: data = ours:images is a function of your own, which is imported and called"
    try:
        assert says in kdcache(f"pack {victim['OURS']} --to ffcv --out o.beton").stderr
        assert "note: " not in kdcache(f"verify {victim['OURS']} --data ours:images --depth commits").stderr
    finally:
        Path("kdcache.toml").unlink()


def test_the_images_are_those_that_are_given_or_that_a_cache_names():
    assert images_of("imagefolder", "imagefolder:here", "the cache") == "imagefolder:here"
    assert images_of("theirs:images", "theirs:images", "the cache") == "theirs:images"
    assert images_of("digits", None, "the cache") == "digits"
    with pytest.raises(InputError, match=r"^where are the images\? give --data imagenet:PATH, or do without$"):
        images_of("imagenet", None, "the cache", ", or do without")
    with pytest.raises(InputError, match=r"^the cache names the dataset 'theirs:images'.* give --data theirs:images$"):
        images_of("theirs:images", None, "the cache")
