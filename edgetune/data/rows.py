"""Rows of JSONL, checked: every problem of a file is reported as `file:line: reason`."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, BinaryIO

from edgetune.data.source import Source, SourceError, name_of, open_source
from edgetune.errors import DataError

LINE_LIMIT = 1 << 20
"""Longest line that is read, in bytes."""
MESSAGE_LIMIT = 1000
"""Most messages of a conversation; each answer costs a rendering of all that comes before it."""
PROBLEM_LIMIT = 1000
"""Problems that are kept; more are only counted."""
ROLES = ("system", "user", "assistant")
SCHEMAS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The kinds of rows and their keys."""
_EXPECTED = 'a row has "messages", "prompt" and "completion", or "text"; a message has "role" and "content"'


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True)
class ChatRow:
    """A conversation; the assistant's answers are trained."""

    line: int
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class CompletionRow:
    """A prompt and its continuation; the continuation is trained."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class TextRow:
    """Plain text; all of it is trained."""

    line: int
    text: str


Row = ChatRow | CompletionRow | TextRow


class Problems:
    """Collects `file:line: reason` in bounded memory.

    Args:
        source: Where the lines come from that the reasons are about.
    """

    def __init__(self, source: Source) -> None:
        self._name = name_of(source)
        self._kept: list[str] = []
        self._count = 0

    def add(self, line: int, reason: str) -> None:
        """Note a problem of `line` (counted from 1)."""
        self._count += 1
        if len(self._kept) < PROBLEM_LIMIT:
            self._kept.append(f"{self._name}:{line}: {reason}")

    def raise_if_any(self) -> None:
        """Report what was collected.

        Raises:
            DataError: There was a problem.
        """
        if self._count > len(self._kept):
            raise DataError([f"{self._name}: {self._count:,} problems; the first {PROBLEM_LIMIT:,}:", *self._kept])
        if self._kept:
            raise DataError(self._kept)


class _RowError(ValueError):
    """What is wrong with one line."""


def read_rows(source: Source, problems: Problems) -> Iterator[Row]:
    """Read JSONL: UTF-8, one object a line, all of the same kind, gzip or not; blank lines are skipped.

    Lines longer than `LINE_LIMIT` are refused without being read whole. No more than one row is held.

    Args:
        source: A file or a pipe.
        problems: Hears of every line that is wrong, and why; its row is left out.

    Raises:
        UsageError: Nothing can be read there.
    """
    expected: str | None = None
    mixed, empty = False, True
    with open_source(source) as file:
        for line, raw in _lines(file):
            empty = False
            try:
                kind, row = _read_line(raw, line)
            except _RowError as error:
                problems.add(line, str(error))
                continue
            expected = expected or kind
            if kind == expected:
                yield row
            elif not mixed:
                mixed = True
                problems.add(line, f"is a {kind} row, but the rows before are {expected} rows; use one kind a file")
    if empty:
        problems.add(1, 'the file has no rows; write one JSON object a line, such as {"text": "…"}')


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | _RowError]]:
    """Number and bytes of every line that is not blank, or what is wrong with it."""
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
            yield number, _RowError(str(error))
            return
        if not raw:
            return
        if too_long:
            yield number, _RowError(f"is longer than {LINE_LIMIT:,} bytes; split it into several rows")
        elif number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            yield number, raw
            return  # every further line would fail for the same reason
        elif raw.strip():
            yield number, raw.rstrip(b"\r\n")


def _read_line(raw: bytes | _RowError, line: int) -> tuple[str, Row]:
    if isinstance(raw, _RowError):
        raise raw
    record = _parse(_decode(raw, line))
    if not isinstance(record, dict):
        raise _RowError(f'expected an object such as {{"text": "…"}}, found {_kind_of(record)}')
    kind = _schema_of(record)
    if kind == "messages":
        return kind, ChatRow(line, _messages(record["messages"]))
    if kind == "text":
        return kind, TextRow(line, _filled("text", record["text"]))
    prompt = _text("prompt", record["prompt"])
    return kind, CompletionRow(line, prompt, _filled("completion", record["completion"]))


def _decode(raw: bytes, line: int) -> str:
    if line == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _RowError("the file is UTF-16; save it as UTF-8")
    if line == 1 and raw.startswith(codecs.BOM_UTF8):
        raise _RowError("the file starts with a byte order mark; save it as UTF-8 without BOM")
    if b"\0" in raw:
        raise _RowError(f"has a NUL byte at byte {raw.index(0) + 1}; save the file as UTF-8 text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RowError(f"is not UTF-8: {error.reason} at byte {error.start + 1}; save the file as UTF-8") from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except _RowError:
        raise
    except json.JSONDecodeError as error:
        raise _RowError(f"is not valid JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise _RowError("is nested too deeply; a row is one flat object") from error
    except ValueError as error:  # an integer of thousands of digits
        raise _RowError(f"is not a row: {str(error).split(';')[0]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RowError(f"has the key {_quoted(repeated)} twice; keep one")
    return record


def _refuse_constant(name: str) -> Any:
    raise _RowError(f"is not valid JSON: {name} is not a JSON value")


def _schema_of(record: dict[str, Any]) -> str:
    for kind, keys in SCHEMAS.items():
        if any(key in record for key in keys):
            _check_keys(record, keys)
            return kind
    known = [key for keys in SCHEMAS.values() for key in keys]
    _refuse_unknown(record, known, "")
    raise _RowError(f"is an empty object; {_EXPECTED}")


def _check_keys(record: dict[str, Any], keys: Sequence[str], where: str = "") -> None:
    _refuse_unknown(record, keys, where)
    for key in keys:
        if key not in record:
            raise _RowError(f"{where}lacks the key {_quoted(key)}")


def _refuse_unknown(record: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in record:
        if key not in known:
            close = get_close_matches(key[:80], known, n=1)
            hint = f"did you mean {_quoted(close[0])}?" if close else _EXPECTED
            raise _RowError(f"{where}has the unknown key {_quoted(key)}; {hint}")


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _RowError(f'"messages" must be a list, found {_kind_of(value)}')
    if len(value) > MESSAGE_LIMIT:
        raise _RowError(f'"messages" has {len(value):,} entries, at most {MESSAGE_LIMIT:,} are taken; split the row')
    messages = tuple(_message(f"messages[{index}]", item) for index, item in enumerate(value))
    if not any(message.role == "assistant" for message in messages):
        raise _RowError('"messages" has no assistant message, so nothing to learn; add the answer')
    return messages


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise _RowError(f'{where} must be an object with "role" and "content", found {_kind_of(value)}')
    _check_keys(value, ("role", "content"), f"{where} ")
    role = value["role"]
    if role not in ROLES:
        found = _quoted(role) if isinstance(role, str) else _kind_of(role)
        raise _RowError(f"{where}.role must be one of {', '.join(ROLES)}, found {found}")
    check = _filled if role == "assistant" else _text
    return Message(role, check(f"{where}.content", value["content"]))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _RowError(f"{where} must be a string, found {_kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise _RowError(
            f"{where} has half a surrogate pair (\\u{code:04x}), which is no character; remove it"
        ) from error
    return value


def _filled(where: str, value: Any) -> str:
    text = _text(where, value)
    if not text.strip():
        raise _RowError(f"{where} is empty, so there is nothing to learn; fill it or remove the row")
    return text


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else text[:59] + "…", ensure_ascii=not text.isprintable())


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
