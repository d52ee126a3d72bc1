"""Records of a JSON file that is one value over many lines: an array, or an object with an array, one at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from edgetune.data.forms import ROWS_KEYS
from edgetune.data.json_lines import LINE_LIMIT, refuse_constant, unique
from edgetune.data.problems import RowError
from edgetune.data.source import SourceError

_PIECE = 1 << 16
_SPACE = re.compile(r"[ \t\r\n]*")
_MOST = 2 * LINE_LIMIT
"""Characters of a record, with the white space in it, which no row has any more."""
_NEAR = 12
"""Characters before the end of what was read within which an error can come from that end."""


@dataclass(frozen=True)
class Record:
    """A record of a file, or what is wrong at its place."""

    line: int
    """Where it begins, counted from 1."""
    value: Any = None
    problem: str = ""


def json_records(file: BinaryIO) -> Iterator[Record]:
    """The elements of the array that a file is, or that an object has under a name such as `data`; else the object.

    Of several values all are taken, one after the other. No more than one record is held. What is no JSON is a problem
    and ends the records: where the next one begins cannot be told.
    """
    text = _Text(file)
    try:
        while begin := text.next():
            yield from _elements(text) if begin == "[" else _object(text)
    except (RowError, SourceError) as error:
        yield Record(text.line, problem=f"{error}; no row after it was read")


def _elements(text: _Text) -> Iterator[Record]:
    text.take("[")
    while text.next() != "]":
        line = text.line
        try:
            record = Record(line, text.value())
        except _SoundError as error:
            record = Record(line, problem=str(error))
        yield record
        if text.next() != "]":
            text.take(",")
            if text.next() == "]":
                raise RowError("is not valid JSON: a comma before the end of the array")
    text.take("]")


def _object(text: _Text) -> Iterator[Record]:
    line, found = text.line, False
    rest: dict[str, Any] = {}
    seen: set[str] = set()
    text.take("{")
    while text.next() != "}":
        key = text.value()
        if not isinstance(key, str) or key in seen:
            raise RowError(f"is not valid JSON: {str(key)[:60]!r} is there twice or is no name")
        seen.add(key)
        text.take(":")
        if key in ROWS_KEYS and text.next() == "[" and not found:
            found = True
            yield from _elements(text)
        else:
            rest[key] = text.value()
        if text.next() != "}":
            text.take(",")
            if text.next() == "}":
                raise RowError("is not valid JSON: a comma before the end of the object")
    text.take("}")
    if not found:
        yield Record(line, rest)


class _SoundError(RowError):
    """The value is JSON, so that one can go on after it, and not one that edgetune takes."""


class _Text:
    """The text of a file, read as far as it is needed.

    Args:
        file: UTF-8.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._end = "", 0, False
        self.line = 1
        """Where the next character stands."""

    def next(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._go(self._at if found is None else found.end())
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, char: str) -> None:
        """Go past a character.

        Raises:
            RowError: There is another one.
        """
        if (found := self.next()) != char:
            where = f"found {found!r}" if found else "the file ends too early"
            raise RowError(f"is not valid JSON: expected {char!r}, {where}")
        self._go(self._at + 1)

    def value(self) -> Any:
        """The JSON value that comes next, however many lines it has.

        Raises:
            RowError: It is none, or is longer than a row may be.
        """
        self.next()
        while True:
            try:
                value, end = self._decode()
                # A number that is cut is one as well: `1` of `1.5e+3`, after which at most `e+` was read.
                if end >= len(self._text) - 2 and not self._end:
                    raise json.JSONDecodeError("may go on", self._text, end)
                break
            except json.JSONDecodeError as error:
                if error.pos < len(self._text) - _NEAR and not error.msg.startswith("Unterminated string"):
                    self._go(error.pos)
                    raise RowError(f"is not valid JSON: {error.msg}") from error
                if len(self._text) - self._at > _MOST:
                    raise _too_long() from error
                if not self._more():
                    raise RowError(f"is not valid JSON: {error.msg}, and the file ends there") from error
            except RecursionError as error:
                raise RowError("is nested too deeply; a row is one flat object") from error
            except ValueError as error:  # an integer of thousands of digits
                raise RowError(f"is not a row: {str(error).split(';')[0]}") from error
        if end - self._at > _MOST:
            raise _too_long()
        self._go(end)
        if isinstance(value, RowError):
            raise _SoundError(str(value))
        return value

    def _decode(self) -> tuple[Any, int]:
        """The next value, or why it is not one that edgetune takes, and where it ends."""
        try:
            return _STRICT.raw_decode(self._text, self._at)
        except RowError as error:
            return error, _PLAIN.raw_decode(self._text, self._at)[1]

    def _go(self, place: int) -> None:
        self.line += self._text.count("\n", self._at, place)
        self._at = place

    def _more(self) -> bool:
        """Read on; at least as much as is held, so that a long value is not looked at too often."""
        if self._end:
            return False
        self._text, self._at = self._text[self._at :], 0
        raw = self._file.read(max(_PIECE, len(self._text)))
        self._end = not raw
        try:
            self._text += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise RowError(f"is not UTF-8: {error.reason}; save the file as UTF-8") from error
        return True


def _too_long() -> RowError:
    return RowError(f"is longer than {_MOST:,} characters; split it into several rows")


_PLAIN = json.JSONDecoder()
_STRICT = json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse_constant)
