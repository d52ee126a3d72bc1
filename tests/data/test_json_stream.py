"""A JSON file is read as `json` reads it, a record at a time, in little memory."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.data import json_stream
from edgetune.data.json_lines import LINE_LIMIT
from edgetune.data.json_stream import Record, json_records

# ONNX Runtime, wherever it ran before in the process, takes denormal numbers for zero.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def records(text: str | bytes) -> list[Record]:
    return list(json_records(io.BytesIO(text.encode() if isinstance(text, str) else text)))


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]))
def test_an_array_is_read_as_json_reads_it(values: list[Any], piece: int, indent: int | None) -> None:
    """However small the pieces are in which the file is read: escapes, numbers and words are cut anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_PIECE", piece)
        found = records(json.dumps(values, indent=indent))
    assert [record.value for record in found] == values
    assert [record.problem for record in found] == [""] * len(values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "data": [{"b": 2}, {"b": 3}], "c": {}}', [{"b": 2}, {"b": 3}]),
        (
            '{"version": "1",\n "conversations": [{"from": "human"}]}',
            [{"version": "1", "conversations": [{"from": "human"}]}],
        ),
        ('{\n"a": 1}\n{\n"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("\ufeff[{}]", [{}]),
        ("[]", []),
    ],
)
def test_rows_lie_in_a_field_or_are_the_objects_themselves(text: str, expected: list[Any]) -> None:
    assert [record.value for record in records(text)] == expected


def test_a_record_has_the_line_on_which_it_begins() -> None:
    found = records('[\n  {"a":\n 1},\n\n  {"b": 1, "b": 2},\n  {"c": 3}\n]')
    assert [record.line for record in found] == [2, 5, 6]
    assert [record.problem for record in found] == ["", 'has the key "b" twice; keep one', ""]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"a": 1},\n{"a": }]', 2, "is not valid JSON: Expecting value"),
        ('[{"a": 1},\n{"a": "' + "x" * 200_000, 2, "the file ends there"),
        ('[{"a": 1}\n{"a": 2}]', 2, "expected ',', found '{'"),
        ('[{"a": 1},\n', 2, "the file ends there"),
        ('[{"a": 1}', 1, "expected ',', the file ends too early"),
        ('[{"a": 1},\n]', 2, "a comma before the end"),
        ('[{"a": 1},\n' + "[" * 100_000, 2, "nested too deeply"),
        ('[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", 2, "is not a row"),
        ('[\n"' + "x" * (3 * LINE_LIMIT) + '"]', 2, "is longer than 2,097,152 characters"),
        (b'[{"a": 1},\n{"a": "\xff"}]', 1, "is not UTF-8"),
        ('{"a": 1', 1, "the file ends too early"),
    ],
)
def test_what_is_no_json_ends_the_records_with_its_line(text: str | bytes, line: int, reason: str) -> None:
    *_, last = records(text)
    assert (last.line, last.value) == (line, None)
    assert reason in last.problem and last.problem.endswith("no row after it was read")


class Endless(io.RawIOBase):
    """An array of many records, made while it is read."""

    def __init__(self, count: int) -> None:
        self._pieces: Iterator[bytes] = iter([b"[", *[b'{"text": "' + b"x" * 1000 + b'"},\n'] * count, b"{}]"])
        self._held = b""

    def read(self, size: int = -1) -> bytes:
        while len(self._held) < size and (piece := next(self._pieces, b"")):
            self._held += piece
        given, self._held = self._held[:size], self._held[size:]
        return given


def test_a_large_array_takes_little_memory() -> None:
    tracemalloc.start()
    count = sum(1 for _ in json_records(Endless(20_000)))  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_001
    assert peak < 2 << 20
