"""Answers before and after are read from JSONL, and all that is wrong is named with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from edgetune.errors import DataError, UsageError
from edgetune.reporting.answers import Answers, read_answers

GOOD = '{"prompt": "p", "before": "", "after": "a", "more": 1}\n'


def test_rows_are_read_packed_as_well(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text(f"{GOOD}\n{GOOD}")
    (tmp_path / "packed").write_bytes(gzip.compress(GOOD.encode()))
    assert read_answers(tmp_path / "plain") == [Answers("p", "", "a")] * 2
    assert read_answers(tmp_path / "packed") == [Answers("p", "", "a")]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("{\n", [":1: not valid JSON"]),
        ("[]\n", [":1: expected a JSON object, found list"]),
        (GOOD + '{"prompt": "p", "before": 3}\n', [':2: "before" is 3, expected a text', ':2: "after" is None']),
        ("[" * 10_000, [":1: not valid JSON"]),
        ('{"prompt": "' + "x" * (2 << 20) + '"}\n{', [":1: has more than 1,048,576 bytes"]),
        ("\n", [": no rows; expected lines such as"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, rows: str, told: list[str]) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(rows)
    with pytest.raises(DataError) as error:
        read_answers(path)
    assert len(error.value.problems) == len(told)
    for problem, expected in zip(error.value.problems, told, strict=True):
        assert problem.startswith(f"{path}{expected}")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_answers(tmp_path / "none.jsonl")
