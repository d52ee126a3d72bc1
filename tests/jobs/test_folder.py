"""A job's folder has rows as conversations, the job's files and a page; nothing is left where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.config import JobConfig
from edgetune.errors import DataError, UsageError
from edgetune.jobs.folder import README, TRAIN, VALID, Job, write_job

JOB = Job({"job.json": {"type": "command"}}, "# page\n", "FROM python:3.11\n")
ROWS = {
    "messages": {"messages": [{"role": "user", "content": "Is it on?"}, {"role": "assistant", "content": "It is."}]},
    "completion": {"prompt": "Is it on?", "completion": "It is."},
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_every_kind_become_conversations(tmp_path: Path, kind: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"\ufeff{json.dumps(ROWS[kind] | {'id': 3})}\n", encoding="utf-8")
    made = write_job(JOB, rows, rows, tmp_path / "job", JobConfig())
    assert (made.rows, made.valid_rows) == (1, 1)
    assert made.files == sorted([README, "job.json", TRAIN, VALID, "environment"])
    for name in (TRAIN, VALID):
        assert [json.loads(line) for line in (made.path / name).read_text().splitlines()] == [ROWS["messages"]]
    assert json.loads((made.path / "job.json").read_text()) == {"type": "command"}


def test_what_is_no_conversation_leaves_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: is a text, and the platforms train conversations"):
        write_job(JOB, rows, None, tmp_path / "job", JobConfig())
    rows.write_text('{"prompt": "a"}\n{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*\n.*rows\.jsonl:2: "):
        write_job(JOB, rows, None, tmp_path / "job", JobConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_only_a_job_is_replaced(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps(ROWS['messages'])}\n")
    write_job(JOB, rows, None, tmp_path / "job", JobConfig())
    with pytest.raises(UsageError):
        write_job(JOB, rows, None, tmp_path / "job", JobConfig())
    assert write_job(JOB, rows, rows, tmp_path / "job", JobConfig(force=True)).valid_rows == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UsageError):
        write_job(JOB, rows, None, tmp_path / "mine", JobConfig(force=True))
    assert (tmp_path / "mine" / "letter.txt").exists()
