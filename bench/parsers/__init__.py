"""The table of all parsers that bench/fuzz.py tries."""

from parsers import caches, data, names, runs, signing
from parsers.parser import Parser

_ALL = (*caches.PARSERS, *runs.PARSERS, *data.PARSERS, *names.PARSERS, *signing.PARSERS)
PARSERS: dict[str, Parser] = {p.name: p for p in _ALL}
