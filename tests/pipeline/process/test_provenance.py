"""Who built a cache: told in `info`, and without anybody's secrets."""

import json
import subprocess

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache import Cache
from kdcache.cli import main
from kdcache.pipeline.info import built, describe, facts
from kdcache.pipeline.process import provenance
from kdcache.tests.helpers.caches import Filled, identity

SECRET = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=12, max_size=30)
SECRET = SECRET.map("s3cr3t".__add__)


@given(SECRET, st.sampled_from(["--api-key", "--hf-token", "--password", "--registry-token", "-password"]))
def test_what_a_flag_names_a_secret_is_hidden(secret, flag):
    for words in ([flag, secret], [f"{flag}={secret}"], ["--x", "1", flag, secret, "--y", "2"]):
        line = provenance.command_line(["/usr/bin/kdcache", "build", *words], {})
        assert secret not in line and line.startswith("kdcache build ") and "***" in line


@given(SECRET, st.sampled_from(["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD", "AWS_ACCESS_KEY_ID"]))
def test_what_the_environment_holds_as_a_secret_is_hidden(secret, name):
    for words in (["--note", secret], [f"--note=a{secret}b"]):
        line = provenance.command_line(["kdcache", "build", *words], {name: secret, "LANG": "--note"})
        assert secret not in line and "--note" in line


@given(SECRET)
def test_what_stands_in_an_address_is_hidden(secret):
    for address in (f"s3://{secret}@bucket/x", f"https://me:{secret}@host/x", f"https://host/x?X-Signature={secret}"):
        for words in (["--registry", address], [f"--registry={address}"]):
            line = provenance.command_line(["kdcache", "build", *words], {})
            assert secret not in line and "/x" in line


def test_the_rest_stands_as_it_was_given():
    words = ["kdcache", "build", "--data", "imagefolder:/a b/c", "--registry", "s3://bucket/kd", "--topk", "20"]
    line = provenance.command_line(words, {"KDCACHE_HOME": "s3://bucket", "EMPTY_TOKEN": "", "SHORT_TOKEN": "20"})
    assert line == "kdcache build --data 'imagefolder:/a b/c' --registry s3://bucket/kd --topk 20"
    assert provenance.command_line(["/x/kdcache/cli.py", "ls"], {}) == "kdcache ls"
    assert len(provenance.command_line(["kdcache", "x" * 10**6], {})) < 2100


def test_the_commit_of_the_work_tree(tmp_path, monkeypatch):
    assert provenance._commit(tmp_path) is None
    identified = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], [*identified, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    (tmp_path / "new").write_text("no matter")
    assert provenance._commit(tmp_path) == head.strip()
    (tmp_path / "file").write_text("2")
    assert provenance._commit(tmp_path) == head.strip() + "+"
    monkeypatch.setenv("PATH", "")
    assert provenance._commit(tmp_path) is None


def test_info_tells_who_built_which_views(tmp_path):
    filled = Filled(tmp_path / "cache", identity(), views=0)
    store = filled.cache.train
    for view, command in ((0, "kdcache build"), (1, "kdcache build"), (3, "kdcache build --views 4\x1b[31m")):
        filled.logits["train", view] = filled.draw(store)
        for part in range(store.parts):
            time = f"2026-11-2{view}T00:00:0{part}Z"
            who = {"host": "anna's", "command": command, "process": str(part), "time": time}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("kdcache.tests.helpers.caches.WRITER", who)
                filled.write(store, view, part)
    filled.cache.write_prior({})
    cache = Cache(filled.cache.path)
    first, second = built(cache)
    assert first["views"] == [0, 1] and first["first"] == "2026-11-20T00:00:00Z"
    assert first["last"] == "2026-11-21T00:00:02Z" and second["views"] == [3]
    text = describe(cache, facts(cache))
    assert "views 0 to 1 by kdcache build, 2026-11-20T00:00:00Z to 2026-11-21T00:00:02Z" in text
    result = CliRunner().invoke(main, ["info", str(cache.path)])
    assert "by kdcache build --views 4" in result.output and "\x1b" not in result.output
    result = CliRunner().invoke(main, ["info", "--json", str(cache.path)])
    assert json.loads(result.output)["built"][0]["host"] == "anna's"
    (cache.path / "commits" / "v00001-p0001.json").write_text("{}")
    result = CliRunner().invoke(main, ["info", str(cache.path)])
    assert result.exit_code == 0 and "not readable" in result.output and cache.key in result.output
