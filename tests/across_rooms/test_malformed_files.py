"""A hundred files that are wrong, each in its own way: a few lines say what is wrong, and nothing ever crashes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from support.golden import BUNDLE

MOST_LINES = 25
LEAST_FILES = 100


BOTH = "the same"
"""`data convert` says what `train` says."""


class Wrong(NamedTuple):
    """A file, what `train` says of it, and what `data convert` says; it makes rows of it where that is None.

    Of words between `|` one is enough: which it is depends on what is installed.
    """

    content: bytes | str
    train: str
    convert: str | None = BOTH


U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TEXT, CHAT = '{"text": "a"}', json.dumps({"messages": [U, A]})
ARRAY, TABLE = "is a JSON array, not a row a line", "is a table (CSV), not JSONL"
CUT = "no row after it was read"


def line(record: Any) -> str:
    return json.dumps(record) + "\n"


def chat(*messages: Any, **further: Any) -> str:
    return line({"messages": messages, **further})


def parts(*given: Any) -> str:
    return chat({"role": "user", "content": list(given)}, A)


PACKED = gzip.compress(b"".join(b'{"text": "row %d"}\n' % number for number in range(500)))

FILES: dict[str, Wrong] = {
    # Bytes
    "nothing at all": Wrong("", "the file has no rows"),
    "blank lines only": Wrong("\n  \n\r\n", "the file has no rows"),
    "a byte order mark only": Wrong("\ufeff", "the file has no rows"),
    "UTF-16 with its mark": Wrong(TEXT.encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": Wrong(TEXT.encode("utf-16-le"), "has a NUL byte at byte 2", "is neither|NUL byte"),
    "UTF-32": Wrong(TEXT.encode("utf-32"), "the file is UTF-16|NUL", "the file is UTF-16|NUL"),
    "Latin-1": Wrong('{"text": "é"}'.encode("latin-1"), "is not UTF-8: "),
    "Shift-JIS": Wrong('{"text": "日本"}'.encode("shift-jis"), "is not UTF-8: "),
    "half a character at the end": Wrong(b'{"text": "a\xe2\x82', "is not UTF-8: "),
    "an overlong character": Wrong(b'{"text": "\xc0\xaf"}', "is not UTF-8: "),
    "a NUL": Wrong(b'{"text": "a\0"}', "has a NUL byte at byte 12"),
    "NULs after a crash": Wrong(TEXT + "\n" + "\0" * 4096, ":2: has a NUL byte at byte 1"),
    "a mark in the middle": Wrong(f"{TEXT}\n\ufeff{TEXT}\n", ":2: is not valid JSON"),
    "a line of two megabytes": Wrong(
        '{"text": "' + "x" * (2 << 20) + '"}', "is longer than 1,048,576 bytes", "is longer than 2,097,152"
    ),
    "an endless line without a row": Wrong("x" * (2 << 20), "is longer than 1,048,576 bytes"),
    # Other kinds of files
    "a Parquet file without an end": Wrong(b"PAR1" + bytes(100), "is a Parquet file", "is damaged|pyarrow"),
    "a zip archive": Wrong(b"PK\x03\x04" + bytes(60), "is a zip archive or a spreadsheet; unpack it"),
    "an Arrow file": Wrong(b"ARROW1\0\0" + bytes(60), "is an Arrow file; save it as Parquet or JSONL"),
    "bzip2": Wrong(b"BZh91AY&SY" + bytes(20), "is packed with bzip2; unpack it"),
    "xz": Wrong(b"\xfd7zXZ\0" + bytes(20), "is packed with xz; unpack it"),
    "Zstandard": Wrong(b"\x28\xb5\x2f\xfd" + bytes(20), "is packed with Zstandard; unpack it"),
    "SQLite": Wrong(b"SQLite format 3\0" + bytes(100), "is an SQLite database; save the table as CSV"),
    "HDF5": Wrong(b"\x89HDF\r\n\x1a\n" + bytes(40), "is an HDF5 file"),
    "a PDF": Wrong(b"%PDF-1.7\n%\xe2\xe3", "is a PDF document"),
    "a pickle": Wrong(b"\x80\x04\x95\x00\n", "is a Python pickle, which could run code"),
    "a pointer of Git LFS": Wrong("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "a web page": Wrong("<!DOCTYPE html>\n<html>\n</html>\n", "is a web page, perhaps that of a failed download"),
    "prose": Wrong("Once upon a time\n" * 3_000, "is not valid JSON", "is neither JSON, JSONL, CSV nor Parquet"),
    "prose with commas": Wrong("Once, upon a time\n" * 3_000, "is not valid JSON", "nobody knows which is the prompt"),
    "YAML": Wrong("- text: a\n- text: b\n", "is not valid JSON", "is neither JSON"),
    "TOML": Wrong('text = "a"\n', "is not valid JSON", "is neither JSON"),
    "gzip that is cut": Wrong(PACKED[:-9], "the gzip data ends too early"),
    "gzip that is damaged": Wrong(PACKED[:40] + bytes(60) + PACKED[100:], "the gzip data is damaged"),
    "gzip of nothing": Wrong(gzip.compress(b""), "the file has no rows"),
    "gzip of one letter many times": Wrong(gzip.compress(b"x" * (40 << 20)), "is longer than|200 times its size"),
    # JSON
    "a row that is cut": Wrong('{"text": "a', "is not valid JSON: Unterminated string"),
    "a row that is cut after the colon": Wrong('{"text":', "is not valid JSON: Expecting value"),
    "the last of many rows is cut": Wrong(f'{TEXT}\n{{"text": "a', ":2: is not valid JSON: Unterminated string"),
    "single quotes": Wrong("{'text': 'a'}", "is not valid JSON: Expecting property name"),
    "no quotes": Wrong("{text: a}", "is not valid JSON: Expecting property name"),
    "a comma too many": Wrong('{"text": "a",}', "is not valid JSON"),
    "a comma too few": Wrong('{"prompt": "a" "completion": "b"}', "is not valid JSON: Expecting ',' delimiter"),
    "two objects in a line": Wrong(TEXT + TEXT, "is not valid JSON: Extra data"),
    "a comma after each row": Wrong(f"{TEXT},\n{TEXT},\n", "is not valid JSON: Extra data", "is not valid JSON"),
    "a comment": Wrong(f"{TEXT}\n// the end\n", ":2: is not valid JSON"),
    "a line break in a string": Wrong('{"text": "a\nb"}', "is not valid JSON"),
    "a tab in a string": Wrong('{"text": "a\tb"}', "is not valid JSON: Invalid control character"),
    "an escape that is none": Wrong('{"text": "\\x41"}', "is not valid JSON: Invalid \\escape"),
    "NaN": Wrong('{"text": NaN}', "NaN is not a JSON value"),
    "half a character": Wrong('{"text": "\\ud83d"}', "has half a surrogate pair"),
    "a key twice": Wrong('{"text": "a", "text": "b"}', 'has the key "text" twice'),
    "a number of thousands of digits": Wrong('{"text": ' + "9" * 5000 + "}", "is not a row: Exceeds the limit"),
    "brackets without end": Wrong(TEXT + "\n" + '{"a":' * 100_000, ":2: is nested too deeply"),
    # Values that are no rows
    "a list a line": Wrong('["a", "b"]\n["c", "d"]\n', ARRAY, "holds no objects"),
    "numbers": Wrong("1\n2\n", "found a number", "is neither JSON"),
    "strings": Wrong('"a"\n"b"\n', "found a string", "is neither JSON"),
    "null": Wrong("null\n", "found null", "is neither JSON"),
    "a list among rows": Wrong(f"{TEXT}\n[1]\n", ":2: expected an object"),
    "an empty object": Wrong("{}\n", "is an empty object", "nobody knows which is the prompt|has the columns"),
    "unknown keys": Wrong('{"phrase": "a", "tone": "b"}\n', "and none of a row", 'the columns "phrase", "tone"'),
    "a key that is misspelt": Wrong('{"mesages": []}\n', 'did you mean "messages"?', "the columns"),
    "a key in capitals": Wrong('{"Text": "a"}\n', 'did you mean "text"?', "the columns"),
    "half a row": Wrong('{"prompt": "a"}\n', 'lacks the key "completion"', "the columns"),
    "kinds that are mixed": Wrong(
        f"{TEXT}\n{CHAT}\n", ":2: is a messages row, but the rows before are text", ":2: lacks the key"
    ),
    "text that is a number": Wrong('{"text": 3}', "text must be a string, found a number"),
    "text that is null": Wrong('{"text": null}', "text must be a string, found null"),
    "text that is empty": Wrong('{"text": ""}', "text is empty"),
    "a completion of white space": Wrong('{"prompt": "a", "completion": " \\n"}', "completion is empty"),
    "a prompt that is an object": Wrong(
        '{"prompt": {}, "completion": "a"}', "prompt must be a string, found an object"
    ),
    # Conversations
    "no list": Wrong(
        '{"messages": "Hi"}', '"messages" must be a list, found a string', "messages must be a list, found a string"
    ),
    "no message": Wrong(chat(), "has no assistant message"),
    "no answer": Wrong(chat(U), "has no assistant message"),
    "an answer that is empty": Wrong(chat(U, A | {"content": ""}), "messages[1].content is empty"),
    "an answer that is null": Wrong(
        chat(U, A | {"content": None}),
        "messages[1].content must be a string, found null",
        "messages[1].content is empty",
    ),
    "a message that is a string": Wrong(chat("Hi", A), "messages[0] must be an object"),
    "a role that nobody has": Wrong(
        chat({"role": "ai", "content": "a"}, A),
        "messages[0].role must be one of",
    ),
    "a role that is a number": Wrong(chat({"role": 1, "content": "a"}, A), "messages[0].role must be one of"),
    "no role": Wrong(chat({"content": "a"}, A), 'messages[0] lacks the key "role"'),
    "no content": Wrong(chat({"role": "user"}, A), 'messages[0] lacks the key "content"', None),
    "content that is an object": Wrong(
        chat({"role": "user", "content": {}}, A),
        "content must be a string, found an object",
        "messages[0].content must be a list, found an object",
    ),
    "a key of a message that is misspelt": Wrong(chat(U, A | {"wieght": 0}), 'did you mean "weight"?', None),
    "more messages than a conversation has": Wrong(chat(*[U, A] * 501), "at most 1,000 are taken"),
    "half a weight": Wrong(chat(U, A | {"weight": 0.5}), 'found "0.5"', 'found the weight "0.5"'),
    "a weight in words": Wrong(chat(U, A | {"weight": "no"}), 'found "no"', 'found the weight "no"'),
    "no answer that is trained": Wrong(chat(U, A | {"weight": 0}), 'every assistant message has "weight" 0'),
    "an image": Wrong(parts({"type": "image_url", "image_url": {}}), 'of the type "image_url"', 'found "image_url"'),
    "a part without a type": Wrong(parts({"text": "a"}), "is of the type null", "must be a part of the type text"),
    "a part that is no text": Wrong(
        parts({"type": "text", "text": 3}),
        "content[0].text must be a string, found a number",
        "must be a part of the type text, found a number",
    ),
    "a part that is a string": Wrong(
        parts("a"), "content[0] must be an object", "must be a part of the type text, found a string"
    ),
    # What needs a decision
    "preferences": Wrong('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 900, "holds preference rows"),
    "preferences among rows": Wrong(f'{TEXT}\n{{"chosen": "a", "rejected": "b"}}\n', ":2: holds preference rows"),
    "judged answers": Wrong(chat(U, A, label=False) * 900, "holds preference rows"),
    "tools without a model": Wrong(chat(U, A, tools=[{"name": "a"}]) * 900, "has tools", "--bundle BUNDLE"),
    "calls without a model": Wrong(
        chat(U, {"role": "assistant", "tool_calls": [{}]}) * 900, "has tool calls", "--bundle BUNDLE"
    ),
    "old calls without a model": Wrong(
        chat(U, {"role": "assistant", "function_call": {"name": "a"}}), "has tool calls", "--bundle BUNDLE"
    ),
    # Other forms, which have faults of their own
    "an array that is cut": Wrong(f"[{TEXT},\n", ARRAY, f":2: is not valid JSON|{CUT}"),
    "an array without a comma": Wrong(f"[{TEXT}\n{TEXT}]", ARRAY, "expected ',', found '{'"),
    "an array with a comma too many": Wrong(f"[{TEXT},\n]", ARRAY, "a comma before the end"),
    "an array of strings": Wrong('["a", "b"]', ARRAY, "holds no objects: the first value is a string"),
    "an array of nothing": Wrong("[]", ARRAY, "the file has no rows"),
    "an array with NaN": Wrong('[{"text": NaN}]', ARRAY, ":1: is not valid JSON: NaN"),
    "an array of answers that are empty": Wrong(
        json.dumps([{"instruction": "a", "output": ""}] * 99), ARRAY, "content is empty"
    ),
    "an object over lines that is cut": Wrong('{\n "data": [\n {"text": "a"},\n', "is JSON over several lines", CUT),
    "an object without rows": Wrong('{\n "version": 1\n}\n', "is JSON over several lines", 'the columns "version"'),
    "ShareGPT without answers": Wrong(
        line({"conversations": [{"from": "human", "value": "a"}]}), "holds ShareGPT", "no assistant message"
    ),
    "ShareGPT with another speaker": Wrong(
        line({"conversations": [{"from": "narrator", "value": "a"}]}), "holds ShareGPT", 'found "narrator"'
    ),
    "ShareGPT without values": Wrong(
        line({"conversations": [{"from": "human"}]}), "holds ShareGPT", 'conversations[0] lacks the key "value"'
    ),
    "Alpaca whose output is a list": Wrong(
        line({"instruction": "a", "output": ["b"]}), "holds Alpaca rows", "content[0] must be an object"
    ),
    "Alpaca whose history is a number": Wrong(
        line({"instruction": "a", "output": "b", "history": 3}), "holds Alpaca rows", "history must be a list"
    ),
    "Alpaca with a broken history": Wrong(
        line({"instruction": "a", "output": "b", "history": [["c"]]}),
        "holds Alpaca rows",
        "history must be a list of pairs",
    ),
    "a table with a row too short": Wrong(
        "prompt,completion\na\n", TABLE, ":2: has 1 cells, and the first line names 2"
    ),
    "a table with an unquoted comma": Wrong("prompt,completion\na,b,c\n", TABLE, ":2: has 3 cells"),
    "a table with an open quote": Wrong('prompt,completion\n"a,b\nc,d\n', TABLE, "is a quote open?"),
    "a table with a column twice": Wrong("prompt,prompt,completion\na,b,c\n", TABLE, 'the column "prompt" twice'),
    "a table without rows": Wrong("prompt,completion\n", TABLE, "the file has no rows"),
    "a table in Latin-1": Wrong("prompt,completion\na,é\n".encode("latin-1"), TABLE, ":2: is not UTF-8"),
    "a table of other columns": Wrong("a,b\n1,2\n", "is not valid JSON", 'the columns "a", "b"'),
    "a table with empty answers": Wrong("prompt,completion\n" + "a,\n" * 3_000, TABLE, "completion is empty"),
    "a table with messages that are broken": Wrong(
        'id,messages\n1,"[{]"\n', "is not valid JSON", "messages must be a list"
    ),
}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def check(done: Result, reasons: str, path: Path) -> None:
    """See that one of the reasons was said, about the file, shortly, and that it was foreseen."""
    assert done.exit_code in (1, 3), done.stderr
    assert done.stdout == ""
    assert any(reason in done.stderr for reason in reasons.split("|")), done.stderr
    assert done.stderr.count(str(path)) >= 1
    assert len(done.stderr.splitlines()) <= MOST_LINES
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr


def test_there_are_a_hundred() -> None:
    assert len(FILES) >= LEAST_FILES


@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_is_said(tmp_path: Path, name: str) -> None:
    wrong = FILES[name]
    path, output = tmp_path / "file", tmp_path / "output"
    path.write_bytes(
        wrong.content.encode("utf-8", "surrogatepass") if isinstance(wrong.content, str) else wrong.content
    )
    check(run("train", BUNDLE, "--data", path, "--output", output), wrong.train, path)
    done = run("data", "convert", path, "--output", output)
    if wrong.convert is None:
        assert done.exit_code == 0, done.stderr
        assert run("preview", BUNDLE, "--data", output).exit_code == 0
    else:
        check(done, wrong.train if wrong.convert == BOTH else wrong.convert, path)
        assert not output.exists()
