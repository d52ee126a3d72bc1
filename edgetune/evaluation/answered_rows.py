"""The file of answered rows: one JSON object a line, which another evaluation compares itself with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from edgetune.data.rows import ROLES, Message
from edgetune.errors import DataError
from edgetune.evaluation.measurement import AnsweredRow
from edgetune.formats.storage import atomic_file

_KINDS: dict[str, tuple[type, ...]] = {
    "line": (int,),
    "prompt": (str, list),
    "reference": (str,),
    "answer": (str, type(None)),
    "loss": (int, float, type(None)),
    "tokens": (int, type(None)),
    "scores": (dict,),
}
"""Types of what each key holds."""


def write_answered_rows(path: Path, rows: Sequence[AnsweredRow]) -> None:
    """Write rows with answers and scores; the file appears whole.

    Raises:
        UsageError: There is a file already, or it cannot be written.
        NoRoomError: The disk has less room than is needed.
    """
    with atomic_file(path) as file:
        for row in rows:
            record = asdict(row)
            if not isinstance(row.prompt, str):
                record["prompt"] = [_written(message) for message in row.prompt]
            file.write(f"{json.dumps(record)}\n".encode("ascii"))


def read_answered_rows(path: Path) -> list[AnsweredRow]:
    """Read what `write_answered_rows` wrote.

    Raises:
        DataError: Naming each line that is none of them.
    """
    rows, problems = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError([f"{path}: is not UTF-8; expected what --rows-output wrote"]) from error
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: {error}; expected a line that --rows-output wrote")
    if problems:
        raise DataError(problems)
    return rows


def _row(record: Any) -> AnsweredRow:
    if not isinstance(record, dict) or record.keys() != _KINDS.keys():
        raise ValueError(f"is no object with the keys {', '.join(_KINDS)}")
    for key, kinds in _KINDS.items():
        if not isinstance(record[key], kinds) or isinstance(record[key], bool):
            raise ValueError(f"{key} is {record[key]!r:.40}")
    prompt = record["prompt"]
    return AnsweredRow(**record | {"prompt": prompt if isinstance(prompt, str) else tuple(map(_message, prompt))})


def _written(message: Message) -> dict[str, Any]:
    """A turn as an object, without what is as in most turns."""
    said = {each.name: (getattr(message, each.name), each.default) for each in fields(message)}
    return {name: value for name, (value, usual) in said.items() if value != usual}


def _message(record: Any) -> Message:
    kinds = {"role": str, "content": str, "trained": bool, "tools": str}
    if (
        not isinstance(record, dict)
        or not {"role", "content"} <= record.keys() <= kinds.keys()
        or not all(isinstance(value, kinds[key]) for key, value in record.items())
        or record["role"] not in ROLES
    ):
        raise ValueError(f"a message of the prompt is {record!r:.60}")
    return Message(**record)
