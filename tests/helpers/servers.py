"""Servers on loopback that stand for a team's: S3, and the web."""

import contextlib
import functools
import http.client
import http.server
import itertools
import random
import socket
import struct
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kdcache.cache.registry.kinds import network


def one_at_a_time(put):
    """moto looks whether an object exists and then creates it; in S3 this is one step, which nothing comes between."""
    lock = threading.Lock()

    def locked(*args, **options):
        with lock:
            return put(*args, **options)

    return locked


@contextlib.contextmanager
def s3_server(buckets=("shared",)):
    """moto's server, an S3 peer on loopback; its address."""
    from moto import backends  # slow, and few need it
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "s3cr3t",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": address,
        }.items():
            patch.setenv(name, value)
        patch.setattr(S3Response, "put_object", one_at_a_time(S3Response.put_object))
        services = list(backends.list_of_moto_modules())  # which takes a third of each request's time
        patch.setattr(backends, "list_of_moto_modules", lambda: services)
        network._store.cache_clear()
        for bucket in buckets:
            urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")).close()
        try:
            yield address
        finally:
            server.stop()
            server._server.server_close()
            network._store.cache_clear()


class Files(http.server.SimpleHTTPRequestHandler):
    """Python's own web server, which knows no ranges."""

    def log_message(self, *args):
        pass

    def list_directory(self, path):
        self.send_error(404)


class Ranges(Files):
    """The same with ranges, as nginx has them."""

    def do_GET(self):
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if asked is None or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


def web_server(folder, handler=Files):
    """A server of a folder's files; its address."""
    return _serving(functools.partial(handler, directory=str(folder)))


@contextlib.contextmanager
def _serving(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Faulty:
    """A proxy to a server that spoils a share of the requests. kinds: how often each fault was injected.

    content: whether bytes are spoilt too, and not connections alone.
    """

    def __init__(self, target, share, seed=0, content=True):
        self.kinds: dict[str, int] = {}
        self._content = content
        self._target, self._share = urlsplit(target).netloc, share
        self._turns = itertools.count(), itertools.count()
        self._rng, self._lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                proxy._serve(self)

            do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def _choose(self, method):
        with self._lock:
            if self._rng.random() > self._share:
                return None
            # A changed upload is the server's to refuse: the signature has its digest, which moto does not look at.
            kinds = ["reset", "busy", "lost"] + (
                ["short", "wrong", "slow"] if method == "GET" and self._content else []
            )
            turn = self._turns[method == "GET"]
            kind = kinds[next(turn) % len(kinds)]
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            return kind

    def _serve(self, handler):
        kind = self._choose(handler.command)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if kind == "reset":
            return self._reset(handler)
        if kind == "busy":
            handler.send_response(503)
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        upstream = http.client.HTTPConnection(self._target, timeout=30)
        upstream.request(handler.command, handler.path, body, dict(handler.headers))
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if kind == "lost":  # done, and nobody hears of it
            return self._reset(handler)
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date", "content-length"):
                handler.send_header(name, value)
        given = answer.getheader("Content-Length")
        handler.send_header("Content-Length", given if handler.command == "HEAD" and given else str(len(content)))
        handler.end_headers()
        if kind == "short" and content:
            handler.wfile.write(content[: len(content) // 2])
            return self._reset(handler)
        if kind == "wrong" and content and answer.status == 200:
            at = self._rng.randrange(len(content))
            content = content[:at] + bytes([content[at] ^ 1 << self._rng.randrange(8)]) + content[at + 1 :]
        if kind == "slow":
            half = len(content) // 2
            handler.wfile.write(content[:half])
            handler.wfile.flush()
            time.sleep(0.02)
            content = content[half:]
        if handler.command != "HEAD":
            handler.wfile.write(content)

    def _reset(self, handler):
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True


@contextlib.contextmanager
def faulty(target, share=0.25, seed=0, content=True):
    proxy = Faulty(target, share, seed, content)
    try:
        # As many wrong answers in a row as chance never gives: elsewhere they are damage that stays.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network, "_WRONG_AT_MOST", 12)
            yield proxy
    finally:
        proxy.close()


def answering(answer):
    """A server that has `answer(handler, body)` answer every request of any method; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet: else the second waits for 40 ms

        def log_message(self, *args):
            pass

        def do_GET(self):
            answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    return _serving(Handler)


def send(handler, status, body=b"", **headers):
    """An answer with its length and these headers, whose names have _ for -."""
    handler.send_response(status)
    for name, value in {"Content-Length": len(body), "Last-Modified": handler.date_time_string(), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
