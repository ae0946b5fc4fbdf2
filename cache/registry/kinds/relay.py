"""A proxy on this machine that hands requests to some hosts on to the environment's proxy, and refuses all others.

It keeps an HTTP client that follows every redirection to the hosts that may be given its credentials. What goes through
is not looked into, save the head of a connection's first request, which for https is CONNECT.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
import secrets
import ssl
import threading
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from kdcache.cache.secrecy import remember

ELSEWHERE = "SentElsewhere"
UNREACHABLE = "ProxyUnreachable"
_END = b"\r\n\r\n"
_PATIENCE = 10.0  # seconds for a head to come, and for a connection to the proxy
_PIECE = 1 << 18
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})\b")
_PORTS = {"http": 80, "https": 443}
_last_refusal = deque[str](maxlen=1)


class _Refused(Exception):
    """That a request does not go on; its argument is the reason."""


class _Request(NamedTuple):
    host: str
    scheme: str
    lines: list[str]

    @property
    def is_tunnel(self) -> bool:
        return self.scheme == "https"


def relay(hosts: Iterable[str], proxies: Mapping[str, str]) -> str:
    """The address of a relay that serves this process until it ends. The address holds the password that it asks for.

    hosts: those that requests may go to, and all whose names end in one of them after a dot. proxies: by scheme (http,
    https, or all for both) the address of the proxy that requests are handed to, as urllib's getproxies gives them.
    """
    word = secrets.token_urlsafe()
    remember(word)
    port = Future[int]()
    serving = _serve(frozenset(hosts), proxies, _basic(f"kdcache:{word}"), port)
    threading.Thread(target=asyncio.run, args=(serving,), name="kdcache-relay", daemon=True).start()
    return f"http://kdcache:{word}@127.0.0.1:{port.result()}"


def last_refusal() -> str | None:
    """Why a relay of this process made no connection for the last request for which it made none.

    ELSEWHERE, UNREACHABLE, or the status of the proxy's answer (407). A client tells nothing of it.
    """
    return _last_refusal[0] if _last_refusal else None


def is_below(host: str, hosts: Iterable[str]) -> bool:
    """Whether a host is one of these, or its name ends in one of them after a dot."""
    return any(host == one or host.endswith(f".{one}") for one in hosts)


async def _serve(hosts: frozenset[str], proxies: Mapping[str, str], password: str, port: Future[int]) -> None:
    async def connected(client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        try:
            request = _read(await asyncio.wait_for(client.readuntil(_END), _PATIENCE), hosts, password)
            proxy = proxies.get(request.scheme) or proxies.get("all")
            if proxy is None:
                raise _Refused(ELSEWHERE)
            await _carry(request, client, answers, urlsplit(proxy if "://" in proxy else f"http://{proxy}"))
        except _Refused as refused:
            reason = str(refused)
            _last_refusal.append(reason)
            body = f"<Error><Code>{reason}</Code></Error>"
            status = "502 Bad Gateway" if reason == UNREACHABLE else "403 Forbidden"
            answers.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):
            pass  # one side is gone, speaks no HTTP or has no password: the client sees a closed connection
        finally:
            answers.close()

    try:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
    except OSError as e:
        port.set_exception(e)
        return
    port.set_result(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _read(head: bytes, hosts: Iterable[str], password: str) -> _Request:
    """The request that a head belongs to. Its lines are those for the proxy, without the relay's password."""
    first, *fields = head.removesuffix(_END).decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    address = urlsplit(f"https://{target}" if method == "CONNECT" else target)
    named = [(field.partition(":")[0].lower(), field) for field in fields]
    request = _Request(address.hostname or "", address.scheme, [first])
    if not is_below(request.host, hosts):
        raise _Refused(ELSEWHERE)  # before the password, which a client may leave out where it was redirected
    given = "".join(field.partition(":")[2].strip() for name, field in named if name == "proxy-authorization")
    if not hmac.compare_digest(given.encode(), password.encode()):
        raise ValueError("not a request of this process")
    request.lines.extend(field for name, field in named if name != "proxy-authorization")
    # Where it is no tunnel, a second request on the connection could go to another host.
    return request if request.is_tunnel else request._replace(lines=_closing(request.lines))


def _closing(lines: list[str]) -> list[str]:
    """A head by which the connection ends after one answer."""
    return [*(one for one in lines if not one.lower().startswith("connection:")), "Connection: close"]


async def _carry(
    request: _Request, client: asyncio.StreamReader, answers: asyncio.StreamWriter, proxy: SplitResult
) -> None:
    tls = ssl.create_default_context() if proxy.scheme == "https" else None
    opening = asyncio.open_connection(proxy.hostname, proxy.port or _PORTS[proxy.scheme], ssl=tls)
    try:
        there, onward = await asyncio.wait_for(opening, _PATIENCE)
    except OSError:
        raise _Refused(UNREACHABLE) from None
    try:
        lines = [*request.lines]
        if proxy.username is not None:
            user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            lines.append(f"Proxy-Authorization: {_basic(user)}")
        onward.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        if request.is_tunnel:
            answer = await there.readuntil(_END)
            if (found := _STATUS.match(answer)) is None or not found[1].startswith(b"2"):
                raise _Refused(found[1].decode() if found else UNREACHABLE)
            answers.write(answer)
        await _both_ways(_copy(client, onward), (_copy if request.is_tunnel else _copy_last)(there, answers))
    finally:
        onward.close()


async def _both_ways(*copies: Coroutine[Any, Any, None]) -> None:
    """Run until one of them ends, which is when one side has closed its connection."""
    tasks = [asyncio.ensure_future(copy) for copy in copies]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while piece := await source.read(_PIECE):
        sink.write(piece)
        await sink.drain()


async def _copy_last(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copy an answer that says that it is the connection's last."""
    head = (await source.readuntil(_END)).removesuffix(_END).decode("latin-1")
    sink.write("\r\n".join([*_closing(head.split("\r\n")), "", ""]).encode("latin-1"))
    await _copy(source, sink)


def _basic(user: str) -> str:
    return f"Basic {base64.b64encode(user.encode()).decode()}"
