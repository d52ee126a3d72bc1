"""The folder of a job: rows, job files and a page with the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.config import JobConfig
from edgetune.data.problems import Problems
from edgetune.data.rows import ChatRow, CompletionRow, Row, read_rows
from edgetune.data.source import kept
from edgetune.errors import DataError, UsageError
from edgetune.formats.storage import atomic_folder, write_file

README = "README.md"
"""What the commands are in; it marks a folder that may be replaced."""
ENVIRONMENT, DOCKERFILE = "environment", "Dockerfile"
TRAIN, VALID = "train.jsonl", "valid.jsonl"
"""The rows. Kaito takes a file for JSON by its name."""
_NO_CONVERSATION = "is a text, and the platforms train conversations; write messages, or prompts and completions"


@dataclass(frozen=True)
class Job:
    """What a platform is given, beside the rows."""

    files: Mapping[str, Mapping[str, Any]]
    """Content of each JSON file by its name."""
    readme: str
    """Markdown: the commands to submit, to fetch and to import."""
    dockerfile: str | None = None
    """Of the image that it runs in, where that is to be built: in the folder `environment`, with edgetune's wheel."""


@dataclass(frozen=True)
class WrittenJob:
    """What was written."""

    path: Path
    files: list[str]
    rows: int
    valid_rows: int


def refuse(problems: list[str]) -> None:
    """End with all that a platform would refuse.

    Raises:
        UsageError: There is something.
    """
    if problems:
        raise UsageError("\n".join(problems))


def write_job(job: Job, data: Path, valid: Path | None, output: Path, config: JobConfig) -> WrittenJob:
    """Write a job's folder; it appears when all of it is there.

    Args:
        job: Files and page.
        data: JSONL rows to train on.
        valid: Rows to measure on, if any.
        output: The folder.
        config: Whether one that is there is replaced.

    Raises:
        UsageError: There are no such rows, or the output cannot be written.
        DataError: Naming every row that is none, or that is no conversation.
    """
    with atomic_folder(output, replace=config.force, marker=README) as folder:
        rows = _write_rows(data, folder / TRAIN)
        valid_rows = 0 if valid is None else _write_rows(valid, folder / VALID)
        for name, content in job.files.items():
            write_file(folder / name, f"{json.dumps(content, indent=2)}\n".encode())
        if job.dockerfile is not None:
            (folder / ENVIRONMENT).mkdir()
            write_file(folder / ENVIRONMENT / DOCKERFILE, job.dockerfile.encode())
        write_file(folder / README, job.readme.encode())
        files = sorted(path.name for path in folder.iterdir())
    return WrittenJob(output, files, rows, valid_rows)


def _write_rows(data: Path, target: Path) -> int:
    """Write conversations, which every platform takes, of rows of any kind that is one."""
    count = 0
    with kept(data) as source, target.open("wb") as file:
        problems = Problems(source)
        for row in read_rows(source, problems):
            messages = list(_messages(row))
            if not messages:
                raise DataError([f"{data}:{row.line}: {_NO_CONVERSATION}"])
            file.write(json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n")
            count += 1
        problems.raise_if_any()
    return count


def _messages(row: Row) -> Iterator[dict[str, str]]:
    match row:
        case ChatRow():
            yield from ({"role": message.role, "content": message.content} for message in row.messages)
        case CompletionRow():
            yield {"role": "user", "content": row.prompt}
            yield {"role": "assistant", "content": row.completion}
