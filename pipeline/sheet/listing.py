"""The operations of view policies and the policies that have a name, for people to choose from."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from kdcache.pipeline.views.operations.operation import bounds
from kdcache.pipeline.views.policy import NAMED, OPERATIONS, check_policy

_HEAD = """\
A policy is none, or operations with commas between them, such as rrc,flip,randaugment(2,9). Arguments that are left out
have the values shown here. In whatever order operations are typed, they are applied in this one."""


def known() -> dict[str, Any]:
    """Every operation with its arguments, in the order of application, and what each named policy stands for."""
    operations = [
        {
            "name": name,
            "stage": kind.stage,
            "arguments": [
                {"name": of.name, "default": of.default, "range": list(bounds(of))} for of in dataclasses.fields(kind)
            ],
            "about": (inspect.getdoc(kind) or "").partition("\n")[0],
        }
        for name, kind in OPERATIONS.items()
    ]
    return {"operations": operations, "named": {name: check_policy(text) for name, text in NAMED.items()}}


def listing(found: dict[str, Any]) -> str:
    """What is `known` as text: a line each."""
    calls = [_call(operation) for operation in found["operations"]]
    width = max(len(text) for text in (*calls, *found["named"]))
    lines, stage = [_HEAD], ""
    for operation, call in zip(found["operations"], calls, strict=True):
        if operation["stage"] != stage:
            lines += ["", (stage := operation["stage"])]
        lines.append(f"  {call:{width}}  {_ranges(operation)}{operation['about']}")
    lines += ["", "named policies", *(f"  {name:{width}}  {text}" for name, text in found["named"].items())]
    return "\n".join(lines)


def _call(operation: dict[str, Any]) -> str:
    """The operation with its defaults, as it may be typed."""
    values = ",".join(f"{argument['default']:g}" for argument in operation["arguments"])
    return f"{operation['name']}({values})" if values else str(operation["name"])


def _ranges(operation: dict[str, Any]) -> str:
    ranges = ["{name} {range[0]:g} to {range[1]:g}".format(**argument) for argument in operation["arguments"]]
    return f"({', '.join(ranges)}) " if ranges else ""
