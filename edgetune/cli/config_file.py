"""`--config FILE`: the fields of a config dataclass as TOML, checked as strictly as flags are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from edgetune.cli.values import fields_of, type_of
from edgetune.config import Option, alternatives, hints_of, is_a, option_of
from edgetune.errors import UsageError
from edgetune.text.suggestion import did_you_mean
from edgetune.text.toml_file import read_toml


@dataclass(frozen=True)
class Setting:
    """One key of the file."""

    value: Any
    """Of the type that the field has."""
    place: str
    """`file:line`, for messages."""


def read_config(path: Path, kind: type) -> dict[str, Setting]:
    """Read a TOML file whose keys are the fields of `kind`, written with underscores or dashes.

    Args:
        path: The file.
        kind: A config dataclass, such as `TrainConfig`.

    Returns:
        What the file sets, by the name of the field, or by the former name that the file has; the value is of the
        field's type and within its bounds, or a former choice.

    Raises:
        UsageError: No such file, broken TOML (`file:line: reason`), an unknown key, or a value of another type or out
            of bounds.
    """
    file = read_toml(path, "--config")
    known, hints = fields_of(kind), hints_of(kind)
    settings: dict[str, Setting] = {}
    for key, value in file.table.items():
        name = key.replace("-", "_")
        place = file.line(key)
        if name not in known:
            raise UsageError(f"{place}: unknown key '{key}'{did_you_mean(name, hints)}")
        if name in settings:
            raise UsageError(f"{place}: '{key}' is set twice, as {name} and as {name.replace('_', '-')}")
        hint, said = hints[known[name].name], option_of(known[name])
        if get_origin(hint) is not dict:
            settings[name] = Setting(_value(value, hint, said, place, key), place)
            continue
        if not isinstance(value, dict):
            raise UsageError(f"{place}: {key} is {value!r:.60}, expected a table such as {{ down_proj = 32 }}")
        of_entry = get_args(hint)[1]
        entries = {entry: _value(one, of_entry, said, place, f"{key}.{entry}") for entry, one in value.items()}
        settings[name] = Setting(entries, place)
    return settings


def _value(value: object, hint: Any, said: Option, place: str, key: str) -> Any:
    """A value of the file as the field's type, within its bounds."""
    found = _typed(value, hint, said, f"{place}: {key}")
    try:
        return type_of(hint, said).convert(found, None, None)
    except click.BadParameter as error:
        raise UsageError(f"{place}: {key.replace('-', '_')}: {error.message}") from error


def _typed(value: object, hint: Any, said: Option, place: str) -> Any:
    """A value of TOML as the type of a field. TOML has types: `"3"` is no number there, as it is on a command line."""
    if len(kinds := alternatives(hint)) > 1:
        number, words = kinds
        if value in get_args(words):
            return value
        if not is_a(value, number):
            taken = ", or ".join((KINDS[number], *map(repr, get_args(words))))
            raise UsageError(f"{place} is {value!r:.60}, expected {taken}")
        return number(value)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in (*choices, *said.former_values):
            raise UsageError(f"{place} is {value!r:.60}, expected {' or '.join(repr(choice) for choice in choices)}")
        return value
    if not is_a(value, str if hint is Path else hint):
        raise UsageError(f"{place} is {value!r:.60}, expected {KINDS[hint]}")
    return hint(value)


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    Path: "a path in quotes",
}
"""How messages call the TOML value that each type of field takes."""
