"""A small cache that was built on the CPU."""

import pytest
import torch
from safetensors.torch import save_file

from kdcache.cache import open_cache
from kdcache.pipeline.build.build import build
from kdcache.pipeline.build.config import BuildConfig
from kdcache.pipeline.build.source import open_source
from kdcache.pipeline.teachers.networks import build_network
from kdcache.tests.helpers.training import quiet


def built(folder, augment):
    """The settings of a build of two views, the cache, and what it was built from."""
    torch.manual_seed(0)
    save_file(build_network("resnet8", 10, 32).state_dict(), folder / "weights.safetensors")
    config = BuildConfig(
        "resnet8", str(folder / "weights.safetensors"), data="kdcache.tests.helpers.gpudata:images", augment=augment,
        views=2, topk=5, tail_std=True, batch_size=16, device="cpu", allow_low_accuracy=True, out=str(folder / "cache"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_HOME", str(folder / "home"))
        source = open_source(config, quiet)
        return config, open_cache(build(config, quiet, source).path), source


@pytest.fixture(scope="module")
def made(tmp_path_factory, no_fsync):
    return built(tmp_path_factory.mktemp("plain"), "crop,flip,gray,erase")


@pytest.fixture(scope="module")
def made_of_mixed_views(tmp_path_factory, no_fsync):
    return built(tmp_path_factory.mktemp("mixed"), "crop,flip,mixup(0.2),cutmix(1)")
