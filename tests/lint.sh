#!/usr/bin/env bash
# Types and import directions. Both tools find modules by folder names, so they get to see the repository's
# root as a folder named kdcache: a link in a temporary folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
bin=$root/.venv/bin
[ -x "$bin/mypy" ] || { echo "no $bin/mypy: run 'make lint', which sets it up" >&2; exit 2; }

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
ln -s "$root" "$tmp/kdcache"
cd "$tmp"

"$bin/mypy" --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" \
    -m kdcache -m kdcache.cli -p kdcache.cache -p kdcache.pipeline -p kdcache.train
"$bin/lint-imports" --no-logo --config "$root/pyproject.toml" --cache-dir "$root/.import_linter_cache"
