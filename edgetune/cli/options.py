"""Options from the fields of a config dataclass, and the dataclass from what was given on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Any, get_origin

import click
from click.core import ParameterSource

from edgetune.cli.command import Grouped
from edgetune.cli.config_file import Setting, read_config
from edgetune.cli.inputs import PATH
from edgetune.cli.values import fields_of, type_of
from edgetune.config import hints_of, option_of
from edgetune.errors import UsageError
from edgetune.text.printable import printable

Function = Callable[..., None]
"""What a command calls."""
_FILE = "config_file"
"""What click calls the value of `--config`."""


def options_of(
    kind: type, parameter: str = "config", *, command: str | None = None, with_file: bool = False
) -> Callable[[Function], Function]:
    """Give a command the options of a config dataclass, in the order of its fields.

    The command's function gets one object of the class in the place of their values. What is wrong with them is a
    `UsageError`, which is raised when the command is called: options that exclude each other, a former spelling beside
    what contradicts it, or a file that is not right.

    Args:
        kind: The dataclass, whose fields `edgetune.config.option` made.
        parameter: Name of the function's parameter that takes the object.
        command: The command's name, where several take fields of `kind`; those of another one only are left out.
        with_file: Add `--config`, a file with any of the options, which flags override.
    """
    known = {
        name: each
        for name, each in fields_of(kind).items()
        if command is None or option_of(each).only in (None, command)
    }

    hints = hints_of(kind)

    def decorate(function: Function) -> Function:
        @wraps(function)
        def with_config(*arguments: Any, **values: Any) -> None:
            context = click.get_current_context()
            path = values.pop(_FILE) if with_file else None
            written = {name: _given(each, hints[each.name], values.pop(name)) for name, each in known.items()}
            # What was written counts, even where it is the default: it overrides the file.
            flags = {
                name: Setting(value, place="")
                for name, value in written.items()
                if context.get_parameter_source(name) is not ParameterSource.DEFAULT
            }
            function(*arguments, **values, **{parameter: kind(**_merged(kind, flags, path))})

        for name, each in reversed(known.items()):
            _add_option(with_config, name, each, hints[each.name])
        if with_file:
            text = "TOML file with any of the options below; flags override it."
            click.option("--config", _FILE, type=PATH, help=text, cls=Grouped, group="other")(with_config)
        return with_config

    return decorate


def _given(of: Field[Any], hint: Any, value: Any) -> Any:
    """What was given for a field; of one that can be given again, all of it together, and None for nothing.

    Raises:
        UsageError: A name that has a value was given twice.
    """
    if get_origin(hint) is tuple:
        return tuple(dict.fromkeys(value)) or None
    if get_origin(hint) is not dict:
        return value
    entries: dict[str, Any] = dict(value)
    if len(entries) < len(value):
        raise UsageError(f"{flag_of(of)} is given for {', '.join(name for name, _ in value)}; give each name once")
    return entries or None


def flag_of(of: Field[Any], value: object = True, *, name: str = "") -> str:
    """How a field gets a value on the command line: `--packing`, `--no-packing`, `--batch-size 4`.

    Args:
        of: The field.
        value: What it gets; True gives the flag alone.
        name: A former name of the field, where that is what was written.
    """
    word = (name or of.name).replace("_", "-")
    if value is False:
        # Another flag that switches it off belongs to the name that it has now.
        off = option_of(of).off if name in ("", of.name) else None
        return f"--{off or f'no-{word}'}"
    if isinstance(value, dict):
        return " ".join(f"--{word} {entry}={each}" for entry, each in value.items())
    if isinstance(value, tuple):
        return " ".join(f"--{word} {each}" for each in value)
    return f"--{word}" if value is True else f"--{word} {value}"


def _add_option(function: Function, name: str, of: Field[Any], hint: Any) -> None:
    said, flag, is_on = option_of(of), flag_of(of, name=name), of.default is True
    click.option(
        f"{flag}/{flag_of(of, False, name=name)}" if is_on else flag,
        name,
        type=type_of(hint, said),
        is_flag=hint is bool,
        multiple=get_origin(hint) in (dict, tuple),
        default=of.default,
        show_default=is_on or not (of.default is None or of.default is False),
        help=said.help,
        hidden=name != of.name,
        cls=Grouped,
        group=said.group,
    )(function)


def _merged(kind: type, flags: Mapping[str, Setting], path: Path | None) -> dict[str, Any]:
    """What flags give, and what only the file gives; all else has its default."""
    known, quiet = fields_of(kind), bool(click.get_current_context().params.get("quiet"))
    given = _current(kind, flags, quiet=quiet)
    if path is not None:
        written = {known[name].name for name in flags}
        read = {name: setting for name, setting in read_config(path, kind).items() if known[name].name not in written}
        in_file = _current(kind, read, quiet=quiet)
        # A flag for one of two that exclude each other overrides a file that has the other.
        overridden = {name for pair in _exclusive(kind) if given.keys() & set(pair) for name in pair} | given.keys()
        given |= {name: setting for name, setting in in_file.items() if name not in overridden}
    return {name: setting.value for name, setting in given.items()}


def _current(kind: type, written: Mapping[str, Setting], *, quiet: bool) -> dict[str, Setting]:
    """What was written in one place, by the names and choices that there are now; of former ones a line is printed.

    Raises:
        UsageError: Two of them contradict or exclude each other.
    """
    known = fields_of(kind)
    given: dict[str, Setting] = {}
    texts: dict[str, str] = {}
    emptied: dict[str, Setting] = {}
    for name, setting in written.items():
        of, place, text = known[name], setting.place, _text(known[name], setting, name)
        meant: Mapping[str, object] = {of.name: setting.value}
        if isinstance(setting.value, str) and setting.value in option_of(of).former_values:
            meant = option_of(of).former_values[setting.value]
            emptied[of.name] = Setting(of.default, place)
        if name not in meant and not quiet:
            now = " ".join(_text(known[other], Setting(value, place), other) for other, value in meant.items())
            click.echo(printable(f"{_before(place)}`{text}` is written `{now}` now"), err=True)
        for other, value in meant.items():
            if other in given and given[other].value != value:
                raise UsageError(f"{_before(place)}`{text}` contradicts `{texts[other]}`; leave one of them out")
            given[other], texts[other] = Setting(value, place), text
    for one, other in _exclusive(kind):
        if one in given and other in given:
            place = given[other].place
            names = " and ".join(name if place else flag_of(known[name]) for name in (one, other))
            raise UsageError(f"{_before(place)}{names} exclude each other; keep one of them")
    return emptied | given


def _exclusive(kind: type) -> list[tuple[str, str]]:
    return [(each.name, other) for each in fields(kind) for other in option_of(each).excludes]


def _text(of: Field[Any], setting: Setting, name: str) -> str:
    """What a person wrote under `name`, or would have to write: a flag, or a line of the file."""
    if setting.place:
        return f"{name} = {json.dumps(setting.value, default=str)}"
    return flag_of(of, setting.value, name=name)


def _before(place: str) -> str:
    return f"{place}: " if place else ""
