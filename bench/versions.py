"""The package as of another commit, beside which a script measures."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def checked_out(place: Path, commit: str | None) -> Path:
    """A folder in which `kdcache` is the package as of that commit, or as it is here."""
    place.mkdir()
    if commit is None:
        (place / "kdcache").symlink_to(ROOT)
        return place
    (place / "kdcache").mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(place / "kdcache")], input=archive, check=True)
    return place
