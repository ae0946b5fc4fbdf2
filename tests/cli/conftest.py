"""The place where commands are run: images, a taught teacher and caches of it, made once a session."""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kdcache.pipeline.teachers.networks import build_network
from kdcache.pipeline.teachers.teacher import Classifier, file_classifier
from kdcache.tests.helpers.commands import Place, is_refused, paint, works


@contextlib.contextmanager
def _in(work: Path, home: Path) -> Iterator[None]:
    """In a current directory, with a home of kdcache's, no other setting of it and one thread; then as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks of this size gain nothing by more, and lose much on a busy machine
    try:
        with pytest.MonkeyPatch.context() as patch:
            for variable in [name for name in os.environ if name.startswith("KDCACHE_")]:
                patch.delenv(variable)
            patch.setenv("KDCACHE_HOME", str(home))
            patch.chdir(work)
            yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("place")
    work, pics, home = root / "work", paint(root / "pics"), root / "home"
    work.mkdir()
    with _in(work, home):
        data = f"--data imagefolder:{pics}"
        taught = json.loads(works(f"teach --teacher resnet8 {data} --epochs 3 --batch-size 32 --json").stdout)
        built = json.loads(works(f"build --teacher resnet8 {data} --views 2 --json").stdout)
        assert taught["top1"] > 0.9 and built["teacher_top1"] == taught["top1"]
        works(f"build --teacher resnet8 {data} --views 1 --topk 2 --temperatures 1,2 --out {root}/top2")
    return Place(root, home, work, pics, Path(taught["weights"]), Path(built["path"]), root / "top2")


@pytest.fixture(scope="session")
def large(place: Place) -> Path:
    """Images that stay in files, and a cache of them."""
    folder = place.root / "large"
    pics = paint(folder / "pics", each=10, side=80)
    model = Classifier(build_network("resnet8", 4, 32), (0.5,) * 3, (0.3,) * 3)
    names = [f"c{i}" for i in range(4)]
    notes = {"input_size": 32, "mean": [0.5] * 3, "std": [0.3] * 3, "class_names": names}
    file_classifier(folder / "teacher.safetensors", model, notes)
    with _in(place.work, place.home):
        works(
            f"build --teacher resnet8 --weights {folder}/teacher.safetensors --data imagefolder:{pics} --views 1 "
            f"--workers 0 --allow-low-accuracy --out {folder}/cache"
        )
    return folder


@pytest.fixture(autouse=True)
def in_place(place: Place) -> Iterator[None]:
    """Each test runs in the place's current directory, and finds it empty."""
    with _in(place.work, place.home):
        yield
    shutil.rmtree(place.work)
    place.work.mkdir()


@pytest.fixture
def data(place: Place) -> str:
    return f"--data imagefolder:{place.pics}"


@pytest.fixture
def quick(place: Place) -> str:
    """A training of a second."""
    return f"train --data imagefolder:{place.pics} --student resnet8 --epochs 2 --batch-size 32"


@pytest.fixture
def refused(place: Place) -> Callable[..., str]:
    """Run what must be refused; its one line. `parts` must stand in it."""
    return functools.partial(is_refused, place)
