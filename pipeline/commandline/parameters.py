"""The options of a command, made from its annotated signature and from the fields of its config (options.py)."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from kdcache.pipeline.commandline.completion import completer_of
from kdcache.pipeline.commandline.options import Argument, Option


class Parameter(NamedTuple):
    """A field of a config, or a parameter of a command. kind: its type without None; default: MISSING for none."""

    name: str
    kind: Any
    optional: bool
    spec: Option | Argument
    default: Any

    @property
    def flag(self) -> str:
        return self.name.replace("_", "-")


class CommandOption(click.Option):
    """An option of a command, with what its annotation says."""

    def __init__(self, *args: Any, spec: Option, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.spec = spec


class _Number(click.FloatRange):
    """A finite number: nan would pass every comparison with a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def from_signature(run: Callable[..., None]) -> Callable[..., None]:
    """Make the options of a command from its signature, in that order.

    A parameter whose type is a config stands for the config's fields, and gets the config. A parameter that is neither
    a config nor annotated gets all values of the config's field of its name, of which the config has the first.
    """
    hints = get_type_hints(run, include_extras=True)
    configs: dict[str, Any] = {}
    own: list[str] = []  # parameters of the command itself
    found: list[Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        if is_dataclass(hints[name]):
            configs[name] = hints[name]
            found += _fields_of(hints[name])
            continue
        own.append(name)
        if (spec := _spec_of(hints[name])) is not None:
            default = MISSING if parameter.default is parameter.empty else parameter.default
            found.append(_parameter(name, hints[name], spec, default))

    @functools.wraps(run)
    def call(**given: Any) -> None:
        _require(found, given)
        for p in found:
            _join(p, given)
        made = {name: _made(config, given) for name, config in configs.items()}
        run(**made, **{name: given[name] for name in own})

    decorated: Callable[..., None] = call
    for declare in reversed([d for p in found for d in _declared(p)]):
        decorated = declare(decorated)
    return decorated


def _made(config: Any, given: Mapping[str, Any]) -> Any:
    values = {}
    for p in _fields_of(config):
        several = isinstance(p.spec, Option) and p.spec.several
        values[p.name] = next(iter(given[p.name]), None) if several else given[p.name]
    return config(**values)


def _fields_of(config: Any) -> Iterator[Parameter]:
    """The fields of a config that are on the command line."""
    hints = get_type_hints(config, include_extras=True)
    for field in fields(config):
        if (spec := _spec_of(hints[field.name])) is not None:
            yield _parameter(field.name, hints[field.name], spec, field.default)


def _spec_of(hint: Any) -> Option | Argument | None:
    found = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((spec for spec in found if isinstance(spec, Option | Argument)), None)


def _parameter(name: str, hint: Any, spec: Option | Argument, default: Any) -> Parameter:
    kind = get_args(hint)[0]
    if optional := get_origin(kind) in (Union, UnionType):
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
    return Parameter(name, kind, optional, spec, default)


def _declared(p: Parameter) -> Iterator[Callable[..., Any]]:
    """The click decorators of a parameter."""
    if isinstance(p.spec, Argument):
        required, count = p.default is MISSING, -1 if p.spec.several else 1
        kind = get_args(p.kind)[0] if p.spec.several else _type_of(p)
        yield click.argument(
            p.name,
            type=kind,
            metavar=p.spec.metavar,
            required=required,
            nargs=count,
            shell_complete=completer_of(p.name),
        )
        return
    yield _option(p, p.spec)
    for name, spec in p.spec.parts.items():
        yield _option(Parameter(name, str, True, spec, None), spec)


def _option(p: Parameter, spec: Option) -> Callable[..., Any]:
    has_text = spec.several or spec.parse is not None  # the callback makes values of the text
    attributes: dict[str, Any] = {
        "help": spec.help,
        "metavar": spec.metavar,
        "type": str if has_text else _type_of(p),
        "callback": _callback(p, spec),
        "shell_complete": completer_of(p.name),
    }
    if spec.bare is not None:
        attributes |= {"is_flag": False, "flag_value": spec.bare}
    flags = spec.flags or (f"--{p.flag}/--no-{p.flag}" if p.kind is bool and p.optional else f"--{p.flag}",)
    if p.kind is bool:
        attributes |= {"is_flag": True} | ({"default": None} if p.optional else {})
    elif p.default is MISSING and spec.missing:  # `_require` asks for it, in better words than click's
        attributes["help"] += "  [required]"
    elif p.default is MISSING:
        attributes["required"] = True
    else:
        default = p.default if spec.default is None else spec.default
        default = ",".join(f"{v:g}" for v in default) if isinstance(default, tuple) else default
        attributes |= {"default": default, "show_default": default is not None}
        attributes |= {"default": [] if default is None else [str(default)], "multiple": True} if spec.several else {}
    return click.option(*flags, p.name, cls=CommandOption, spec=spec, **attributes)


def _type_of(p: Parameter) -> Any:
    if get_origin(p.kind) is Literal:
        return click.Choice(list(get_args(p.kind)))
    if p.kind in (str, bool):
        return p.kind
    if p.kind not in (int, float) or isinstance(p.spec, Argument):
        raise TypeError(f"{p.name}: the command line has no {p.kind}: give its Option a `parse`")
    bounds: dict[str, Any] = {
        "min": p.spec.ge if p.spec.gt is None else p.spec.gt,
        "max": p.spec.le if p.spec.lt is None else p.spec.lt,
        "min_open": p.spec.gt is not None,
        "max_open": p.spec.lt is not None,
    }
    return click.IntRange(**bounds) if p.kind is int else _Number(**bounds)


def _callback(p: Parameter, spec: Option) -> Callable[[click.Context, click.Parameter, Any], Any] | None:
    """What click calls with the value that was given."""
    if spec.typed:
        return _only_typed
    if spec.several:
        parse = spec.parse or (lambda text: tuple(map(_type_of(p), text.split(","))))
        return lambda ctx, param, values: _parsed(parse, ",".join(values))
    if spec.parse is not None:
        return lambda ctx, param, value: None if value is None else _parsed(spec.parse, value)
    return None


def _parsed(parse: Any, text: str) -> Any:
    try:
        return parse(text)
    except ValueError as e:
        raise click.BadParameter(str(e)) from None


def _only_typed(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """The value if it was typed: no setting may make a command remove what belongs to a team."""
    return value if ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE else None


def _require(found: list[Parameter], given: dict[str, Any]) -> None:
    """Raise UsageError where an option that is required is missing; with a flag that goes without, it is empty."""
    without = any(isinstance(p.spec, Option) and p.spec.instead and given[p.name] for p in found)
    for p in found:
        if isinstance(p.spec, Option) and p.spec.missing and given[p.name] is None:
            if not without:
                raise click.UsageError(f"Missing option '--{p.flag}': {p.spec.missing}")
            given[p.name] = ""


def _join(p: Parameter, given: dict[str, Any]) -> None:
    """Make one value of an option and of its parts, where any of these is given."""
    if not isinstance(p.spec, Option) or p.spec.join is None:
        return
    parts = {name: given.pop(name) for name in p.spec.parts}
    if all(part is None for part in parts.values()):
        return
    if given[p.name] is None:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in parts)
        raise click.UsageError(f"{flags} need --{p.flag}.")
    given[p.name] = p.spec.join(given[p.name], **parts)


def options_of(command: click.Command) -> list[CommandOption]:
    return [p for p in command.params if isinstance(p, CommandOption)]


def flag_of(param: click.Parameter) -> str:
    """The option as it is typed, without the dashes; the first of two spellings."""
    return next((o for o in param.opts if o.startswith("--")), param.opts[0]).lstrip("-")
