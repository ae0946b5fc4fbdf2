"""Requests to a bucket go through the environment's proxy, and with them no credential comes to another host."""

import base64
import contextlib
import os
import socket
import urllib.request

import pytest
from click.testing import CliRunner

from kdcache.cache.errors import InputError, UnreadableError
from kdcache.cache.home import caches_folder, open_registry
from kdcache.cache.registry.kinds import network, relay
from kdcache.cli import main
from kdcache.pipeline.share import pull, push
from kdcache.tests.helpers.caches import Filled
from kdcache.tests.helpers.proxies import certificate, proxy, tls_server
from kdcache.tests.helpers.registries import about, quiet
from kdcache.tests.helpers.servers import answering, s3_server, send
from kdcache.tests.helpers.storedlogits import same_files

TOKEN = "IQoJb3JpZ2luX2VjEWatched0token"
THERE = {"ETag": '"x"'}


@pytest.fixture(autouse=True)
def _environment(monkeypatch, own_home, tmp_path):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "ASIAWATCHED0EXAMPLE", "AWS_SECRET_ACCESS_KEY": "watched/secret0",
        "AWS_SESSION_TOKEN": TOKEN, "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(network, "AT_FIRST", 0.0)
    monkeypatch.setattr(network, "PATIENCE", 0.0)
    network._store.cache_clear()
    yield
    network._store.cache_clear()


@pytest.fixture(scope="module")
def trusted(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("tls"), "bucket.example", "other.example")


@pytest.fixture
def over(monkeypatch, trusted):
    """A bucket by its scheme and what answers its requests, behind a proxy, as (the bucket's address, the proxy)."""

    @contextlib.contextmanager
    def serving(scheme, answer, user="", **options):
        with contextlib.ExitStack() as stack:
            if scheme == "https":
                port = stack.enter_context(tls_server(answer, trusted[1]))
            else:
                port = int(stack.enter_context(answering(answer)).rpartition(":")[2])
            gone_through = stack.enter_context(proxy(port, **options))
            monkeypatch.setenv("SSL_CERT_FILE", str(trusted[0]))
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"{scheme}://bucket.example")
            kind = "https" if options.get("tls") else "http"
            monkeypatch.setenv(f"{scheme}_proxy", f"{kind}://{user}127.0.0.1:{gone_through.port}")
            network._store.cache_clear()
            yield "s3://bucket/kd", gone_through

    return serving


def read(at):
    return open_registry(at).objects.read("x", 100)


def refused(at):
    with pytest.raises(UnreadableError) as caught:
        read(at)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_environments_proxy_is_gone_through_with_its_password(scheme, over):
    with over(scheme, lambda h, _: send(h, 200, b"there", **THERE), user="me:pa%40ss@") as (at, proxy):
        assert read(at) == read(at) == b"there"
        assert proxy.hosts == {"bucket.example"}
        lines = [line.split(": ")[1] for line in proxy.asked[0].split("\r\n") if line.lower().startswith("proxy-auth")]
        assert lines == [f"Basic {base64.b64encode(b'me:pa@ss').decode()}"]


def test_a_proxy_may_be_spoken_to_by_https_itself(over, trusted):
    answer = os.urandom(3_000_000)
    with over("https", lambda h, _: send(h, 200, answer, **THERE), tls=trusted[1]) as (at, proxy):
        assert open_registry(at).objects.read("x", 4_000_000) == answer
        assert proxy.hosts == {"bucket.example"}


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_session_token_goes_to_no_other_host(scheme, status, over):
    came = []

    def answer(handler, body):
        came.append(handler.headers["Host"])
        send(handler, status, Location=f"{scheme}://other.example/x")

    with over(scheme, answer) as (at, proxy):
        said = refused(at)
        assert "sends requests elsewhere, which is not followed" in said and "would be given the credentials" in said
        assert proxy.hosts == {"bucket.example"} and set(came) == {"bucket.example"}


def test_a_redirection_on_the_same_host_is_followed(over):
    def answer(handler, body):
        moved = "moved" in handler.path
        send(handler, 200, b"there", **THERE) if moved else send(handler, 307, Location="https://bucket.example/moved")

    with over("https", answer) as (at, _):
        assert read(at) == b"there"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "answers 403: ask who runs it, or name the server's host in NO_PROXY"),
        (407, "answers 407: a proxy on the way asks for credentials, which HTTPS_PROXY can hold"),
        (503, "answers 503 (1 tries"),
    ],
)
def test_what_the_proxy_answers_is_told(status, words, over):
    with over("https", lambda h, _: send(h, 200, b"there", **THERE), status=status) as (at, _):
        assert f"the environment's proxy (HTTPS_PROXY) {words}" in refused(at)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there(scheme, over, monkeypatch):
    # The socket takes a port that it does not listen on.
    with over(scheme, lambda h, _: send(h, 200, b"there", **THERE)) as (at, _), socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{held.getsockname()[1]}")
        network._store.cache_clear()
        assert "the environment's proxy (HTTPS_PROXY) cannot be reached" in refused(at)


def test_a_proxy_of_another_kind_is_refused(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(InputError, match=r"for https is one of socks5, .* HTTPS_PROXY, or add amazonaws.com to NO_P"):
        read("s3://bucket/kd")
    result = CliRunner().invoke(main, ["ls", "--registry", "s3://bucket/kd"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


@pytest.mark.parametrize("without", ["127.0.0.1", "127.0.0.0/8", "*", "10.0.0.0/8, 127.0.0.1"])
def test_what_no_proxy_names_is_reached_without_one(without, monkeypatch):
    """And no other host, by a redirection."""
    with answering(lambda h, _: send(h, 200, b"there", **THERE)) as address, proxy(1) as unused:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused.port}")
        monkeypatch.setenv("no_proxy", without)
        network._store.cache_clear()
        assert read("s3://bucket/kd") == b"there" and unused.asked == []
        elsewhere = address.replace("127.0.0.1", "localhost")
        with answering(lambda h, _: send(h, 307, Location=f"{elsewhere}/x")) as other:
            monkeypatch.setenv("AWS_ENDPOINT_URL", other)
            network._store.cache_clear()
            assert "sends requests elsewhere" in refused("s3://bucket/kd") and unused.asked == []


def test_the_relay_serves_only_who_has_its_password(over, monkeypatch):
    made = []
    monkeypatch.setattr(
        "kdcache.cache.registry.kinds.client.relay", lambda *asked: made.append(relay.relay(*asked)) or made[-1]
    )
    with over("http", lambda h, _: send(h, 200, b"there", **THERE)) as (at, proxy):
        read(at)
        seen = len(proxy.asked)
        address, port = made[0], int(made[0].rpartition(":")[2])
        for head in (
            b"GET http://bucket.example/ HTTP/1.1\r\n\r\n",
            b"x\r\n\r\n",
            b"\0" * 100_000,
            b"GET / HTTP/1.1\r\n",
        ):
            with socket.create_connection(("127.0.0.1", port)) as stranger, contextlib.suppress(ConnectionError):
                stranger.sendall(head)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(100) == b""
        assert len(proxy.asked) == seen
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": address}))
        assert opener.open("http://bucket.example/").read() == b"there"
        assert len(proxy.asked) == seen + 1


def test_a_cache_is_pushed_and_pulled_through_a_proxy(monkeypatch, tmp_path):
    mine = Filled(caches_folder() / about().key, about()).cache
    with s3_server() as address, proxy(int(address.rpartition(":")[2])) as gone_through:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{gone_through.port}")
        network._store.cache_clear()
        push(mine.path, "s3://shared/kd", say=quiet)
        pull(mine.key, "s3://shared/kd", out=str(tmp_path / "theirs"), say=quiet)
        assert len(gone_through.asked) > 5 and gone_through.hosts == {"localhost"}
    for folder in ("views", "commits"):
        assert same_files(mine.path / folder, tmp_path / "theirs" / folder)
