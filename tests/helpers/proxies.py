"""A proxy on loopback, and servers whose certificate a client can be told to trust."""

import contextlib
import datetime
import http.server
import ipaddress
import selectors
import socket
import socketserver
import ssl
import threading
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Proxy:
    """It takes every host for the server at `target`, whatever its name. asked: the head of each connection.

    status: what CONNECT is answered. tls: an ssl.SSLContext, for a proxy that is itself spoken to by https.
    """

    def __init__(self, target, status=200, tls=None):
        self.asked = []
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                proxy._serve(self.request)

        self._target, self._status = target, status
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def hosts(self):
        """The hosts that were asked for."""
        return {urlsplit(t if "://" in t else f"//{t}").hostname for t in (h.split()[1] for h in self.asked)}

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, client):
        head = b""
        while b"\r\n\r\n" not in head:
            if not (piece := client.recv(1 << 16)):
                return
            head += piece
        self.asked.append(head.decode("latin-1"))
        method, target, version = head.split(b"\r\n")[0].split(b" ")
        with contextlib.closing(socket.create_connection(("127.0.0.1", self._target))) as there:
            if method == b"CONNECT":
                client.sendall(b"HTTP/1.1 %d So\r\nX: y\r\n\r\n" % self._status)
                if self._status != 200:
                    return
            else:
                address = urlsplit(target)
                asked = address.path + (b"?" + address.query if address.query else b"")
                there.sendall(b" ".join([method, asked or b"/", version]) + head[head.index(b"\r\n") :])
            with contextlib.suppress(OSError):
                _pass_on(client, there)


def _pass_on(client, there):
    with selectors.DefaultSelector() as waiting:
        waiting.register(client, selectors.EVENT_READ, there)
        waiting.register(there, selectors.EVENT_READ, client)
        while True:
            for key, _ in waiting.select():
                more = True
                while more:
                    if not (piece := key.fileobj.recv(1 << 16)):
                        return
                    key.data.sendall(piece)
                    more = isinstance(key.fileobj, ssl.SSLSocket) and key.fileobj.pending()


@contextlib.contextmanager
def proxy(target, **options):
    """A Proxy to the server on a port."""
    one = Proxy(target, **options)
    try:
        yield one
    finally:
        one.close()


def certificate(folder, *names):
    """A certificate for these hosts that is its own authority, as (the file of it, an ssl.SSLContext of a server)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kdcache tests")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([*map(x509.DNSName, names), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path = folder / "certificate.pem"
    path.write_bytes(made.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, folder / "key.pem")
    return path, context


@contextlib.contextmanager
def tls_server(answer, context):
    """A server of https whose requests `answer(handler, body)` answers; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
