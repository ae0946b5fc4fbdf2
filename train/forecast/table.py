"""The figures of `kdcache plan` for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache.pipeline.process.progress import duration, percent, size


def table(found: Mapping[str, Any]) -> str:
    """What `forecast` has found, section by section."""
    return "\n".join([
        *_about(found), *_time(found), "", *_records(found), "", *_break_even(found), "", "build it with", "",
        f"  {found['command']}",
    ])  # fmt: skip


def _about(found: Mapping[str, Any]) -> list[str]:
    probe = found["probe"]
    lines = [
        f"{found['teacher']} on {found['data']}: {found['views']} views ({found['policy']}) of {found['samples']:,} "
        f"samples, and {found['evaluation']:,} to evaluate",
        f"tried in {duration(probe['seconds'])}: {probe['images']:,} images in {probe['views']} views",
    ]
    if probe["teacher_top1"] is not None:
        lines.append(
            f"teacher: right on {percent(probe['teacher_top1'])} of {probe['plain_images']:,} training images, where "
            f"chance is {percent(probe['chance'])}"
        )
    lines += [f"note: {note}" for note in probe["notes"]]
    if found["in_registry"]:
        lines.append(f"note: the registry has cache {found['key'][:12]} already: a build pulls what is there")
    return lines


def _time(found: Mapping[str, Any]) -> list[str]:
    took, rates, memory = found["time"], found["probe"]["images_per_second"], found["memory"]
    if not took["records"]:
        return ["", f"cache {found['key'][:12]} is built already: nothing is left to compute"]
    slower = "decoding and cutting images" if took["limit"] == "images" else "the teacher"
    lines = [
        "",
        f"time      {duration(took['seconds'])} on {found['device']}: {rates['build']:,.0f} images/s (the teacher "
        f"alone {rates['teacher']:,.0f}, the images alone {rates['images']:,.0f}: {slower} sets the pace)",
    ]
    if took["gpus"] > 1:
        lines.append(
            f"          {duration(took['seconds_on_gpus'])} on {took['gpus']} such devices, each with as many cores"
        )
    gpu = f", {size(memory['gpu'])} of the GPU" if "gpu" in memory else ""
    worker = f", {size(memory['a_worker'])} for each process that decodes" if "a_worker" in memory else ""
    lines.append(f"memory    {size(memory['host'])}{worker}{gpu}")
    lines.append(f"disk      {size(found['bytes'])} in {found['files']:,} files")
    return lines


def _records(found: Mapping[str, Any]) -> list[str]:
    temperatures = list(found["records"][0]["head"])
    heads = "".join(f"{'head T=' + t:>11}" for t in temperatures)
    lines = [f"{'classes':>9}{'bytes':>9}{'whole cache':>13}{heads}{'error of NKD':>15}"]
    for row in found["records"]:
        kept = "dense" if row["k"] is None else str(row["k"])
        own = "  <- as asked" if row["k"] == found["stored_classes"] else ""
        shares = "".join(f"{percent(row['head'][t]):>11}" for t in temperatures)
        lines.append(
            f"{kept:>9}{row['bytes']:>9.1f}{size(row['cache_bytes']):>13}{shares}{percent(row['gradient_error']):>15}{own}"
        )
    return [
        *lines,
        "Bytes are those of a record. Head: the share of the teacher's probability that the stored classes have; the "
        "tail has the rest.",
        "Error of NKD: the relative error of its gradient, beside records of all classes in float32.",
    ]


def _break_even(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{'epochs':>9}{'a live teacher adds':>22}{'paid for after':>18}"]
    for row in found["break_even"]:
        lines.append(f"{row['epochs']:>9}{duration(row['live_teacher_seconds']):>22}{row['students']:>9.2f} students")
    return lines
