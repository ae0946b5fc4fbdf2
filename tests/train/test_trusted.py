"""Builds, trainings and evaluations from signed caches, and pulls that ask the teacher: what is foreign is refused."""

import json
import shutil
from pathlib import Path

import pytest

from kdcache.cache import Cache
from kdcache.cache.home import caches_folder, home_at
from kdcache.cache.store.layout import shard_name
from kdcache.pipeline.share import push
from kdcache.tests.helpers.building import TOY
from kdcache.tests.helpers.registries import quiet, refused, run
from kdcache.tests.helpers.signing import key_of, trust_in

TEACHER = "--teacher kd_toy:net --data kd_toy:images"
BUILD = f"build {TEACHER} --augment crop,flip --topk 4 --temperatures 1,4 --allow-low-accuracy --device cpu"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, one_thread: None, no_fsync: None) -> Path:
    """A folder with a cache by a teacher of one's own, keys, and files that trust them."""
    root = tmp_path_factory.mktemp("toy")
    (root / "kd_toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        with home_at(root / "first"):
            assert run(f"{BUILD} --views 3 --out {root}/cache").exit_code == 0
        trust_in(root / "alice-only", root / "alice")
        trust_in(root / "bob-only", root / "bob")
        yield root  # type: ignore[misc]


@pytest.fixture
def shared(toy: Path, own_home: None) -> str:
    """A registry with the cache, signed by alice."""
    push(toy / "cache", "shared", say=quiet, key=key_of(toy / "alice"))
    return "shared"


def test_students_learn_from_what_is_signed_alone(toy: Path, shared: str) -> None:
    key = Cache(toy / "cache").key
    train = f"train --cache {key} --registry {shared} --data kd_toy:images --student kd_toy:net --epochs 1"
    train += " --batch-size 50 --loss nkd:temperature=1 --log none --out run"
    refused(f"{train} --trust {toy}/bob-only", "whom /")
    assert run(f"{train} --trust {toy}/alice-only").exit_code == 0
    evaluate = f"eval run --data kd_toy:images --student kd_toy:net --registry {shared}"
    assert run(f"{evaluate} --trust {toy}/alice-only").exit_code == 0
    refused(f"{evaluate} --trust {toy}/bob-only", "whom /")
    # A view more than was signed.
    shutil.rmtree(Path(shared) / "caches" / key / "signatures")
    for file in sorted((Path(shared) / "caches" / key / "commits").glob("v00002-*.json")):
        file.rename(file.with_suffix(".away"))
    assert run(f"sign {shared}/caches/{key} --key {toy}/alice").exit_code == 0
    for file in (Path(shared) / "caches" / key / "commits").glob("*.away"):
        file.rename(file.with_suffix(".json"))
    again = f"{train}2 --trust {toy}/alice-only"
    refused(again, "views from 2 on are not")
    assert run(f"{again} --views 2").exit_code == 0


def test_builds_fetch_what_is_signed_alone(toy: Path, shared: str) -> None:
    key = Cache(toy / "cache").key
    line = f"{BUILD} --registry {shared} --views 3 --json"
    both = run(f"{line} --push --trust {toy}/alice-only")
    assert both.exit_code == 2 and "Error: --trust is for caches that are fetched" in both.stderr
    Path("kdcache.toml").write_text(f'trusted = "{toy}/bob-only"')
    assert "whom /" in (said := run(line).stderr).splitlines()[-1] and said.count("Error: ") == 1
    assert not (caches_folder() / key).exists()
    said = run(f"{line} --push").stderr
    assert "note: with --push, what others build in the registry is taken although it is not signed yet" in said
    Path("kdcache.toml").write_text(f'trusted = "{toy}/alice-only"')
    result = run(line)
    assert json.loads(result.stdout)["teacher_images"] == 0
    assert f"cache {key[:12]} is signed by alice@lab" in result.stderr


def forged(toy: Path, target: Path) -> Path:
    """The cache with the records of each view in other places, and with commits that fit."""
    shutil.copytree(toy / "cache", target)
    store = Cache(target).train
    for view in range(3):
        rows = {name: getattr(store.read(view, None), name) for name in ("classes", "gaps", "target_gap", "tail")}
        rows = {name: found.roll(1, 0).numpy() for name, found in rows.items()}
        for part in range(store.parts):
            about = store.commit(shard_name(view, part))
            sums = store.read_shard(view, part)["tail_sums"][0] if view == 0 else None
            (target / "commits" / f"{shard_name(view, part)}.json").unlink()
            at = slice(store.rows(part).start, store.rows(part).stop)
            store.write_shard(view, part, {n: r[at] for n, r in rows.items()}, about.parameters, about.writer, sums)
    return target


def test_a_pull_asks_the_teacher_first(toy: Path, shared: str, tmp_path: Path) -> None:
    key = Cache(toy / "cache").key
    result = run(f"pull {key} --registry {shared} --views 1:3 --replay 30 {TEACHER} --trust {toy}/alice-only")
    assert result.exit_code == 0, result.output
    said = (
        f"asked kd_toy:net again for 90 records of cache {key[:12]}, and it answers what they hold (largest mean total"
    )
    assert said in result.stderr
    assert Cache(caches_folder() / key).views == (1, 2)
    push(forged(toy, tmp_path / "forged"), "other", say=quiet)
    words = "nothing was copied: "
    line = f"pull {key} --registry other --out pulled"
    assert words in (text := refused(f"{line} --replay 30 {TEACHER}", "is not what the teacher answers now"))
    assert "mean total variation" in text and not Path("pulled").exists()
    assert run(line).exit_code == 0


def test_a_pull_that_cannot_ask_says_what_to_do(toy: Path, shared: str) -> None:
    line = f"pull {Cache(toy / 'cache').key} --registry {shared}"
    refused(f"{line} --replay 30", "--teacher kd_toy:net")
    refused(f"{line} --replay 30 --data kd_toy:images", "--teacher kd_toy:net")
    refused(f"{line} --replay 30 --data digits --teacher kd_toy:net", "data.name: the cache has kd_toy:images")
    assert "--data is for --replay, which asks the teacher" in run(f"{line} --data digits").stderr
    assert not caches_folder().exists()
