"""Answered rows: what was written is read, whole, and nothing else is taken for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.data.rows import Message
from edgetune.errors import DataError, UsageError
from edgetune.evaluation.answered_rows import read_answered_rows, write_answered_rows
from edgetune.evaluation.measurement import AnsweredRow

ROW = AnsweredRow(
    3, (Message("system", "short"), Message("user", "größer?")), "ja", "nein", 0.5, 7, {"bleu": 0.0, "accuracy": 1.0}
)
BARE = AnsweredRow(4, "raw prompt", " and so on")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write_answered_rows(path, [ROW, BARE])
    assert read_answered_rows(path) == [ROW, BARE]
    assert [each.name for each in path.parent.iterdir()] == ["rows.jsonl"]
    with pytest.raises(UsageError, match="already exists"):
        write_answered_rows(path, [BARE])
    assert read_answered_rows(path) == [ROW, BARE]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write_answered_rows(tmp_path / "file" / "rows.jsonl", [ROW])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 3}, "answer is 3"),
        ({"tokens": True}, "tokens is True"),
        ({"prompt": [{"role": "teacher", "content": "x"}]}, "a message of the prompt is"),
        ({"prompt": [{"role": "user"}]}, "a message of the prompt is"),
        ({"more": 1}, "is no object with the keys"),
    ],
)
def test_what_is_no_answered_row_is_refused_with_its_line(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "rows.jsonl"
    write_answered_rows(path, [replace(ROW, scores={})])
    record = json.loads(path.read_text())
    path.write_text(f"{json.dumps(record)}\n{json.dumps(record | change)}\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {said}"):
        read_answered_rows(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_answered_rows(path)
