"""How Sphinx makes a site of these pages: `make docs`. They are Markdown, and read well without it."""

import re
from typing import Any

import kdcache

project = "kdcache"
author = "kdcache contributors"
version = release = kdcache.__version__
html_title = f"kdcache {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
myst_enable_extensions = ["html_image"]
myst_heading_anchors = 4
exclude_patterns = ["conf.py"]

html_theme = "furo"
html_copy_source = False
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
html_css_files = ["site.css"]
html_static_path = ["static"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90
smartquotes = False  # -- is two dashes
default_role = "code"  # docstrings mark names with single backticks

_CODE = re.compile(r"(`[^`]+`)")
_SIGNS = re.compile(r"[*|]|(?<=\w)_(?!\w)")


def _plain(app: Any, what: str, name: str, about: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain prose: outside of backticks the signs of reStructuredText mean nothing."""
    lines[:] = [
        "".join(text if i % 2 else _SIGNS.sub(r"\\\g<0>", text) for i, text in enumerate(_CODE.split(line)))
        for line in lines
    ]


def _examples(app: Any, context: Any, lines: list[str]) -> None:
    """Examples in the help of a command are blocks for the shell."""
    found: list[str] = []
    for line in lines:
        text = re.sub(r"^\|?\s*(Example: )?", "", line)
        text = re.sub(r" +\(([^()]+)\)$", r"  # \1", text)
        if not text.startswith(("kdcache ", "torchrun ")):
            found += ["", line] if found and found[-1].startswith("   ") and line else [line]
            continue
        if not found or not found[-1].startswith("   "):
            found += ["", ".. code-block:: bash", ""]
        found.append(f"   {text}")
    lines[:] = [*found, ""]


def _page_links(app: Any, context: Any, lines: list[str]) -> None:
    """Pages that the help of an option names are links here."""
    lines[:] = [re.sub(r"\bdocs/([\w-]+)\.md", r":doc:`\1`", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _plain)
    app.connect("sphinx-click-process-description", _examples)
    app.connect("sphinx-click-process-options", _page_links)
