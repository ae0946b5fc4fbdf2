"""kdcache report of every kind of cache and of runs: what the page says, and what it says where something lacks."""

import base64
import io
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from kdcache.cli import main
from kdcache.pipeline.ensembles.config import MixConfig
from kdcache.pipeline.ensembles.mix import mix
from kdcache.pipeline.share import push
from kdcache.tests.helpers.caches import Filled, identity
from kdcache.tests.helpers.ensembles import answered
from kdcache.tests.helpers.ffcv import packed_arrays
from kdcache.tests.helpers.images import arrays_data
from kdcache.tests.helpers.places import DATA
from kdcache.tests.helpers.reports import HOSTILE, Markup, hostile_cache, write_run
from kdcache.train.report import page as pages
from kdcache.train.report.facts import caches as reading
from kdcache.train.report.facts.pictures import SIDE, address, class_names

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync", "own_home")


def quiet(_):
    pass


def invoke(line):
    return CliRunner().invoke(main, ["report", *shlex.split(line)], catch_exceptions=False)


def reported(line, tmp_path):
    """The facts and the page of a report."""
    result = invoke(f"{line} --json --out {tmp_path / 'r.html'}")
    assert result.exit_code == 0, result.output
    page = Markup((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.faults == []
    return json.loads(result.stdout), page


@pytest.mark.parametrize("name", ["format-1/cache", "format-1/cache.h5", "format-1/dense.h5", "format-2/dense.h5"])
def test_caches_of_earlier_versions(name, tmp_path):
    facts, page = reported(DATA / name, tmp_path)
    (cache,) = facts["caches"]
    with np.load(DATA / name.split("/")[0] / "logits.npz") as truth:
        right = truth["evaluation"].argmax(1) == truth["evaluation_labels"][:, 0]
    assert cache["evaluation"]["top1"] == pytest.approx(right.mean())
    assert f"{100 * right.mean():.1f}%" in page.text and cache["key"] in page.text
    assert "Images are not shown: " in page.text
    mixed = name.startswith("format-2")
    assert ("top1" in cache["training"]) != mixed and ("one right answer" in page.text) == mixed
    few = cache["evaluation_samples"] if mixed else 12
    assert len(cache["hardest"]) == len(cache["ambiguous"]) == min(12, few)
    assert ("The hardest of the evaluation images" in page.text) == mixed


def test_top_k_caches_say_what_is_stored(tmp_path):
    Filled(tmp_path / "c", identity(classes=300, k=5, temperatures=(1.0, 50.0), samples=40, part=16))
    facts, page = reported(tmp_path / "c", tmp_path)
    mass = facts["caches"][0]["mass"]
    assert mass["1"]["head"] + mass["1"]["tail"] == pytest.approx(1) and mass["50"]["head"] < 0.5
    assert "The 5 stored of 300 classes hold" in page.text and "larger --topk" in page.text


def test_what_lacks_is_said(tmp_path):
    Filled(tmp_path / "unlabelled", identity(labels=0))
    facts, page = reported(tmp_path / "unlabelled", tmp_path)
    assert "built without labels" in page.text and "top1" not in facts["caches"][0]["evaluation"]
    Filled(tmp_path / "gap", identity(lacks=("target_gap",)))
    facts, page = reported(tmp_path / "gap", tmp_path)
    assert "without the teacher's answers for the labels" in page.text and facts["caches"][0]["hardest"] == []
    Filled(tmp_path / "hot", identity(temperatures=(2.0, 4.0)))
    facts, page = reported(tmp_path / "hot", tmp_path)
    assert facts["caches"][0]["temperature"] == 2 and "Temperature 1 is not stored" in page.text


def test_a_cache_that_is_not_finished(tmp_path):
    cache = Filled(tmp_path / "c", identity(), views=2).cache
    (tmp_path / "c" / "commits" / "v00001-p0002.json").unlink()
    facts, page = reported(tmp_path / "c", tmp_path)
    assert facts["caches"][0]["views"] == [0] and facts["caches"][0]["under_way"] == [1]
    assert "1 under way" in page.text
    shutil.rmtree(tmp_path / "c" / "commits")
    shutil.rmtree(tmp_path / "c" / "eval" / "commits")
    facts, page = reported(tmp_path / "c", tmp_path)
    assert "No view is complete yet" in page.text and facts["caches"][0]["training"] is None
    assert cache.key in page.text


def test_a_damaged_shard_is_said_and_hides_nothing_else(tmp_path):
    Filled(tmp_path / "c", identity())
    next((tmp_path / "c" / "views" / "v00000").rglob("c/0/0")).write_bytes(b"x")
    facts, page = reported(tmp_path / "c", tmp_path)
    (cache,) = facts["caches"]
    assert "v00000" in cache["missing"]["training"] and "v00000" in page.text and cache["evaluation"]["top1"] >= 0


def test_an_ensemble_names_its_members(tmp_path):
    caches = answered(tmp_path, 2, samples=20, k=None)
    mixed = mix(MixConfig(tuple(str(c.cache.path) for c in caches), out=str(tmp_path / "m")), quiet)
    facts, page = reported(mixed.path, tmp_path)
    assert len(facts["caches"][0]["members"]) == 2 and "2 teachers on toy" in page.text
    assert all(one["key"][:12] in page.text for one in facts["caches"][0]["members"])


def test_a_file_with_images_and_a_cache_of_a_registry(tmp_path):
    cache, _, packed = packed_arrays(tmp_path)
    facts, page = reported(packed.path if hasattr(packed, "path") else tmp_path / "x.beton", tmp_path)
    assert facts["caches"][0]["store"] == "ffcv" and facts["caches"][0]["training"]["images"] == 100
    (tmp_path / "shared").mkdir()
    push(str(cache.path), str(tmp_path / "shared"), say=quiet, name="toy-v1", teacher=False)
    facts, page = reported(f"toy-v1 --registry {tmp_path / 'shared'}", tmp_path)
    assert facts["caches"][0]["key"] == cache.key and "shared" in page.text


def test_of_a_large_cache_a_part_is_read_and_the_page_says_which(tmp_path, monkeypatch):
    Filled(tmp_path / "c", identity(samples=80, part=8), views=6)
    monkeypatch.setattr(reading, "BUDGET", 80 * 8 * 2)
    facts, page = reported(tmp_path / "c", tmp_path)
    assert [one["view"] for one in facts["caches"][0]["training"]["of_views"]] == [0, 1]
    monkeypatch.setattr(reading, "BUDGET", 40 * 8)
    facts, page = reported(tmp_path / "c", tmp_path)
    training = facts["caches"][0]["training"]
    assert training["images"] == 40 and training["parts"] == 5 and training["share"] == 0.5
    assert "5 of 10 parts of each, drawn with seed 0 (50.0% of the samples)" in page.text


def test_pictures_are_shown_where_the_images_are(tmp_path):
    cache, spec = hostile_cache(tmp_path)
    facts, page = reported(f"{cache.path} --data '{spec}'", tmp_path)
    images = [of["src"] for tag, of in page.tags if tag == "img"]
    assert len(images) > 24 and all(re.match(r"data:image/(png|jpeg);base64,", one) for one in images)
    assert "In the middle" not in page.text and "One in the middle" in page.text
    worst = facts["caches"][0]["hardest"][0]
    z = np.concatenate([cache.read(v).softened(1.0).log_target().numpy() for v in (0, 1, 2)], 1)
    assert worst["sample"] == int(z.mean(1).argmin()) and worst["nll"] == pytest.approx(-z.mean(1).min(), rel=1e-4)
    other = tmp_path / "other" / "train" / "a" / "x.png"
    other.parent.mkdir(parents=True)
    shutil.copy(next((tmp_path / "images").rglob("*.png")), other)
    wrong = invoke(f"{cache.path} --data imagefolder:{tmp_path / 'other'} --out {tmp_path / 'w.html'}")
    assert wrong.exit_code == 2 and "Error: " in wrong.stderr and not (tmp_path / "w.html").exists()


def test_a_picture_is_as_large_as_the_page_shows_it():
    """Small ones are exact; large ones lose what nobody sees."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 24, 20), np.uint8)
    small = address(torch.from_numpy(pixels))
    assert small.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(small.split(",")[1]))) as image:
        assert np.array_equal(np.asarray(image), pixels[0].transpose(1, 2, 0))
    large = address(torch.full((1, 3, 300, 200), 90, dtype=torch.uint8))
    assert large.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(large.split(",")[1]))) as image:
        assert image.size == (round(SIDE * 2 / 3), SIDE) and abs(int(np.asarray(image).mean()) - 90) <= 1


def test_a_page_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    monkeypatch.setattr(pages, "MOST", 10_000)
    result = invoke("run")
    assert result.exit_code == 2 and "report on fewer" in result.output and not (tmp_path / "report.html").exists()


def test_classes_have_the_names_of_the_data_where_the_teacher_counts_otherwise(tmp_path):
    data = arrays_data(40, 6, 9)
    cache = Filled(tmp_path / "c", identity(samples=40, classes=20)).cache
    mapped = SimpleNamespace(
        identity=cache.identity.model_copy(update={"class_map": "e" * 64}),
        train=SimpleNamespace(labels=(data.labels + 5).astype(np.uint8)),
    )
    named = class_names(mapped, data)
    assert named[5 + int(data.labels[0, 0])] == data.class_names[int(data.labels[0, 0])] and named[0] == "class 0"


def test_names_are_shown_and_never_obeyed(tmp_path):
    cache, spec = hostile_cache(tmp_path)
    bad = HOSTILE[0]
    write_run(tmp_path / "runs" / "a", student=bad, extra=HOSTILE[1])
    write_run(tmp_path / "runs" / "b", loss=HOSTILE[1], student="resnet8", extra="plain")
    facts, page = reported(f"{cache.path} {tmp_path / 'runs'} --data '{spec}' --judge 0", tmp_path)
    text = (tmp_path / "r.html").read_text()
    assert HOSTILE[0] in page.text and HOSTILE[1] in page.text and HOSTILE[3] in page.text and "49" not in HOSTILE[3]
    assert "<script" not in text and "\u202e" not in text and "\u0007" not in text and "\\u202e" in text
    csp = next(of["content"] for tag, of in page.tags if of.get("http-equiv") == "Content-Security-Policy")
    assert csp.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert facts["bytes"] == len(text.encode()) < 5_000_000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nothing", "no cache at nothing"),
        ("empty", "holds neither a cache nor a run"),
        ("run/last.safetensors", "give the run's folder"),
        ("run --out page.txt", "ends in .html"),
        ("run --out other.html", "is no report"),
        ("run --out empty", "is a folder"),
        ("run --out no/r.html", "there is no folder no"),
        ("", "Missing argument"),
    ],
)
def test_wrong_input_is_one_clear_line(line, words, tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.html").write_text("<!doctype html>my own page")
    result = invoke(line)
    assert result.exit_code == 2 and words.lower() in result.output.lower() and "Traceback" not in result.output
    assert (tmp_path / "other.html").read_text().endswith("my own page")


def test_a_report_is_replaced_by_the_next_one(tmp_path):
    write_run(tmp_path / "run")
    for _ in range(2):
        result = invoke("run")
        assert result.exit_code == 0 and result.stdout.startswith("report.html: 1 run, ")
