"""Teaching a teacher for data that have none."""

import json
import shutil

import pytest

from kdcache.cache import KdcacheError
from kdcache.tests.helpers.training import quiet
from kdcache.train.config import TeachConfig
from kdcache.train.teach import teach


def test_a_teacher_that_was_half_taught_on_them_is_not_gone_on_with(home):
    def stop(text):
        if text.startswith("epoch 2/"):
            raise KeyboardInterrupt

    config = TeachConfig("resnet14", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        teach(config, stop)
    (file,) = home.glob("teachers/*/resnet14.run/config.json")
    now = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in now.items() if k != "stream"}))
    with pytest.raises(KdcacheError, match=r"stream: the run has views, asked for teaching \(--force teaches it from"):
        teach(config, quiet)
    shutil.rmtree(file.parent)
