"""The lines of a JSONL file, each checked and parsed; none is read that is longer than a row may be."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from edgetune.data.problems import RowError, quoted
from edgetune.data.source import SourceError

LINE_LIMIT = 1 << 20
"""Longest line that is read, in bytes."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Line:
    """A line that is not blank."""

    number: int
    """Counted from 1."""
    raw: bytes
    """Its bytes without the end, and without the byte order mark of a file; the beginning of one that is too long."""
    problem: str = ""
    """Why it cannot be read, if it cannot."""


def lines_of(file: BinaryIO) -> Iterator[Line]:
    """Every line of a file that is not blank; the last one is that after which nothing can be read any more."""
    number = 0
    while True:
        number += 1
        try:
            raw = file.readline(LINE_LIMIT + 1)
            too_long = len(raw) > LINE_LIMIT and not raw.endswith(b"\n")
            rest = raw if too_long else b""
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(LINE_LIMIT)
        except SourceError as error:
            yield Line(number, b"", str(error))
            return
        if not raw:
            return
        if number == 1 and raw.startswith(_UTF16):
            yield Line(number, raw, "the file is UTF-16; save it as UTF-8")
            return  # every further line would fail for the same reason
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if too_long:
            yield Line(number, raw, f"is longer than {LINE_LIMIT:,} bytes; split it into several rows")
        elif raw.strip():
            yield Line(number, raw.rstrip(b"\r\n"))


def parsed(line: Line) -> Any:
    """The JSON value of a line.

    Raises:
        RowError: It has none.
    """
    if line.problem:
        raise RowError(line.problem)
    return parse(decoded(line.raw))


def decoded(raw: bytes) -> str:
    """The text of bytes.

    Raises:
        RowError: They are not UTF-8, or hold a NUL.
    """
    if b"\0" in raw:
        raise RowError(f"has a NUL byte at byte {raw.index(0) + 1}; save the file as UTF-8 text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8: {error.reason} at byte {error.start + 1}; save the file as UTF-8") from error


def parse(text: str) -> Any:
    """The JSON value that a text is, held to the standard: no NaN, no key twice.

    Raises:
        RowError: It is none.
    """
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise RowError(f"is not valid JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise RowError("is nested too deeply; a row is one flat object") from error
    except RowError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise RowError(f"is not a row: {str(error).split(';')[0]}") from error


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs.

    Raises:
        RowError: A key is there twice.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RowError(f"has the key {quoted(repeated)} twice; keep one")
    return record


def refuse_constant(name: str) -> Any:
    """Refuse what Python's JSON has beside the standard's.

    Raises:
        RowError: Always.
    """
    raise RowError(f"is not valid JSON: {name} is not a JSON value")
