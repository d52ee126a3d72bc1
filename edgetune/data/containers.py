"""Records of any file that people keep training data in: JSONL, JSON, tables as CSV and Parquet."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO

from edgetune.data.forms import ROWS_KEYS, delimiter_of, foreign_file, is_cut_short, is_table
from edgetune.data.json_lines import LINE_LIMIT, Line, decoded, lines_of, parsed
from edgetune.data.json_stream import Record, json_records
from edgetune.data.problems import RowError, quoted
from edgetune.data.source import Kept, Source, SourceError, name_of, open_source
from edgetune.errors import DataError, MissingDependencyError

_HEAD = 2 * LINE_LIMIT
"""Bytes by which a file is told: a line that is not longer than a row may be is in it."""
_PARQUET = b"PAR1"
_BATCH_ROWS = 256
"""Of a Parquet file that are held at a time."""


class Container(StrEnum):
    """What holds the records."""

    JSONL = "JSONL"
    JSON = "JSON"
    CSV = "CSV"
    PARQUET = "Parquet"


def container_of(source: Source) -> Container:
    """What a file is, by its first bytes.

    Raises:
        UsageError: Nothing can be read there.
        DataError: It is nothing that records can be read from.
    """
    with open_source(source) as file:
        try:
            head = file.read(_HEAD)
        except SourceError as error:
            raise DataError([f"{name_of(source)}:1: {error}"]) from error
    if head.startswith(_PARQUET):
        return Container.PARQUET
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not head:
        raise DataError([f"{name_of(source)}:1: the file has no rows"])
    if form := foreign_file(head):
        raise DataError([f"{name_of(source)}:1: {form.told(source)}"])
    first = next(lines_of(BytesIO(head)))
    if first.problem and first.raw[:1] not in (b"[", b"{"):
        raise DataError([f"{name_of(source)}:1: {first.problem}"])
    if head.startswith(b"["):
        return Container.JSON
    if head.startswith(b"{"):
        over_lines = bool(first.problem) or is_cut_short(first.raw)
        second = _second(head)
        if second is None:
            return Container.JSON if first.problem or _holds_rows(first) else Container.JSONL
        return Container.JSON if over_lines and not _is_row(second) else Container.JSONL
    try:
        header = decoded(first.raw)
    except RowError as error:
        raise DataError([f"{name_of(source)}:1: {error}"]) from error
    if delimiter_of(header) or is_table(name_of(source)):
        return Container.CSV
    raise DataError(
        [
            f"{name_of(source)}:1: is neither JSON, JSONL, CSV nor Parquet: its first line is {quoted(header)}; "
            "expected one object a line, an array of objects, or a table whose first line names its columns"
        ]
    )


def records_of(source: Source, container: Container) -> Iterator[Record]:
    """The records of a file, one at a time, and what is wrong where there is none.

    Args:
        source: What `container_of` was asked about.
        container: What it is.

    Raises:
        UsageError: Nothing can be read there.
        DataError: A Parquet file that cannot be read.
        MissingDependencyError: It is a Parquet file, and pyarrow is not installed.
    """
    if container is Container.PARQUET:
        yield from _parquet_records(source)
        return
    with open_source(source) as file:
        match container:
            case Container.JSONL:
                yield from _line_records(file)
            case Container.JSON:
                yield from json_records(file)
            case _:
                yield from _csv_records(file)


def _is_row(line: Line | None) -> bool:
    """Whether a line is an object of its own."""
    return isinstance(_value_of(line), dict)


def _holds_rows(line: Line) -> bool:
    """Whether a line is an object that has all rows in a field."""
    value = _value_of(line)
    return isinstance(value, dict) and any(isinstance(value.get(key), list) for key in ROWS_KEYS)


def _value_of(line: Line | None) -> Any:
    try:
        return None if line is None else parsed(line)
    except RowError:
        return None


def _second(head: bytes) -> Line | None:
    """The second line: where it is an object, the first one is a row with a fault."""
    lines = lines_of(BytesIO(head))
    next(lines)
    return next(lines, None)


def _line_records(file: BinaryIO) -> Iterator[Record]:
    for line in lines_of(file):
        try:
            yield Record(line.number, parsed(line))
        except RowError as error:
            yield Record(line.number, problem=str(error))


class _Lines:
    """Text lines of a file for `csv`, which asks for one after the other, and where the last one stood."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._file.readline(LINE_LIMIT + 1)
        if not raw:
            raise StopIteration
        self.number += 1
        if len(raw) > LINE_LIMIT:
            raise RowError(f"is longer than {LINE_LIMIT:,} bytes; split it into several rows")
        if self.number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        return decoded(raw)


def _csv_records(file: BinaryIO) -> Iterator[Record]:
    lines = _Lines(file)
    try:
        header = next(lines)
        while not header.strip():
            header = next(lines)
        names = next(csv.reader([header], delimiter=delimiter_of(header) or ","))
        if problem := _wrong_header(names):
            yield Record(lines.number, problem=problem)
            return
        csv.field_size_limit(LINE_LIMIT)
        reader = csv.reader(lines, delimiter=delimiter_of(header) or ",", strict=True)
        while True:
            begin = lines.number + 1
            try:
                cells = next(reader)
            except csv.Error as error:
                yield Record(begin, problem=f"is no row of a table: {error}; is a quote open? No row after it was read")
                return
            if len(cells) == len(names):
                yield Record(begin, dict(zip(names, cells, strict=True)))
            elif cells:
                few = f"has {len(cells)} cells, and the first line names {len(names)}; quote a cell that has a comma"
                yield Record(begin, problem=few)
    except StopIteration:
        return
    except (RowError, SourceError) as error:
        yield Record(lines.number, problem=f"{error}; no row after it was read")


def _wrong_header(names: list[str]) -> str:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        return f"names the column {quoted(twice)} twice; rename one"
    return "" if any(name.strip() for name in names) else "names no column"


def _parquet_records(source: Source) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            f'{name_of(source)} is a Parquet file, which pyarrow reads; install it with `pip install "edgetune[data]"`'
        ) from error
    opened: Path | IO[bytes] = source.file if isinstance(source, Kept) else source
    number = 0
    try:
        if isinstance(source, Kept):
            source.file.seek(0)
        for batch in parquet.ParquetFile(opened).iter_batches(batch_size=_BATCH_ROWS):
            for record in batch.to_pylist():
                number += 1
                yield Record(number, _without_nulls(record))
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError([f"{name_of(source)}:{number + 1}: the Parquet file is damaged ({reason:.200})"]) from error


def _without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the fields that other records have: a column holds a null where a row has none."""
    return {key: value for key, value in record.items() if value is not None}
