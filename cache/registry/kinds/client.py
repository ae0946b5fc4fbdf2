"""obstore's stores for addresses: with which credentials, for how long they wait, and where they may not go."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from obstore import exceptions as oe
from obstore.store import ObjectStore, from_url

from kdcache.cache.errors import InputError
from kdcache.cache.registry.kinds.relay import is_below, relay
from kdcache.cache.secrecy import remember

# A stalled connection is given up after read_timeout. A whole request may take long, since a chunk may have 2 GB.
_CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h"}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# Where a machine or a container of Amazon's asks for its credentials; and the service that hands some out.
_MACHINE = ("169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23")
_MORE = ("AWS_ENDPOINT_URL_STS", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_METADATA_ENDPOINT")
_AMAZON = "amazonaws.com"
NOWHERE = "127.0.0.1:0"  # a port that nothing can listen on


@cache
def first_process() -> int:
    """The process that was the first to call this."""
    return os.getpid()


@cache
def store(url: str) -> ObjectStore:
    """What reads and writes below an address. InputError where it cannot be made."""
    # No redirection may lead from https to http; a bucket's endpoint within a building may have plain http.
    plain = url.startswith("http://")
    options: dict[str, Any] = {"retry_config": {"max_retries": 0}}
    client: dict[str, Any] = {**_CLIENT}
    if url.startswith("s3://"):
        endpoints = [os.environ[name] for name in _ENDPOINTS if os.environ.get(name)]
        plain = any(endpoint.startswith("http://") for endpoint in endpoints)
        options |= _profile()
        client |= _fence(endpoints)
    elif not url.startswith(("http://", "https://")):
        plain = True
    options["client_options"] = {**client, "allow_http": plain}
    try:
        return from_url(url, **options)
    except (oe.BaseError, ValueError) as e:
        problem = type(e).__name__
    raise InputError(f"{url} cannot be opened ({problem}): check the address and the variables of docs/sharing.md")


def _fence(endpoints: list[str]) -> dict[str, str]:
    """Options by which no request comes to another host than the bucket's and those that hand out credentials.

    A request that a server redirects takes the session token along, and obstore cannot be told not to follow. So all
    other hosts are reached by way of a proxy that refuses them: one at an address where nothing can listen, or, where
    a proxy of the environment carries the requests, a relay to that one.
    """
    named = [urlsplit(one) for one in [*endpoints, *filter(None, map(os.environ.get, _MORE))]]
    if not endpoints:
        named.append(urlsplit(f"https://{_AMAZON}"))
    if os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        named += [urlsplit(f"https://{host}") for host in (f"sts.{region}.{_AMAZON}", f"sts.{_AMAZON}")]
    schemes = {one.hostname: one.scheme for one in named if one.hostname}
    proxies = getproxies()
    carried = [host for host, scheme in schemes.items() if _is_carried(host, scheme, proxies)]
    # A part of a host's names may go without a proxy, such as one region's.
    parts = [one for one in _entries(proxies) if is_below(one, carried)]
    direct = [*(host for host in schemes if host not in carried), *parts, *_MACHINE]
    through = relay(carried, proxies) if carried else f"http://{NOWHERE}"
    return {"proxy_url": through, "proxy_excludes": ",".join(direct)}


def _is_carried(host: str, scheme: str, proxies: dict[str, str]) -> bool:
    """Whether a proxy of the environment carries requests to a host. InputError if it is of another kind (socks5)."""
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or proxy_bypass(host) or _is_in_networks(host, _entries(proxies)):
        return False
    if "://" in proxy and not proxy.startswith(("http://", "https://")):
        kind = proxy.partition("://")[0]
        raise InputError(
            f"the environment's proxy for {scheme} is one of {kind}, and requests to a bucket go through those of http "
            f"and https only: name such a one in {scheme.upper()}_PROXY, or add {host} to NO_PROXY"
        )
    return True


def _entries(proxies: dict[str, str]) -> list[str]:
    """The hosts and networks of NO_PROXY."""
    entries = (one.strip().lstrip(".") for one in proxies.get("no", "").split(","))
    return [one for one in entries if one not in ("", "*")]


def _is_in_networks(host: str, entries: list[str]) -> bool:
    """Whether a host is an address in a network of NO_PROXY (10.0.0.0/8), which Python itself does not look at."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    for one in entries:
        with suppress(ValueError):
            if address in ip_network(one, strict=False):
                return True
    return False


def _profile() -> dict[str, Any]:
    """What boto3 knows from ~/.aws and single sign-on, if it is installed and the environment names no keys."""
    if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_SKIP_SIGNATURE" in os.environ:
        return {}
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}

    class Provider(Boto3CredentialProvider):
        """Has kdcache know the credentials, so that they are never told."""

        def __call__(self) -> Any:
            found = super().__call__()
            remember(found["access_key_id"], found["secret_access_key"], found.get("token"))
            return found

    try:
        session = boto3.Session()
        return {"credential_provider": Provider(session)} if session.get_credentials() else {}
    except BotoCoreError as e:
        problem = type(e).__name__
    raise InputError(
        f"the credentials that the AWS tools keep cannot be used ({problem}): check AWS_PROFILE and ~/.aws, or log in "
        "again (aws sso login)"
    )
