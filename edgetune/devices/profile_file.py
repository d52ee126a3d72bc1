"""A TOML file as a frozen dataclass: keys are the fields' names with dashes, and everything that is wrong is said."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from edgetune.errors import UsageError
from edgetune.text.byte_size import parse_bytes
from edgetune.text.suggestion import did_you_mean
from edgetune.text.toml_file import TomlFile, read_toml

ResultT = TypeVar("ResultT")
_SCALARS: dict[type, tuple[str, tuple[type, ...]]] = {
    str: ("a text in quotes", (str,)),
    int: ("a whole number above 0", (int,)),
    float: ("a number above 0", (int, float)),
    bool: ("true or false", (bool,)),
}
"""How messages call a type, and what stands for it in TOML."""


class _WrongError(Exception):
    """A value that does not fit; the message says what was expected."""


def read_as(path: Path, kind: type[ResultT]) -> tuple[TomlFile, ResultT | None, list[str]]:
    """Read a file whose tables are dataclasses. Nothing is converted but sizes (`8GB`) and lists (to tuples).

    Args:
        path: The file.
        kind: The class of the whole file. Metadata `key` of a field is its name in the file; `size` says that the
            number of bytes is written as a text.

    Returns:
        The file, what it says, and all that is wrong as `file:line: reason`; nothing when something is wrong.

    Raises:
        UsageError: The file cannot be read, or is no TOML.
    """
    file = read_toml(path, "device profile")
    reader = _Reader(file)
    value = reader.table(file.table, kind, ())
    return file, None if reader.problems else cast(ResultT, value), reader.problems


class _Reader:
    def __init__(self, file: TomlFile) -> None:
        self._file = file
        self.problems: list[str] = []

    def table(self, table: object, kind: type, keys: tuple[str, ...]) -> object:
        if not isinstance(table, Mapping):
            self._note(keys, f"{_name(keys)} is {table!r:.60}, expected a table")
            return None
        known = {_key(each): each for each in fields(kind)}
        for key in table.keys() - known.keys():
            self._note((*keys, key), f"unknown key '{_name((*keys, key))}'{did_you_mean(key, known)}")
        hints = get_type_hints(kind)
        values: dict[str, object] = {}
        for key, each in known.items():
            if key in table:
                size = bool(each.metadata.get("size"))
                values[each.name] = self._value(table[key], hints[each.name], (*keys, key), size=size)
            elif each.default is MISSING and each.default_factory is MISSING:
                self._note(keys, f"'{_name((*keys, key))}' is missing")
        # What is wrong is never built: a field may be missing.
        return None if self.problems else kind(**values)

    def _value(self, value: Any, hint: Any, keys: tuple[str, ...], *, size: bool = False) -> object:
        """The value as its type, or None when a problem was noted."""
        if get_origin(hint) in (Union, types.UnionType):
            hint = next(member for member in get_args(hint) if member is not type(None))
        if is_dataclass(hint):
            return self.table(value, cast(type, hint), keys)
        if get_origin(hint) is tuple:
            return self._list(value, get_args(hint), keys)
        try:
            return _mapping(value) if get_origin(hint) is Mapping else _scalar(value, hint, size=size)
        except _WrongError as error:
            self._note(keys, f"{_name(keys)} is {value!r:.60}, expected {error}")
            return None

    def _list(self, value: object, members: tuple[Any, ...], keys: tuple[str, ...]) -> tuple[object, ...] | None:
        several = members[-1] is Ellipsis
        if not isinstance(value, list) or (not several and len(value) != len(members)):
            expected = "a list" if several else f"a list of {len(members)}"
            self._note(keys, f"{_name(keys)} is {value!r:.60}, expected {expected}")
            return None
        kinds = [members[0]] * len(value) if several else members
        return tuple(self._value(*each, (*keys, str(n))) for n, each in enumerate(zip(value, kinds, strict=True)))

    def _note(self, keys: tuple[str, ...], text: str) -> None:
        self.problems.append(f"{self._file.line(*keys)}: {text}")


def _scalar(value: Any, hint: Any, *, size: bool) -> object:
    if size:
        try:
            return parse_bytes(value if isinstance(value, str) else "")
        except UsageError:
            raise _WrongError("a size in quotes, such as '8GB'") from None
    if get_origin(hint) is Literal:
        if value not in (choices := get_args(hint)):
            raise _WrongError(" or ".join(repr(choice) for choice in choices))
        return value
    name, accepted = _SCALARS[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise _WrongError(name)
    if isinstance(value, str) and not value.strip():
        raise _WrongError(f"{name}, not an empty one")
    if isinstance(value, int | float) and hint is not bool and not 0 < value < math.inf:
        raise _WrongError(name)
    return hint(value)


def _mapping(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for each in value.values()):
        raise _WrongError("a table of texts in quotes")
    return dict(value)


def _key(of: Field[Any]) -> str:
    return str(of.metadata.get("key", of.name.replace("_", "-")))


def _name(keys: tuple[str, ...]) -> str:
    """As people write it; numbers are places in a list."""
    return ".".join(_words(keys)) or "the file"


def _words(keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        yield f"[{key}]" if key.isdigit() else key
