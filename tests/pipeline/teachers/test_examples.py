"""The modules in docs/teachers.md work as they stand there."""

import re
import sys

import pytest
import torch
from safetensors.torch import load_file

from kdcache.cache import open_cache
from kdcache.pipeline.process.functions import import_function
from kdcache.tests.helpers.members import works
from kdcache.tests.helpers.places import ROOT


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Writes each Python block of the page into the file that its first line names."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "teachers.md").read_text(), re.DOTALL):
        (tmp_path / re.match(r"# (\w+\.py): ", block)[1]).write_text(block)
    yield
    for name in ("zero_shot", "probe"):
        sys.modules.pop(name, None)


def test_a_zero_shot_teacher_and_a_frozen_student(modules, tmp_path):
    works("build --teacher zero_shot:teacher --views 1 --augment crop --allow-low-accuracy --out cache")
    cache = open_cache("cache")
    had = cache.identity.teacher
    assert (had.input_size, had.mean) == (32, (0.48, 0.46, 0.41)) and cache.identity.record.classes == 10
    works("verify cache --data digits --teacher zero_shot:teacher")
    torch.manual_seed(0)  # as the run's seed does
    before = import_function("probe:student", "network")(10).state_dict()
    works("train --cache cache --student probe:student --epochs 1 --batch-size 256 --out run")
    after = load_file("run/last.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.startswith("body."))
    assert not torch.equal(after["head.weight"], before["head.weight"])
