"""What may stand for an option: the fields of a config dataclass as click's types, for flags and for the file alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from edgetune.cli.inputs import PATH
from edgetune.config import Option, alternatives, option_of
from edgetune.errors import UsageError
from edgetune.text.byte_size import parse_bytes


class Finite(click.FloatRange):
    """A number in a range; `nan` and `inf`, which click lets pass, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does, then refuse what is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Size(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes such as `3GB`; the text is kept as it was written."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what is no size."""
        try:
            parse_bytes(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class Choice(click.Choice):  # type: ignore[type-arg]
    """One of the choices, or one of those that there were, which are taken and not shown."""

    def __init__(self, choices: tuple[str, ...], former: Mapping[str, object]) -> None:
        super().__init__(choices)
        self.former = former

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As click does, but for a former choice."""
        return str(value) if value in self.former else super().convert(value, param, ctx)


class NumberOrWord(click.ParamType):  # type: ignore[type-arg]
    """A number, or a word that stands for one, such as `auto`."""

    def __init__(self, of_number: click.ParamType[Any], words: tuple[str, ...]) -> None:
        self._of_number, self._words = of_number, words
        self.name = "|".join((of_number.name.partition(" ")[0], *words))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word, or the number within its bounds."""
        if value in self._words:
            return value
        try:
            return self._of_number.convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}; {' or '.join(self._words)} is taken as well", param, ctx)


class Entry(click.ParamType):  # type: ignore[type-arg]
    """One entry of a field that has a value for each of some names, such as `down_proj=32`."""

    def __init__(self, of_value: click.ParamType[Any]) -> None:
        self._of_value = of_value
        self.name = f"name={of_value.name}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """The name and its value."""
        name, equals, text = str(value).partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is not a name and a value, such as down_proj=32", param, ctx)
        return name, self._of_value.convert(text, param, ctx)


def fields_of(kind: type) -> dict[str, Field[Any]]:
    """The fields of a config dataclass by every name that is taken for them, former ones as well."""
    named = {each.name: each for each in fields(kind)}
    return named | {former: each for each in named.values() for former in option_of(each).former_names}


def type_of(hint: Any, said: Option) -> click.ParamType[Any]:
    """What checks and converts a value of a field.

    Args:
        hint: The field's type, as `hints_of` says it.
        said: What else is said of the field.
    """
    if len(kinds := alternatives(hint)) > 1:
        number, words = kinds
        return NumberOrWord(type_of(number, said), get_args(words))
    if get_origin(hint) is Literal:
        return Choice(get_args(hint), said.former_values)
    if get_origin(hint) is tuple:
        return type_of(get_args(hint)[0], said)
    if get_origin(hint) is dict:
        return Entry(type_of(get_args(hint)[1], said))
    if hint is int:
        least, most = (None if bound is None else int(bound) for bound in (said.least, said.most))
        return click.IntRange(least, most)
    if hint is float:
        return Finite(min=said.least, max=said.most)
    if hint is str and said.is_size:
        return Size()
    return {bool: click.BOOL, str: click.STRING, Path: PATH}[hint]
