"""Reads what wandb writes offline: a log of records in blocks, as LevelDB has them, each record a protocol buffer."""

import json
import struct
import time
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7


def records(file: Path) -> list[Any]:
    """The records of one file."""
    from wandb.proto import wandb_internal_pb2

    data, at, found, part = file.read_bytes(), 7, [], b""  # after the file's own header
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # the rest of a block that holds no header
            at += _BLOCK - at % _BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        part += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (1, 4):  # whole, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def offline(folder: Path) -> list[Any]:
    """The records of all starts of the run in a folder, in order.

    wandb's own process writes them, and its last ones only after it has answered: they are waited for.
    """
    until = time.monotonic() + 5
    while True:
        files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
        found = [records(file) for file in files]
        if all(some and some[-1].HasField("exit") for some in found) or time.monotonic() > until:
            return [record for some in found for record in some]
        time.sleep(0.01)


def history(folder: Path, pictures: bool = False) -> list[dict[str, Any]]:
    """What was logged, without what wandb adds; with pictures and tables too if asked."""
    rows = [record.history.item for record in offline(folder) if record.HasField("history")]
    named = [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]
    left_out = ("_",) if pictures else ("_", "views", "analysis/")
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in named]


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in offline(folder):
        for part in (record.config, record.run.config):
            found |= {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in part.update}
    return found
