"""By what a request over a network failed: whether asking again helps, and what may be told of it.

obstore's errors hold the server's whole answer. A credential may stand in it, as in S3's answer to a token that has
expired, and anything else in that of a server that is not what it seems. So of an answer nothing is told but its status
and, where it is one plain word, the server's reason (<Code>).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from obstore import exceptions as oe

from kdcache.cache.registry.kinds.client import NOWHERE
from kdcache.cache.registry.kinds.relay import ELSEWHERE, UNREACHABLE, last_refusal
from kdcache.cache.secrecy import hide, is_part_of_one

Kind = Literal["missing", "no bucket", "final", "garbled", "passing"]

# An answer begins after the first of these that obstore writes; what is before it names our own request.
_ANSWER = re.compile(r"Server returned (?:non-2xx status code: (?P<status>\d{3})|error response)")
_CODE = re.compile(r"<Code>([A-Za-z]{2,40})</Code>|\(code: ([A-Za-z]{2,40})\)")
_OF_A_MACHINE = re.compile(r"Error performing [A-Z]+ http://169\.254\.")
_STATUS_OF: dict[type[Exception], int] = {
    oe.AlreadyExistsError: 409, oe.PreconditionError: 412, oe.NotModifiedError: 304,
    oe.PermissionDeniedError: 403, oe.UnauthenticatedError: 401,
}  # fmt: skip

# What the server may do otherwise a moment later: the request took too long, too many came, the server is in trouble.
_PASSING = {408, 421, 425, 429, 500, 502, 503, 504, *range(520, 531)}
_PASSING_CODES = {
    "RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "ServerBusy", "OperationTimedOut",
    "OperationAborted", "ConditionalRequestConflict",
}  # fmt: skip
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}

_RENEW = "get new credentials, then run the same command again, which goes on where it stopped"
_REGION = "the bucket lies in another region: set AWS_REGION"
_UNKNOWN = "the server does not know these credentials: check the variables AWS_... or the profile"
_ADVICE = {
    "ExpiredToken": f"the credentials have expired: {_RENEW}",
    "ExpiredTokenException": f"the credentials have expired: {_RENEW}",
    "RequestExpired": f"the credentials have expired: {_RENEW}",
    "TokenRefreshRequired": f"the credentials have expired: {_RENEW}",
    "InvalidToken": _UNKNOWN,
    "InvalidAccessKeyId": _UNKNOWN,
    "SignatureDoesNotMatch": _UNKNOWN,
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}
_ELSEWHERE = (
    "the server sends requests elsewhere, which is not followed: set AWS_ENDPOINT_URL and AWS_REGION for the bucket"
)
_AWAY = f"{_ELSEWHERE}; another host would be given the credentials"
_BY_STATUS = {
    401: "the credentials do not allow this",
    403: "the credentials do not allow this",
    407: "a proxy on the way asks for credentials, which HTTPS_PROXY can hold",
    507: "the server has no space left",
    511: "a network on the way asks you to log in first",
}
# What obstore says of the connection and of the form of an answer, in the order in which they are looked for. None of
# it is of the server's words. The last of all is how every error of a connection begins.
_CONNECTION: tuple[tuple[str, Kind, str], ...] = (
    ("Content-Length Header missing", "final", "the server does not tell how long its answers are (Content-Length)"),
    ("Header missing from response", "final", "the server's answer lacks a header"),
    (f" {NOWHERE},", "final", _AWAY),
    ("without LOCATION", "final", f"the server sends requests elsewhere without saying where; perhaps {_REGION}"),
    ("TooManyRedirects", "final", "the server sends requests from one address to the next without end"),
    ("error following redirect", "final", "the server sends requests to an address that is not followed"),
    ("InvalidCertificate", "final", "the server's certificate is not one that this machine trusts"),
    ("failed to lookup address", "passing", "the name of the host cannot be looked up"),
    ("Connection refused", "passing", "the connection was refused"),
    ("Network is unreachable", "passing", "the network is unreachable"),
    ("No route to host", "passing", "there is no route to the host"),
    ("TimedOut", "passing", "there was no answer in time"),
    ("HTTP error:", "passing", "the connection broke off"),
)
_NO_TUNNEL = "TunnelUnsuccessful"  # all that is told of a proxy that makes no connection
_DUMP = "\n\nDebug source:"  # by which obstore's own errors end


class Failure(NamedTuple):
    """By what a request failed.

    kind: whether the object or the bucket is missing, asking again is in vain, the answer makes no sense, or the
    trouble may pass. reason: what it was, for people.
    """

    kind: Kind
    reason: str


def failure(e: Exception) -> Failure:
    """What is to be told of an error from a request, and done about it."""
    text = str(e)
    if _OF_A_MACHINE.search(text):
        # Without credentials obstore asks for those of a machine in a cloud, and this one has none.
        return Failure("final", "no credentials were found (see docs/sharing.md)")
    answer = _ANSWER.search(text)
    status = next((s for kind, s in _STATUS_OF.items() if isinstance(e, kind)), None)
    status = int(answer["status"]) if answer and answer["status"] else status
    found = _CODE.search(text, answer.end() if answer else 0) if answer or "(code: " in text else None
    code = found[1] or found[2] if found else None
    code = None if code is None or is_part_of_one(code) else code
    if status in (404, 410) or (isinstance(e, FileNotFoundError) and status is None):
        return Failure("no bucket" if code in _NO_BUCKET else "missing", "")
    if status is not None or code is not None:
        return _of_answer(status, code)
    return _of_connection(e, text)


def _of_answer(status: int | None, code: str | None) -> Failure:
    if code in (ELSEWHERE, UNREACHABLE):
        return _of_proxy(code)
    said = " ".join([*([str(status)] if status else ()), *([f"({code})" if status else code] if code else ())])
    if code in _PASSING_CODES or (status in _PASSING and code not in _ADVICE):
        return Failure("passing", f"the server answers {said}")
    usual = _ELSEWHERE if status and 300 <= status < 400 else "asking again does not help"
    advice = _ADVICE.get(code or "") or _BY_STATUS.get(status or 0) or usual
    return Failure("final", f"the server answers {said}: {advice}")


def _of_connection(e: Exception, text: str) -> Failure:
    if isinstance(e, ValueError | oe.InvalidPathError | oe.NotSupportedError | oe.UnknownConfigurationKeyError):
        return Failure("final", "the request is none that this kind of server takes")
    if isinstance(e, OSError) and e.strerror:
        return Failure("passing", e.strerror)
    if _NO_TUNNEL in text:
        return _of_proxy(last_refusal())
    for words, kind, reason in _CONNECTION:
        if words in text:
            return Failure(kind, reason)
    if _DUMP in text:
        return Failure("garbled", "the server's answer makes no sense")
    lines = [line.strip() for line in hide(text).splitlines() if line.strip()]
    return Failure("passing", (lines[0] if lines else type(e).__name__)[:300])


def _of_proxy(reason: str | None) -> Failure:
    """By what a proxy of the environment made no connection; reason: as last_refusal gives it."""
    if reason == ELSEWHERE:
        return Failure("final", _AWAY)
    if reason == UNREACHABLE:
        return Failure("passing", "the environment's proxy (HTTPS_PROXY) cannot be reached")
    if reason is None:
        return Failure("passing", "the environment's proxy (HTTPS_PROXY) makes no connection to the server")
    if int(reason) in _PASSING:
        return Failure("passing", f"the environment's proxy (HTTPS_PROXY) answers {reason}")
    advice = _BY_STATUS[407] if reason == "407" else "ask who runs it, or name the server's host in NO_PROXY"
    return Failure("final", f"the environment's proxy (HTTPS_PROXY) answers {reason}: {advice}")
