#!/usr/bin/env bash
# Runs the tests with the Python in a folder: tests/run.sh .venv/bin [options of pytest]
set -euo pipefail

# Their many small files lie in memory, where there is plenty: on some disks the tests take twice as long.
room=$(df --output=avail -B1G /dev/shm 2>/dev/null | tail -1) || room=0
[ "$room" -ge 8 ] && place=/dev/shm || place=${TMPDIR:-/tmp}
TMPDIR=$(mktemp -d -p "$place" kdcache-tests.XXXXXX)
trap 'rm -rf "$TMPDIR"' EXIT

# A process a core and one more, since many tests wait for others to end; a file at a time; threads of so many would only
# wait for each other. The cores are counted first, because nproc tells what OMP_NUM_THREADS says.
processes=$(($(nproc) + 1))
export TMPDIR OMP_NUM_THREADS=1
"$1/python" -m pytest -n "$processes" --maxprocesses 8 --dist loadfile "${@:2}"
