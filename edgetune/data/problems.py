"""What is wrong with the rows of a file, told as `file:line: reason`, all of it together."""

from __future__ import annotations

import json
import shlex
from typing import Any

from edgetune.data.source import STDIN, Kept, Source, name_of
from edgetune.errors import DataError

PROBLEM_LIMIT = 1000
"""Problems that are kept; more are only counted."""


class RowError(ValueError):
    """What is wrong with one row."""


class FormError(RowError):
    """The rows are of a form that edgetune does not train on as it is.

    Args:
        what: What they are.
        advice: What to do about it; without it, the command that makes rows of the file.
        flags: What this command has to be given beside the file.
    """

    def __init__(self, what: str, *, advice: str = "", flags: str = "") -> None:
        super().__init__(what)
        self._what, self._advice, self._flags = what, advice, flags

    def told(self, source: Source) -> str:
        """The line that says it of the rows of a source."""
        path = source.source if isinstance(source, Kept) else source
        name = "-" if path == STDIN else shlex.quote(str(path))
        command = f"`edgetune data convert {name} --output rows.jsonl{self._flags}` makes rows of it"
        return f"{self._what}; {self._advice or command}"


class Problems:
    """Collects `file:line: reason` in bounded memory.

    Args:
        source: Where the lines come from that the reasons are about.
    """

    def __init__(self, source: Source) -> None:
        self._name = name_of(source)
        self._kept: list[str] = []
        self.count = 0
        """How many there are, with those that are not kept."""

    def add(self, line: int, reason: str) -> None:
        """Note a problem of `line` (counted from 1)."""
        self.count += 1
        if len(self._kept) < PROBLEM_LIMIT:
            self._kept.append(f"{self._name}:{line}: {reason}")

    def raise_if_any(self) -> None:
        """Report what was collected.

        Raises:
            DataError: There was a problem.
        """
        if self._kept:
            raise DataError(self.told())

    def told(self) -> list[str]:
        """What was collected, one line each; the first says how many there are where not all of them are here."""
        if self.count > len(self._kept):
            return [f"{self._name}: {self.count:,} problems; the first {PROBLEM_LIMIT:,}:", *self._kept]
        return list(self._kept)


def checked_text(where: str, value: Any) -> str:
    """A string that is text.

    Args:
        where: What has it, such as `messages[0].content`.
        value: Of a JSON object.

    Raises:
        RowError: It is no string, or has half a character.
    """
    if not isinstance(value, str):
        raise RowError(f"{where} must be a string, found {kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise RowError(
            f"{where} has half a surrogate pair (\\u{code:04x}), which is no character; remove it"
        ) from error
    return value


def filled_text(where: str, value: Any) -> str:
    """A string that is text, and not white space alone.

    Raises:
        RowError: It is something else.
    """
    text = checked_text(where, value)
    if not text.strip():
        raise RowError(f"{where} is empty, so there is nothing to learn; fill it or remove the row")
    return text


def quoted(text: str) -> str:
    """A name from a file as messages show it, however long it is and whatever it holds."""
    return json.dumps(text if len(text) <= 60 else text[:59] + "…", ensure_ascii=not text.isprintable())


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
