"""Credentials, and what a server answers, are part of no message, file or error."""

import contextlib
import shlex
import traceback

import pytest
from click.testing import CliRunner

from kdcache.cache import open_cache
from kdcache.cache.errors import KdcacheError
from kdcache.cache.home import caches_folder, home, open_registry
from kdcache.cache.registry.kinds import network
from kdcache.cache.secrecy import hide, remember
from kdcache.cli import main
from kdcache.pipeline.share import pull, push
from kdcache.tests.helpers.building import TOY
from kdcache.tests.helpers.caches import Filled
from kdcache.tests.helpers.registries import about, quiet
from kdcache.tests.helpers.servers import answering, send

TOKEN = "IQoJb3JpZ2luX2VjEWatched0token/with+signs==" * 3
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "ASIAWATCHED0EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/watched/secret0",
    "AWS_SESSION_TOKEN": TOKEN,
}
SECRETS = (*CREDENTIALS.values(), TOKEN[:24], "PASSWORD0", "SIGNATURE0")
BODY = (
    f"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>{TOKEN} has expired</Message>"
    f"<Token-0>{TOKEN}</Token-0><A>{CREDENTIALS['AWS_SECRET_ACCESS_KEY']}</A></Error>"
).encode()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch, own_home, one_thread, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/kd_toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name, value in {**CREDENTIALS, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(network, "AT_FIRST", 0.0)
    network._store.cache_clear()
    yield
    network._store.cache_clear()


@pytest.fixture
def mine():
    identity = about()
    return Filled(caches_folder() / identity.key, identity).cache


@contextlib.contextmanager
def bucket_of(answer, monkeypatch):
    with answering(answer) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        network._store.cache_clear()
        yield "s3://bucket/kd"


def require_untold(text):
    found = [secret for secret in SECRETS if secret in text]
    assert not found, text


def everything(error):
    """All that an error holds: its text, what it came from, and its traceback."""
    texts = traceback.format_exception(error)
    while error is not None:
        texts += [str(error), repr(error.args)]
        error = error.__cause__ or error.__context__
    return "".join(texts)


def told(line):
    """What a command says, with its error, which must be one line; nothing of it may be a secret."""
    result = CliRunner().invoke(main, shlex.split(line))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, (line, result.output, result.exception)
    require_untold(result.output)
    if result.exc_info is not None:
        require_untold("".join(traceback.format_exception(*result.exc_info)))
    return result.output


def require_clean_files(*tops):
    for path in (path for top in tops for path in top.rglob("*") if path.is_file()):
        require_untold(path.read_bytes().decode(errors="replace"))


COMMANDS = {
    "push": "push {key} --registry {at}",
    "pull": "pull {other} --registry {at}",
    "ls": "ls --registry {at}",
    "info": "info {at}/caches/{other}",
    "verify": "verify {other} --registry {at} --depth contents",
    "rm": "rm {other} --registry {at} --yes",
    "gc": "gc --registry {at}",
    "train": "train --loss nkd --cache {other} --registry {at} --data kd_toy:images --student kd_toy:net --out run",
    "build": "build --teacher kd_toy:net --data kd_toy:images --push --registry {at}",
}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 500, 503])
def test_nothing_of_an_answer_is_told_by_any_command(status, mine, tmp_path, monkeypatch):
    with bucket_of(lambda handler, body: send(handler, status, BODY), monkeypatch) as at:
        for line in COMMANDS.values():
            said = told(line.format(at=at, key=mine.key, other="a" * 64))
            if status in (400, 403):
                assert f"{status} (ExpiredToken): the credentials have expired: get new" in said
        for call in (
            lambda: push(mine.path, at, say=quiet),
            lambda: pull("a" * 64, at, say=quiet),
            lambda: open_cache("a" * 64, at),
            lambda: open_registry(at).objects.replace("x", b""),
            lambda: open_registry(at).objects.remove(["x"]),
        ):
            with pytest.raises(KdcacheError) as caught:
                call()
            require_untold(everything(caught.value))
    require_clean_files(home(), tmp_path)


def test_what_an_answer_holds_where_it_is_taken_for_a_file_is_not_told(mine, monkeypatch):
    """With status 200 it is parsed, and refused; the parser's own error would quote it."""
    bodies = (BODY, b'{"%s": 1}' % TOKEN.encode(), b'{"format": "%s"}' % TOKEN.encode(), TOKEN.encode())
    for body in bodies:
        with bucket_of(lambda handler, _, body=body: send(handler, 200, body, ETag='"x"'), monkeypatch) as at:
            with pytest.raises(KdcacheError) as caught:
                open_registry(at).open("a" * 64)
            require_untold(everything(caught.value))
            with pytest.raises(KdcacheError) as caught:
                open_registry(at).find("nm")
            require_untold(everything(caught.value))


def test_addresses_are_refused_without_their_secrets(mine, tmp_path):
    """Wherever an address, a name or a path can be given."""
    addresses = (
        "https://me:PASSWORD0@127.0.0.1:9/kd", "https://me:PASSWORD0/with@all@127.0.0.1:9/kd",
        "https://127.0.0.1:9/kd?sig=SIGNATURE0", "s3://PASSWORD0@bucket/kd", "https://127.0.0.1:9/kd#SIGNATURE0",
        "ftp://me:PASSWORD0@host/kd", "https://[PASSWORD0@x?sig=SIGNATURE0",
    )  # fmt: skip
    for at in addresses:
        for line in COMMANDS.values():
            said = told(line.format(at=at, key=mine.key, other="a" * 64))
            assert "an address must not hold a user, password, token or query" in said or "no address" in said
    for what in (*addresses, "https://127.0.0.1:9/kd/names/nm?sig=SIGNATURE0", "names/nm?sig=SIGNATURE0"):
        for line in (
            "info",
            "pull",
            "verify --depth contents",
            "rm --yes",
            "train --loss nkd --cache",
            "pack --to hdf5 --out c.h5",
        ):
            told(f"{line} '{what}'")
    (tmp_path / "kdcache.toml").write_text('registry = "https://me:PASSWORD0@127.0.0.1:9/kd"\n')
    result = CliRunner().invoke(main, ["ls", "--verbose"])
    require_untold(result.output)
    twice = "ls --registry https://a:PASSWORD0@h/x --registry https://h/x?sig=SIGNATURE0"
    result = CliRunner().invoke(main, twice.split())
    assert "is given twice: https://***@h/x and https://h/x?***" in result.output
    require_untold(result.output)
    (tmp_path / "kdcache.toml").unlink()
    require_clean_files(home(), tmp_path)


def test_the_session_token_goes_to_no_other_host(mine, monkeypatch):
    came = []

    def elsewhere(handler, body):
        came.append(dict(handler.headers))
        send(handler, 200, b"{}", ETag='"x"')

    with answering(elsewhere) as other:
        other = other.replace("127.0.0.1", "localhost")
        for status in (301, 302, 303, 307, 308):
            with bucket_of(lambda h, _, s=status: send(h, s, Location=f"{other}/x?t={TOKEN}"), monkeypatch) as at:
                for line in (f"pull {'a' * 64} --registry {at}", f"push {mine.key} --registry {at}"):
                    assert "sends requests elsewhere, which is not followed" in told(line)
    assert came == []


def test_a_redirection_on_the_same_host_is_followed(monkeypatch):
    def answer(handler, body):
        if "moved" in handler.path:
            return send(handler, 200, b"there", ETag='"x"')
        send(handler, 307, Location="/moved")

    with bucket_of(answer, monkeypatch) as at:
        assert open_registry(at).objects.read("x", 100) == b"there"


def test_profiles_are_known_and_their_trouble_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("boto3", reason="the extra s3 is not installed")
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    (tmp_path / "aws").write_text(
        "[default]\naws_access_key_id = AKIAPROFILE0WATCHED\naws_secret_access_key = PROFILE0/secret\n"
        "aws_session_token = PROFILE0token\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws"))
    with bucket_of(lambda h, _: send(h, 403, b"<Code>AccessDenied</Code>PROFILE0token"), monkeypatch) as at:
        assert "403 (AccessDenied): the credentials do not allow this" in told(f"ls --registry {at}")
        assert hide("PROFILE0/secret, PROFILE0token") == "***, ***"
    monkeypatch.setenv("AWS_PROFILE", "absent")
    network._store.cache_clear()
    assert "(ProfileNotFound): check AWS_PROFILE" in told("ls --registry s3://bucket/kd")


def test_a_reason_that_is_a_part_of_a_credential_is_not_told(monkeypatch):
    for code, words in (
        ("AccessDenied", "403 (AccessDenied)"),
        ("IQoJ", "the server answers 403:"),
        (TOKEN, "answers 403:"),
    ):
        body = f"<Error><Code>{code}</Code></Error>".encode()
        with bucket_of(lambda handler, _, body=body: send(handler, 403, body), monkeypatch) as at:
            assert words in told(f"ls --registry {at}")


def test_hide_knows_secrets_as_they_may_stand_in_a_text():
    environment = {
        "HF_TOKEN": "hf_abcdefgh", "AZURE_STORAGE_ACCOUNT_KEY": "key/with==", "MY_SAS": "sv=2024&sig=xyz",
        "HTTPS_PROXY": "http://me:pa55word@proxy:3128", "DATABASE_PASSWORD": "short",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/usr/bin",
    }  # fmt: skip
    text = "hf_abcdefgh key/with== key%2Fwith%3D%3D sv=2024&sig=xyz pa55word short /usr/bin s3://bucket/a@b"
    assert hide(text, environment) == "*** *** *** *** *** short /usr/bin s3://bucket/a@b"
    assert hide("at http://h:8080/a@b: what?", {}) == "at http://h:8080/a@b: what?"
    assert hide("'https://a:b/c@h/x?y=z#w', n/m?sig=T ok?", {}) == "'https://***@h/x?***', n/m?*** ok?"
    for spec in ("hf:a/b?label=fine", "hf:x?config=c&image=i", "'hf:x?image=i'", "?config=NAME takes one of a, b"):
        assert hide(spec, {}) == spec
    assert hide("hf:x?label=a&sig=T hf://x?label=T", {}) == "hf:x?*** hf://x?***"
    remember("remembered0", None, "")
    assert hide("a remembered0 b", {}) == "a *** b"
