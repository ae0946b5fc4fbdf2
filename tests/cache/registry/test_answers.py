"""What is done about each answer of a server: final ones end a command at once, and wrong ones are not kept."""

import re
import time
from pathlib import Path

import pytest

from kdcache.cache.errors import NotFoundError, UnreadableError
from kdcache.cache.home import open_registry
from kdcache.cache.registry.kinds import network
from kdcache.pipeline.share import push
from kdcache.tests.helpers.caches import Filled
from kdcache.tests.helpers.places import ROOT
from kdcache.tests.helpers.registries import about, quiet, refused
from kdcache.tests.helpers.servers import Files, answering, send, web_server

pytestmark = pytest.mark.usefixtures("own_home", "no_fsync", "one_thread")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A cache with 2 views: not to be changed."""
    return Filled(tmp_path_factory.mktemp("toy") / "c", about(), views=2)


# ---- by status ----


def table():
    """The statuses of docs/sharing.md, and what is done about each."""
    text = (ROOT / "docs/sharing.md").read_text().partition("## Answers of a server")[2]
    rows = re.findall(r"^\| ([\d, to]+)(?:, with [^|]*)? \| (missing|final|repeated)", text, re.MULTILINE)
    found = {}
    for statuses, done in rows:
        for one in statuses.split(", "):
            first, _, last = one.partition(" to ")
            found.update(dict.fromkeys(range(int(first), int(last or first) + 1), done))
    return found


STATUSES = table()
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "s3cr3t", "AWS_REGION": "us-east-1"}


@pytest.fixture
def waits(monkeypatch):
    """The pauses before a request was repeated; after a few, requests are given up."""
    found = []

    def wait(seconds):
        found.append(seconds)
        if len(found) == 3:
            monkeypatch.setattr(network, "AT_FIRST", -1.0)

    monkeypatch.setattr(network.time, "sleep", wait)
    return found


@pytest.mark.parametrize("kind", ["web", "bucket"])
def test_each_status_of_the_table(kind, waits, monkeypatch):
    assert len(STATUSES) > 50
    status = None
    with answering(lambda handler, _: send(handler, status, b"<Error/>")) as address:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        network._store.cache_clear()
        for status, done in STATUSES.items():
            monkeypatch.setattr(network, "AT_FIRST", 15.0)
            waits.clear()
            objects = open_registry("s3://bucket/kd" if kind == "bucket" else address).objects
            with pytest.raises(NotFoundError if done == "missing" else UnreadableError) as caught:
                objects.read("x", 100)
            assert bool(waits) == (done == "repeated"), (status, str(caught.value))
            if done != "missing":
                assert f"the server answers {status}" in str(caught.value)
    network._store.cache_clear()


def test_what_is_no_clear_answer_ends_soon(waits):
    def chunked(handler, body):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"2\r\n{}\r\n0\r\n\r\n")

    def elsewhere(handler, body):
        send(handler, 301)

    def around(handler, body):
        send(handler, 302, Location=handler.path)

    for answer, words in (
        (chunked, "does not tell how long its answers are (Content-Length)"),
        (elsewhere, "sends requests elsewhere without saying where"),
        (around, "from one address to the next without end"),
    ):
        with answering(answer) as address:
            start = time.monotonic()
            refused(f"pull {'a' * 64} --registry {address}", words)
            assert time.monotonic() - start < 2 and not waits


def test_a_server_that_has_an_answer_to_everything_is_refused(toy, tmp_path):
    class Everything(Files):
        def send_head(self):
            if not Path(self.translate_path(self.path)).exists():
                self.path = "/page.html"
            return super().send_head()

    push(toy.cache.path, str(tmp_path / "shared"), say=quiet)
    (tmp_path / "shared/page.html").write_text("<html>there is no such page</html>")
    with web_server(tmp_path / "shared", Everything) as address:
        for line in (f"pull {toy.cache.key}", f"info {toy.cache.key}", f"verify --depth contents {toy.cache.key}"):
            refused(f"{line} --registry {address}", "answers 200 for files that do not exist")
        refused(f"pull {'a' * 64} --registry {address}", "is not valid JSON")
        refused(f"pull nm --registry {address}", "is not valid JSON")


def test_a_commit_that_somebody_writes_right_now_is_waited_for(waits, monkeypatch):
    """S3 answers 409 for an object that two create at once."""
    answers = [409, 409, 200]

    def answer(handler, body):
        send(handler, answers.pop(0), b"<Error><Code>ConditionalRequestConflict</Code></Error>", ETag='"x"')

    with answering(answer) as address:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "s3cr3t",
            "AWS_ENDPOINT_URL": address,
        }.items():
            monkeypatch.setenv(name, value)
        network._store.cache_clear()
        assert open_registry("s3://bucket/kd").objects.create("x", b"data") and len(waits) == 2
    network._store.cache_clear()
