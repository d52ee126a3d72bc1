"""Forms of training data that are not edgetune's own: how each is told, and what its fields are called."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from edgetune.data.json_lines import Line
from edgetune.data.problems import FormError, RowError, quoted
from edgetune.data.source import SourceError

MAGIC: dict[bytes, tuple[str, str]] = {
    b"PAR1": ("is a Parquet file", ""),
    b"PK\x03\x04": ("is a zip archive or a spreadsheet", "unpack it, or save the sheet as CSV"),
    b"ARROW1": ("is an Arrow file", "save it as Parquet or JSONL"),
    b"BZh": ("is packed with bzip2", "unpack it, or pack it with gzip"),
    b"\xfd7zXZ\0": ("is packed with xz", "unpack it, or pack it with gzip"),
    b"\x28\xb5\x2f\xfd": ("is packed with Zstandard", "unpack it, or pack it with gzip"),
    b"SQLite format 3\0": ("is an SQLite database", "save the table as CSV"),
    b"\x89HDF": ("is an HDF5 file", "save it as Parquet or JSONL"),
    b"%PDF": ("is a PDF document", "write its text as rows"),
    b"\x80": ("is a Python pickle, which could run code", "save it as JSONL where it was made"),
    b"version https://git-lfs": ("is a pointer of Git LFS, not the file itself", "fetch it with `git lfs pull`"),
    b"<!DOCTYPE": ("is a web page, perhaps that of a failed download", "download the file itself"),
    b"<html": ("is a web page, perhaps that of a failed download", "download the file itself"),
}
"""What files begin with that are no text of rows, what they are, and what to do; nothing where they are converted."""
PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input", "user", "human", "request", "utterance")
"""What people call the column of the prompt, the usual names first."""
COMPLETION_NAMES = ("completion", "response", "answer", "output", "assistant", "reply", "target", "bot", "gpt")
"""What people call the column of the answer."""
SYSTEM_NAMES = ("system", "system_prompt")
"""What people call the column of the system's text."""
PREFERENCES = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
CONVERSATIONS = ("conversations", "conversation")
ROWS_KEYS = ("data", "rows", "train", "examples", "items")
"""What people call the field of an object that holds all rows."""
_DELIMITERS = (",", ";", "\t", "|")
_PREFERENCE = FormError(
    "holds preference rows, of answers that are better and worse, and edgetune trains on answers alone",
    advice='write the good ones as {"messages": [...]} or {"prompt": ..., "completion": ...}',
)


def refuse_foreign_file(line: Line, file: BinaryIO, name: str) -> None:
    """Tell what a file is by its first line that is not blank, where it cannot be JSONL.

    Args:
        line: That line.
        file: Where the next one would be read.
        name: The file's.

    Raises:
        FormError: It is something else.
    """
    raw = line.raw.lstrip()
    if isinstance(found := foreign_file(raw), FormError):
        raise found
    if raw.startswith(b"["):
        raise FormError("is a JSON array, not a row a line")
    if raw.startswith(b"{"):
        if not line.problem and is_cut_short(raw) and _goes_on(raw, _following(file)):
            raise FormError("is JSON over several lines, not a row a line")
    elif not line.problem:
        begin = raw[:200].decode("utf-8", "replace")
        if delimiter_of(begin) and (is_table(name) or guess_columns(cells_of(begin))):
            raise FormError("is a table (CSV), not JSONL")


def foreign_file(begin: bytes) -> FormError | None:
    """What a file is that is no text, by its first bytes; none where it may be text."""
    return next((FormError(what, advice=fix) for magic, (what, fix) in MAGIC.items() if begin.startswith(magic)), None)


def is_table(name: str) -> bool:
    """Whether a file's name is that of a table."""
    return name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


def delimiter_of(head: str) -> str:
    """What separates the cells of a table's first line; nothing where it has one cell."""
    counts = {delimiter: head.count(delimiter) for delimiter in _DELIMITERS}
    best = max(_DELIMITERS, key=lambda delimiter: counts[delimiter])
    return best if counts[best] else ""


def cells_of(head: str) -> list[str]:
    """The cells of a table's first line, roughly: enough to recognise names."""
    delimiter = delimiter_of(head)
    return [cell.strip().strip('"') for cell in head.splitlines()[0].split(delimiter)] if delimiter else []


def guess_columns(names: Iterable[str]) -> tuple[str, str] | None:
    """Which of some columns are the prompt and the completion, by what people call them; none where that is not sure.

    Of several that could be, the one that comes first in the lists is taken; one name cannot be both.
    """
    known = {name.strip().lower(): name for name in names}
    prompt = next((known[name] for name in PROMPT_NAMES if name in known), None)
    completion = next((known[name] for name in COMPLETION_NAMES if name in known), None)
    return None if prompt is None or completion is None else (prompt, completion)


def refuse_preference(record: Mapping[str, Any]) -> None:
    """Refuse a row that says which answer is better, or whether one is good.

    Raises:
        FormError: It is one.
    """
    judged = isinstance(record.get("label"), bool) and ("messages" in record or "completion" in record)
    if judged or "kto_tag" in record or any(set(pair) <= record.keys() for pair in PREFERENCES):
        raise _PREFERENCE


def is_alpaca(record: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of the Alpaca data."""
    return "instruction" in record and bool({"output", "response"} & record.keys())


def conversation_key(record: Mapping[str, Any]) -> str | None:
    """The field of a ShareGPT row that holds the turns; none where it is no such row."""
    return next((key for key in CONVERSATIONS if key in record), None)


def foreign_record(record: Mapping[str, Any]) -> FormError | None:
    """What an object is that is no row of edgetune's; none where nobody knows."""
    if conversation_key(record):
        return FormError("holds ShareGPT conversations, not rows of edgetune")
    if is_alpaca(record):
        return FormError("holds Alpaca rows (instruction, input, output), not rows of edgetune")
    if (pair := guess_columns(record)) and pair != ("prompt", "completion"):
        return FormError(f"has its prompts in {quoted(pair[0])} and its answers in {quoted(pair[1])}")
    if any(isinstance(record.get(key), list) for key in ROWS_KEYS):
        return FormError("holds its rows in a field of one object")
    return None


def is_cut_short(raw: bytes) -> bool:
    """Whether a line is JSON up to its end, where something is missing."""
    text = raw.decode("utf-8", "replace").rstrip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _goes_on(raw: bytes, following: bytes) -> bool:
    """Whether the next line can be what is missing of a line, and is no row of its own."""
    return bool(following) and (raw.rstrip().endswith(b"[") or not following.startswith(b"{"))


def _following(file: BinaryIO) -> bytes:
    """What the next line begins with, as far as it has been read already."""
    peek = getattr(file, "peek", None)
    try:
        return peek(1).lstrip() if peek is not None else b""
    except SourceError as error:
        raise RowError(str(error)) from error
