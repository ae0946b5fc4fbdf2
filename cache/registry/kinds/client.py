"""obstore's stores for addresses: with which credentials, for how long they wait, and where they may not go."""

from __future__ import annotations

import os
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from obstore import exceptions as oe
from obstore.store import ObjectStore, from_url

from kdcache.cache.errors import InputError
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
    other hosts are reached by way of a proxy that nobody can reach, and nothing is sent. A proxy of the environment
    goes before: then there is no such fence.
    """
    hosts = [urlsplit(one).hostname or "" for one in endpoints] or [_AMAZON]
    proxies = getproxies()
    through = {urlsplit(one).scheme for one in endpoints} or {"https"}
    carried = any(proxies.get(scheme) or proxies.get("all") for scheme in through)
    if carried and not all(proxy_bypass(host) for host in hosts):
        return {}
    more = [urlsplit(os.environ[name]).hostname or "" for name in _MORE if os.environ.get(name)]
    if os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        more += [f"sts.{region}.{_AMAZON}", f"sts.{_AMAZON}"]
    return {"proxy_url": f"http://{NOWHERE}", "proxy_excludes": ",".join([*hosts, *_MACHINE, *filter(None, more)])}


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
