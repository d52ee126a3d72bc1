"""What a file of rows is, counted by hand on a model whose tokens are words."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.data.check import Lengths, SameRows, WordyRow, check
from edgetune.errors import DataError
from edgetune.formats.bundle import Bundle
from edgetune.formats.manifest import RowEncoding
from support.golden import BUNDLE, TRAIN
from support.tiny_bundle import MAX_LENGTH, make_bundle, write_rows

MANY = " a b c d e f g h i j k l m"
ROWS = [
    {"prompt": "a", "completion": " b c"},  # 4 tokens with the end, 3 of them trained
    {"prompt": "a", "completion": " b c"},
    {"prompt": "a", "completion": MANY},  # 15 tokens, 3 more than the bundle takes
    {"prompt": MANY, "completion": " b"},  # the answer begins after the cut
    {"prompt": "d", "completion": " e"},
    {"prompt": "", "completion": "b"},  # 2 tokens for a word
]
VALID = [{"prompt": "m", "completion": " l"}, {"prompt": "d", "completion": " e"}]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "rows"
    made.mkdir()
    write_rows(made / "train.jsonl", ROWS)
    write_rows(made / "valid.jsonl", VALID)
    return made


def test_rows_are_counted(bundle: Bundle, folder: Path) -> None:
    found = check(folder, bundle)
    assert (found.path, found.kind, found.rows) == (str(folder / "train.jsonl"), "prompt/completion", 6)
    assert (found.tokens, found.trained_tokens) == (4 + 4 + 15 + 15 + 3 + 2, 3 + 3 + 14 + 2 + 2 + 1)
    assert found.trained_share == 25 / 43
    assert (found.shortest, found.longest, found.max_length) == (2, 15, MAX_LENGTH)
    assert found.lengths == [Lengths(2, 2, 1), Lengths(3, 4, 3), Lengths(5, 8, 0), Lengths(9, 16, 2)]
    assert (found.too_long, found.cut_tokens, found.cut_away) == (2, 6, 1)
    assert (found.duplicates, found.first_duplicates) == (1, [SameRows(2, 1)])
    assert (found.in_valid, found.first_in_valid) == (1, [SameRows(2, 5)])
    assert found.wordiest[0] == WordyRow(6, 2, 1)
    assert len(found.wordiest) == 5
    other = write_rows(folder / "other.jsonl", VALID[:1])
    assert check(folder, bundle, valid=other).in_valid == 0, "what is named is taken, not the folder's"


def conversation(*answers: str, weight: int = 1) -> str:
    turns = [
        turn
        for answer in answers
        for turn in ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer, "weight": weight})
    ]
    return json.dumps({"messages": [*turns, {"role": "assistant", "content": "ok"}]}) + "\n"


def test_conversations_are_counted_by_role_and_control_tokens_are_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(conversation("a") + conversation("b <|end|>", "c", weight=0))
    said: list[str] = []
    found = check(path, BUNDLE, say=said.append)
    assert (found.kind, found.messages, found.untrained_answers) == ("messages", {"user": 3, "assistant": 5}, 2)
    assert (found.control_token_rows, found.first_control_token_rows) == (1, [2])
    assert len(said) == 1 and f"{path}:2: messages spell control tokens" in said[0]
    as_text = check(path, BUNDLE, encoding=RowEncoding(content_as_text=True))
    assert (as_text.control_token_rows, as_text.first_control_token_rows) == (0, [])


def test_bad_rows_are_named(bundle: Bundle, folder: Path) -> None:
    (folder / "valid.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError, match=r"valid.jsonl:1: completion is empty"):
        check(folder, bundle)


def test_the_command_prints_a_table_with_bars_or_an_object(bundle: Bundle, folder: Path) -> None:
    shown = run("data", "check", folder, "--bundle", bundle.path)
    assert shown.exit_code == 0, shown.stderr
    lines = {line.split("  ")[0].strip(): line for line in shown.stdout.splitlines()}
    assert "25 tokens, 58.1%" in lines["trained"]
    assert "2 rows have more than 12 tokens; --truncate cuts 6 tokens off, and 1 rows" in lines["too long"]
    assert lines["duplicates"].strip().endswith("  1 rows: line 2 is line 1")
    assert "1 rows: line 2 is line 5" in lines["also in valid"]
    bars = {line.split()[0]: line.count("#") for line in shown.stdout.splitlines() if " to " in line and "#" in line}
    assert bars == {"2": 14, "3": 40, "9": 27}
    printed = json.loads(run("data", "check", folder, "--bundle", bundle.path, "--json").stdout)
    assert printed["trained_share"] == pytest.approx(25 / 43)
    assert printed["lengths"][0] == {"least": 2, "most": 2, "rows": 1}
    single = run("data", "check", TRAIN, "--bundle", BUNDLE)
    assert "also in" not in single.stdout
    assert run("data", "check", folder).exit_code == 2


def test_of_a_row_no_more_than_a_hash_is_kept(bundle: Bundle, tmp_path: Path) -> None:
    peaks = []
    for count in (1_000, 3_000):
        path = tmp_path / f"{count}.jsonl"
        letters = [" ".join("abcdefghij"[int(digit)] for digit in f"{number:05}" * 40) for number in range(count)]
        write_rows(path, [{"prompt": "a", "completion": f" {text}"} for text in letters])
        tracemalloc.start()
        assert check(path, bundle).duplicates == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 2_000 < 300, "bytes a row; its tokens alone take 1,600"
