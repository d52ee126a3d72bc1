"""Every kind of bad file is told as `file:line: reason`; nothing else ever comes out."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetune.data.json_lines import LINE_LIMIT
from edgetune.data.problems import PROBLEM_LIMIT, Problems
from edgetune.data.rows import ChatRow, CompletionRow, Message, Row, TextRow, read_rows
from edgetune.errors import DataError, EdgetuneError, UsageError

CHAT = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello 🙂"}]}'
COMPLETION = '{"prompt": "2+2=", "completion": "4"}'
TEXT = '{"text": "Some text"}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def rows_of(path: Path) -> list[Row]:
    found = Problems(path)
    rows = list(read_rows(path, found))
    found.raise_if_any()
    return rows


def problems(path: Path, data: bytes | str) -> list[str]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    return caught.value.problems


def test_the_three_kinds(path: Path) -> None:
    path.write_text(f"{CHAT}\n{CHAT}\n", encoding="utf-8")
    turns = (Message("user", "Hi"), Message("assistant", "Hello 🙂"))
    assert rows_of(path) == [ChatRow(1, turns), ChatRow(2, turns)]
    path.write_text(f"{COMPLETION}")
    assert rows_of(path) == [CompletionRow(1, "2+2=", "4")]
    path.write_text(f"{TEXT}\n")
    assert rows_of(path) == [TextRow(1, "Some text")]


def test_crlf_and_blank_lines_are_fine(path: Path) -> None:
    path.write_bytes(f"\r\n{TEXT}\r\n  \r\n\n{TEXT}\r\n\n".encode())
    assert [row.line for row in rows_of(path)] == [2, 5]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        rows_of(tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="is a folder; expected a JSONL file"):
        rows_of(tmp_path)


def chat(*messages: Any) -> str:
    return json.dumps({"messages": messages})


USER = {"role": "user", "content": "Hi"}
BAD_LINES = {
    "cut short": ('{"text": "a', r"not valid JSON: Unterminated string starting at \(column 10\)"),
    "single quotes": ("{'text': 'a'}", r"not valid JSON: .* \(column 2\)"),
    "two objects": (TEXT + TEXT, r"not valid JSON: Extra data \(column 22\)"),
    "NUL": (b'{"text": "a\0b"}', "NUL byte at byte 12"),
    "invalid UTF-8": (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 11"),
    "control character": (b'{"text": "a\tb"}', "Invalid control character"),
    "deep": ("[" * 200_000, "nested too deeply"),
    "deep object": ('{"text":' * 100_000, "nested too deeply"),
    "duplicate key": ('{"text": "a", "text": "b"}', '"text" twice'),
    "nested duplicate": ('{"messages": [{"role": "user", "role": "assistant"}]}', '"role" twice'),
    "NaN": ('{"text": NaN}', "NaN is not a JSON value"),
    "minus infinity": ('{"text": -Infinity}', "-Infinity is not a JSON value"),
    "endless integer": ('{"text": ' + "9" * 5000 + "}", "is not a row"),
    "list": ("[1]", "expected an object .* found a list"),
    "number": ("1", "found a number"),
    "string": ('"text"', "found a string"),
    "null": ("null", "found null"),
    "true": ("true", "found true or false"),
    "empty object": ("{}", "is an empty object"),
    "misspelt": ('{"mesages": []}', 'unknown key "mesages"; did you mean "messages"'),
    "misspelt second": ('{"prompt": "a", "competion": "b"}', 'did you mean "completion"'),
    "no known key": ('{"phrase": "a", "tone": 3}', 'has the keys "phrase", "tone", and none of a row'),
    "misspelt weight": (
        '{"messages": [{"role": "assistant", "content": "a", "wieght": 0}]}',
        r'messages\[0\] has the unknown key "wieght"; did you mean "weight"',
    ),
    "misspelt role": ('{"messages": [{"rol": "user", "content": "a"}]}', 'unknown key "rol"; did you mean "role"'),
    "wrong case": ('{"Messages": []}', 'unknown key "Messages"; did you mean "messages"'),
    "half a weight": (
        '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
        r"messages\[0\]\.weight must be 0 \(not trained\) or 1, found \"0.5\"",
    ),
    "a weight that is none": (
        '{"messages": [{"role": "assistant", "content": "a", "weight": true}]}',
        r'weight must be 0 \(not trained\) or 1, found "True"',
    ),
    "no answer with a weight": (
        '{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
        'every assistant message has "weight" 0',
    ),
    "an image": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
        r'messages\[0\].content\[0\] is of the type "image_url", and the model reads text alone',
    ),
    "a part without text": (
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        r"messages\[0\].content\[0\].text must be a string, found null",
    ),
    "a part that is none": (
        '{"messages": [{"role": "user", "content": ["a"]}]}',
        r"messages\[0\].content\[0\] must be an object .* found a string",
    ),
    "tools that are a number": (
        '{"messages": [{"role": "system", "content": "a", "tools": 3}]}',
        r"messages\[0\].tools must be a string, found a number",
    ),
    "half a pair": ('{"prompt": "a"}', 'lacks the key "completion"'),
    "text of the wrong type": ('{"text": 3}', "text must be a string, found a number"),
    "prompt of the wrong type": ('{"prompt": null, "completion": "a"}', "prompt must be a string, found null"),
    "completion of the wrong type": (
        '{"prompt": "a", "completion": {}}',
        "completion must be a string, found an object",
    ),
    "empty text": ('{"text": " \\n"}', "text is empty"),
    "empty completion": ('{"prompt": "a", "completion": ""}', "completion is empty"),
    "surrogate": ('{"text": "a\\ud800"}', r"half a surrogate pair \(\\ud800\)"),
    "surrogate in a prompt": ('{"prompt": "\\udc00", "completion": "a"}', r"prompt has half .*\\udc00"),
    "messages no list": ('{"messages": "Hi"}', '"messages" must be a list, found a string'),
    "endless conversation": (chat(*[USER] * 1001), "1,001 entries, at most 1,000"),
    "no message": (chat(), "no assistant message"),
    "no answer": (chat(USER), "no assistant message"),
    "message no object": (chat(USER, "Hello"), r"messages\[1\] must be an object"),
    "no role": (chat({"content": "a"}), r'messages\[0\] lacks the key "role"'),
    "no content": (chat({"role": "user"}), r'messages\[0\] lacks the key "content"'),
    "misspelt message key": (chat({"role": "user", "contents": "a"}), 'did you mean "content"'),
    "role that nobody has": (chat({"role": "bot", "content": "a"}), 'system, user, assistant, tool, found "bot"'),
    "role of the wrong type": (chat({"role": ["user"], "content": "a"}), "one of .* found a list"),
    "content of the wrong type": (chat({"role": "user", "content": USER}), "content must be a string, found an object"),
    "empty answer": (chat(USER, {"role": "assistant", "content": " "}), r"messages\[1\]\.content is empty"),
    "surrogate in an answer": (
        '{"messages": [{"role": "assistant", "content": "\\ud83d"}]}',
        r"messages\[0\]\.content has half",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line(name: str, path: Path) -> None:
    line, reason = BAD_LINES[name]
    raw = line.encode() if isinstance(line, str) else line
    found = problems(path, TEXT.encode() + b"\n\n" + raw + b"\n" + TEXT.encode())
    assert len(found) == 1
    assert found[0].startswith(f"{path}:3: ")
    with pytest.raises(DataError, match=reason):
        rows_of(path)


def test_byte_order_marks(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert rows_of(path) == [TextRow(1, "Some text")]
    assert "not valid JSON" in problems(path, f"{TEXT}\n\ufeff{TEXT}")[0], "in the middle it is no mark"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        data = (TEXT + "\n" + TEXT).encode(encoding)
        assert problems(path, data)[0].startswith(f"{path}:1: ")
    assert problems(path, f"{TEXT}\n{TEXT}".encode("utf-16")) == [f"{path}:1: the file is UTF-16; save it as UTF-8"]


def test_no_rows(path: Path) -> None:
    for data in ("", "\n \r\n"):
        (found,) = problems(path, data)
        assert found.startswith(f"{path}:1: the file has no rows")


def test_mixed_kinds_are_told_once(path: Path) -> None:
    found = problems(path, f"{COMPLETION}\n{TEXT}\n{CHAT}\n{COMPLETION}")
    assert found == [f"{path}:2: is a text row, but the rows before are prompt/completion rows; use one kind a file"]


def test_all_problems_are_told_in_order(path: Path) -> None:
    found = problems(path, f"{{\n{TEXT}\n[]\n{COMPLETION}\n{{}}")
    assert [problem.removeprefix(f"{path}:").split(":")[0] for problem in found] == ["1", "3", "4", "5"]


def test_a_huge_line_is_never_read_whole(path: Path) -> None:
    with path.open("wb") as file:
        file.write(TEXT.encode() + b'\n{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + TEXT.encode() + b"\n[]")
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        rows_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{path}:2", f"{path}:4"]
    assert "longer than 1,048,576 bytes" in caught.value.problems[0]
    assert peak < 8 << 20


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_longest_line(path: Path, extra: int, end: bytes) -> None:
    text = "x" * (LINE_LIMIT + extra - len('{"text": ""}'))
    data = json.dumps({"text": text}).encode()
    assert len(data) == LINE_LIMIT + extra
    path.write_bytes(data + end + (TEXT.encode() if end else b""))
    if extra > 0:
        with pytest.raises(DataError, match=":1: is longer than"):
            rows_of(path)
    else:
        assert rows_of(path)[0] == TextRow(1, text)


def test_a_million_problems_take_little_memory(path: Path) -> None:
    path.write_bytes(TEXT.encode() + b"\n" + b"[\n" * 100_000)
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        rows_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert len(caught.value.problems) == PROBLEM_LIMIT + 1
    assert "100,000 problems" in str(caught.value)
    assert f"{path}:2: " in str(caught.value)


FURTHER_KEYS = {
    '{"id": "a", "text": "b", "source": "c"}': (TextRow(1, "b"), {'"id"', '"source"'}),
    '{"prompt": "a", "completion": "b", "metadata": {"deep": [1]}}': (CompletionRow(1, "a", "b"), {'"metadata"'}),
    # As ultrachat has it: messages are what counts.
    '{"prompt": "Hi", "prompt_id": "x", "messages": [{"role": "assistant", "content": "a"}]}': (
        ChatRow(1, (Message("assistant", "a"),)),
        {'"prompt"', '"prompt_id"'},
    ),
    '{"messages": [{"role": "user", "name": "Eve", "content": "q"}, {"role": "assistant", "content": "a"}]}': (
        ChatRow(1, (Message("user", "q"), Message("assistant", "a"))),
        {'"messages[].name"'},
    ),
    '{"messages": [{"role": "assistant", "content": "a"}], "tools": [], "parallel_tool_calls": false}': (
        ChatRow(1, (Message("assistant", "a"),)),
        {'"tools"', '"parallel_tool_calls"'},
    ),
}


@pytest.mark.parametrize("line", FURTHER_KEYS)
def test_further_keys_are_ignored_and_named(path: Path, line: str) -> None:
    expected, names = FURTHER_KEYS[line]
    path.write_text(line)
    assert rows_of(path) == [replace(expected, ignored=frozenset(names))]


def test_what_openai_writes_is_taken_as_it_is(path: Path) -> None:
    parts = [{"type": "text", "text": "is the "}, {"type": "text", "text": "pump on?"}]
    messages = [
        {"role": "system", "content": "Be brief.", "tools": "[]"},
        {"role": "user", "content": parts, "name": "Eve"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "tool", "content": "on"},
        {"role": "assistant", "content": parts[:1], "weight": 1},
    ]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": messages}).encode() + b"\r\n")
    (row,) = rows_of(path)
    assert isinstance(row, ChatRow)
    assert row.messages == (
        Message("system", "Be brief.", tools="[]"),
        Message("user", "is the pump on?"),
        Message("assistant", "no", trained=False),
        Message("tool", "on"),
        Message("assistant", "is the "),
    )
    assert row.ignored == {'"messages[].name"'}


OTHER_FORMS = {
    "array": ('[\n  {"text": "a"}\n]', "is a JSON array"),
    "array in a line": ('[{"text": "a"}, {"text": "b"}]', "is a JSON array"),
    "array in a long line": ("[" + ", ".join(['{"text": "a"}'] * 100_000) + "]", "is a JSON array"),
    "one object": ('{\n  "conversations": [\n  ]\n}\n', "is JSON over several lines"),
    "one object with rows": ('{"data": [\n{"text": "a"},\n{"text": "b"}]}', "is JSON over several lines"),
    "rows in a field": ('{"data": [{"text": "a"}]}', "holds its rows in a field"),
    "csv": ("prompt,completion\na,b\n" * 5_000, "is a table"),
    "csv of Excel": ('"Question";"Answer"\na;b\n', "is a table"),
    "parquet": (b"PAR1\x15\x04\n\x00" * 5_000, "is a Parquet file"),
    "alpaca": ('{"instruction": "a", "input": "", "output": "b"}\n' * 5_000, "holds Alpaca rows"),
    "sharegpt": ('{"conversations": [{"from": "human", "value": "a"}]}\n' * 5_000, "holds ShareGPT conversations"),
    "sharegpt as messages": ('{"messages": [{"from": "human", "value": "a"}]}', "has ShareGPT's messages"),
    "trl": ('{"prompt": [{"role": "user", "content": "a"}], "completion": []}', "has lists of messages"),
    "names": ('{"prompt": "a", "response": "b"}\n' * 5_000, 'its prompts in "prompt" and its answers in "response"'),
    "calls": (
        '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]}]}\n' * 5_000,
        "has tool calls",
    ),
    "tools": ('{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"name": "a"}]}', "has tools"),
    "functions": ('{"messages": [{"role": "function", "content": "a"}]}', 'has messages of the role "function"'),
    "weights": (
        '{"messages": [{"role": "assistant", "content": "a", "loss_weight": 0.0}]}',
        'says what is trained with "loss_weight"',
    ),
    "values": (
        '{"messages": [{"role": "assistant", "content": [{"type": "text", "value": "a"}]}]}',
        'has its texts in "value"',
    ),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_another_form_is_one_line_with_the_command_that_converts_it(path: Path, name: str) -> None:
    content, what = OTHER_FORMS[name]
    (found,) = problems(path, content)
    assert found.startswith(f"{path}:1: ") and what in found
    assert f"`edgetune data convert {path} --output rows.jsonl" in found


REFUSED = {
    "DPO": ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 5_000, "holds preference rows"),
    "DPO with messages": ('{"messages": [], "chosen": {}, "rejected": {}}', "holds preference rows"),
    "KTO": ('{"messages": [{"role": "assistant", "content": "b"}], "label": true}', "holds preference rows"),
    "zip": (b"PK\x03\x04 and more", "is a zip archive or a spreadsheet; unpack it"),
    "prose": ("Dear diary\n" * 5_000, "is not valid JSON"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_can_convert_is_one_line_as_well(path: Path, name: str) -> None:
    content, what = REFUSED[name]
    (found,) = problems(path, content)
    assert found.startswith(f"{path}:1: ") and what in found
    assert "data convert" not in found


def test_another_form_among_rows_is_told_once(path: Path) -> None:
    calls = '{"messages": [{"role": "assistant", "tool_calls": [{}]}]}'
    found = problems(path, f"{CHAT}\n{calls}\n{calls}\n[]\n{calls}\n")
    assert [problem.removeprefix(f"{path}:").split(":")[0] for problem in found] == ["2", "4"]


# ONNX Runtime, wherever it ran before in the process, takes denormal numbers for zero.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "prompt", "completion", "text"]) | st.text(), inner
        )
        | st.just({"role": "assistant", "content": "a"})
    ),
    max_leaves=12,
)
LINES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([CHAT, COMPLETION, TEXT]).map(str.encode),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=5), start=st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]))
def test_no_file_brings_anything_but_rows_or_an_edgetune_error(path: Path, lines: list[bytes], start: bytes) -> None:
    path.write_bytes(start + b"\n".join(lines))
    try:
        rows = rows_of(path)
    except EdgetuneError as error:
        assert isinstance(error, DataError)
        assert all(problem.startswith(f"{path}:") for problem in error.problems)
        str(error).encode()
    else:
        assert len({type(row) for row in rows}) == 1
        repr(rows).encode()
