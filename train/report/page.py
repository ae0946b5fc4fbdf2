"""The page: one file of HTML, made of the facts by templates that escape every name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.cache.errors import InputError
from kdcache.pipeline.process.screen import safe
from kdcache.train.report.cachepage import cache_view
from kdcache.train.report.charts import Pen
from kdcache.train.report.runpage import runs_view

# How every page begins, by which an old one is known that may be replaced.
MARK = b"<!doctype html>\n<!-- a report by kdcache"
MOST = 5_000_000  # bytes
_TEMPLATES = Path(__file__).parent / "templates"


def page(caches: Sequence[dict[str, Any]], runs: dict[str, Any] | None) -> bytes:
    """The page about caches and runs, given their facts. InputError if it is too large or an extra is missing.

    Strings of the facts may hold anything: what a browser would obey is escaped, what nobody would see is spelled out.
    """
    pen = Pen()
    views = [cache_view(facts, f"cache-{number}", pen) for number, facts in enumerate(caches, 1)]
    about_runs = None if runs is None else runs_view(runs, pen)
    contents = [(view["anchor"], view["title"]) for view in views]
    if about_runs:
        contents.append(("runs", about_runs["title"]))
    text: str = (
        _environment()
        .get_template("page.html")
        .render(
            title=contents[0][1] if len(contents) == 1 else "Caches and runs" if runs and caches else "Caches",
            made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            version=__version__,
            contents=contents,
            caches=views,
            runs=about_runs,
        )
    )
    found = text.encode()
    if len(found) > MOST:
        raise InputError(
            f"the page would have {len(found) / 1e6:.1f} MB, more than {MOST / 1e6:g}: report on fewer caches or runs"
        )
    return found


def _environment() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as e:
        raise InputError("a report needs Jinja2: pip install jinja2") from e
    from markupsafe import Markup

    def visible(value: Any) -> Any:
        return safe(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    found = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["g"] = lambda value: f"{value:g}"
    found.filters["drawn"] = Markup  # for charts, which are made here and hold no foreign text
    return found
