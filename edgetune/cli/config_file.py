"""`--config FILE`: the fields of a config dataclass as TOML, checked as strictly as flags are."""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
        What the file sets, by field name; the value is of the field's type.

    Raises:
        UsageError: No such file, broken TOML (`file:line: reason`), an unknown key, or a value of another type.
    """
    file = read_toml(path, "--config")
    hints = get_type_hints(kind)
    settings: dict[str, Setting] = {}
    for key, value in file.table.items():
        name = key.replace("-", "_")
        place = file.line(key)
        if name not in hints:
            raise UsageError(f"{place}: unknown key '{key}'{did_you_mean(name, hints)}")
        if name in settings:
            raise UsageError(f"{place}: '{key}' is set twice, as {name} and as {name.replace('_', '-')}")
        settings[name] = Setting(_checked(value, hints[name], f"{place}: {key}"), place)
    return settings


def _checked(value: object, hint: Any, place: str) -> Any:
    """`value` as the type of a field: one of str, int, float, bool, Path, a Literal, or one of these or None."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(member for member in get_args(hint) if member is not type(None))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise UsageError(f"{place} is {value!r:.60}, expected {' or '.join(repr(choice) for choice in choices)}")
        return value
    accepted, name = _TYPES[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{place} is {value!r:.60}, expected {name}")
    return hint(value)


_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text in quotes"),
    Path: ((str,), "a path in quotes"),
}
"""What TOML value each type of field takes, and how messages call it."""
