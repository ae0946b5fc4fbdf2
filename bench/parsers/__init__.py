"""The table of all parsers that bench/fuzz.py tries."""

from parsers import caches, data, names, runs
from parsers.parser import Parser

PARSERS: dict[str, Parser] = {p.name: p for p in (*caches.PARSERS, *runs.PARSERS, *data.PARSERS, *names.PARSERS)}
