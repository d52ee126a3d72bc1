"""The same prompts answered before and after a training, as a person wrote them down or a program did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.data.source import SourceError, name_of, open_source
from edgetune.errors import DataError

KEYS = ("prompt", "before", "after")
MOST_ANSWERS = 100
"""That a page shows."""
LONGEST_TEXT = 2000
"""Characters of a text that a page shows."""
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Answers:
    """A prompt and what was answered."""

    prompt: str
    before: str
    """By the base, or an adapter of before."""
    after: str


def read_answers(path: Path) -> list[Answers]:
    """Read JSONL rows of `prompt`, `before` and `after`; further keys are passed over.

    Raises:
        UsageError: Nothing can be read there.
        DataError: Rows are not of that kind.
    """
    problems: list[str] = []
    answers: list[Answers] = []
    with open_source(path) as stream:
        try:
            for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE + 1), b""), 1):
                read, found = _read(line)
                problems += [f"{name_of(path)}:{number}: {problem}" for problem in found]
                answers += read
                if len(line) > _LONGEST_LINE:
                    break
        except SourceError as error:
            problems.append(f"{name_of(path)}: {error}")
    if problems:
        raise DataError(problems)
    if not answers:
        raise DataError([f'{name_of(path)}: no rows; expected lines such as {{"prompt": …, "before": …, "after": …}}'])
    return answers


def _read(line: bytes) -> tuple[list[Answers], list[str]]:
    """What stands in a line, if anything does, and all that is wrong with it."""
    if len(line) > _LONGEST_LINE:
        return [], [f"has more than {_LONGEST_LINE:,} bytes, and so have no answers"]
    if not line.strip():
        return [], []
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return [], [f"not valid JSON ({error})"]
    if not isinstance(value, dict):
        return [], [f"expected a JSON object, found {type(value).__name__}"]
    wrong = [
        f'"{key}" is {value.get(key)!r:.40}, expected a text' for key in KEYS if not isinstance(value.get(key), str)
    ]
    return [] if wrong else [Answers(*(value[key] for key in KEYS))], wrong
