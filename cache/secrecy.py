"""What must not be told: credentials, and the parts of an address that may hold some.

Known credentials are the values of environment variables whose names say so, the passwords in addresses that other
variables hold (that of a proxy, for example), and whatever was handed to `remember`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from urllib.parse import quote

HIDDEN = "***"
_SHORTEST = 6  # characters: a shorter value may be part of any word
_NAME = re.compile(
    r"(?i)(token|secret|passw|passphrase|credential|connection.?string|(^|[_-])sas([_-]|$)"
    r"|(api|access|account|auth|private|service|storage)[_-]?key)"
)
# The value of such a variable is where something lies, and names no secret itself.
_PLACE = re.compile(r"(?i)(^|[_-])(file|path|dir|directory|folder|home|url|uri|endpoint)s?$")
# A user and a password before the host. A password may hold characters that end a host, so that all up to the last @
# counts where there is a colon that begins no port.
_USER = re.compile(r"(?<=://)(?:[^/?#\s'\"]*@|[^/?#\s:@'\"]+:(?!\d+(?:[/?#\s'\"]|$))[^\s'\"]*@)")
# The options of a Hugging Face data set name columns and a configuration, and are no query.
_OPTIONS = r"(?:(?:config|image|label)=[^\s&'\"]*(?:&|(?=[\s'\"]|$)))+(?=[\s'\"]|$)"
_QUERY = re.compile(rf"(://[^\s?#'\"]*[?#]|\?(?=[\w.~-]+=)(?!{_OPTIONS}))[^\s'\"]+")
_PASSWORD = re.compile(r"://[^/?#\s:@]*:([^\s]+)@")
_remembered: set[str] = set()


def names_a_secret(name: str) -> bool:
    """Whether a variable or a flag of that name holds a credential."""
    return bool(_NAME.search(name)) and not _PLACE.search(name)


def remember(*secrets: str | None) -> None:
    """Keep credentials in mind that did not come from the environment, so that `hide` knows them."""
    _remembered.update(_as_told(one for one in secrets if one))


def hide(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with *** for known credentials, and for what stands in an address for a user or a query.

    environment: where variables are looked for, by default that of this process.
    """
    if "://" in text:
        text = _USER.sub(f"{HIDDEN}@", text)
    if "?" in text or "://" in text:
        text = _QUERY.sub(rf"\1{HIDDEN}", text)
    # The longest come first, since one may be a part of another.
    for secret in sorted(_known(os.environ if environment is None else environment), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def is_part_of_one(text: str) -> bool:
    """Whether a text is a known credential, or stands in one."""
    return any(text in secret for secret in _known(os.environ))


def _known(environment: Mapping[str, str]) -> frozenset[str]:
    return _in_variables(frozenset(environment.items())) | _remembered


@lru_cache(maxsize=1)  # every error asks, also those that are only looked at, and variables hardly ever change
def _in_variables(variables: frozenset[tuple[str, str]]) -> frozenset[str]:
    found = set[str]()
    for name, value in variables:
        if names_a_secret(name):
            found.add(value.strip())
        if "://" in value:
            found.update(_PASSWORD.findall(value))
    return _as_told(found)


def _as_told(secrets: Iterable[str]) -> frozenset[str]:
    """Those that are long enough to be told from other words, also as they stand in an address."""
    found = [one for one in secrets if len(one) >= _SHORTEST]
    return frozenset([*found, *(quote(one, safe="") for one in found)])
