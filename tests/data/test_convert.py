"""Files as people have them become rows that `train` takes, or are refused with all that is wrong in them."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.config import ConvertConfig, TrainConfig
from edgetune.data.convert import convert
from edgetune.data.encode import load_encoder
from edgetune.data.examples import load_examples
from edgetune.errors import DataError, MissingDependencyError, UsageError
from edgetune.formats.bundle import Bundle
from edgetune.training import train
from support.golden import BUNDLE
from support.shared_material import shared_material
from support.tool_bundle import tool_bundle

USER, ANSWER = {"role": "user", "content": "Is it on?"}, {"role": "assistant", "content": "Yes."}
WEATHER = {"name": "get_weather", "description": "Weather", "parameters": {"city": {"type": "str"}}}
CALL = '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Zürich"}}]<|/tool_call|>'


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tool_bundle(tmp_path_factory.mktemp("tools") / "bundle")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "found"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def converted(path: Path, content: object, *, bundle: Bundle | None = None, **options: Any) -> list[Any]:
    """The rows that become of a file's content: bytes or text as they are, all else as JSON."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    form = options.pop("form", None)
    output = path.with_name("rows.jsonl")
    done = convert(path, output, ConvertConfig(force=True, **options), form=form, bundle=bundle)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert done.rows == len(rows)
    return rows


def problems(path: Path, content: object, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        converted(path, content, **options)
    assert not path.with_name("rows.jsonl").exists()
    return caught.value.problems


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


FORMS: dict[str, tuple[object, list[Any]]] = {
    "Alpaca": (
        [
            {"instruction": "Say on", "input": "", "output": "on"},
            {"instruction": "Turn it", "input": "the lamp", "output": "done"},
        ],
        [
            {"messages": [{"role": "user", "content": "Say on"}, {"role": "assistant", "content": "on"}]},
            {"messages": [{"role": "user", "content": "Turn it\nthe lamp"}, {"role": "assistant", "content": "done"}]},
        ],
    ),
    "Alpaca with more": (
        [{"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}],
        [
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            }
        ],
    ),
    "ShareGPT": (
        jsonl(
            {
                "id": "x",
                "system": "s",
                "conversations": [{"from": "human", "value": "Is it on?"}, {"from": "gpt", "value": "Yes."}],
            }
        ),
        [{"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}],
    ),
    "ShareGPT with roles": (jsonl({"conversations": [USER, ANSWER]}), [{"messages": [USER, ANSWER]}]),
    "OpenAI": (
        b"\xef\xbb\xbf"
        + jsonl(
            {
                "messages": [
                    {"role": "developer", "content": [{"type": "text", "text": "s"}]},
                    USER | {"name": "Eve"},
                    ANSWER | {"weight": 0},
                    USER,
                    ANSWER | {"weight": 1},
                ]
            }
        ).encode(),
        [{"messages": [{"role": "system", "content": "s"}, USER, ANSWER | {"weight": 0}, USER, ANSWER]}],
    ),
    "LLaMA-Factory": (
        jsonl(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": "Is it on?"}], "loss_weight": 0.0},
                    {
                        "role": "assistant",
                        "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "Yes."}],
                        "loss_weight": 1.0,
                    },
                ]
            }
        ),
        [{"messages": [USER, ANSWER]}],
    ),
    "TRL, the answers of the prompt are not trained": (
        jsonl({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}),
        [{"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER]}],
    ),
    "prompts and completions": (jsonl({"prompt": "a", "completion": "b"}), [{"prompt": "a", "completion": "b"}]),
    "other names": (jsonl({"Question": "a", "Answer": 3, "id": 7}), [{"prompt": "a", "completion": "3"}]),
    "texts": (jsonl({"text": "a", "meta": {}}), [{"text": "a"}]),
    "rows in a field": ({"version": 1, "data": [{"text": "a"}, {"text": "b"}]}, [{"text": "a"}, {"text": "b"}]),
    "CSV": (
        'prompt,completion\n"a, b","c\nd"\n\ne,f\n',
        [{"prompt": "a, b", "completion": "c\nd"}, {"prompt": "e", "completion": "f"}],
    ),
    "CSV of Excel": (
        "\ufeffFrage;Question;Answer\r\n1;Ist es an?;Ja\r\n".encode(),
        [{"prompt": "Ist es an?", "completion": "Ja"}],
    ),
    "TSV": (
        "instruction\tinput\toutput\na\tb\tc\n",
        [{"messages": [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}]}],
    ),
    "CSV with messages": (
        'id,messages\n1,"' + json.dumps([USER, ANSWER]).replace('"', '""') + '"\n',
        [{"messages": [USER, ANSWER]}],
    ),
    "CSV with a system": (
        "system,prompt,completion\ns,Is it on?,Yes.\n,Is it on?,Yes.\n",
        [{"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}, {"messages": [USER, ANSWER]}],
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_becomes_rows(path: Path, tools: Bundle, name: str, packed: bool) -> None:
    content, expected = FORMS[name]
    if packed:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        content = gzip.compress(text.encode() if isinstance(text, str) else text)
    assert converted(path, content) == expected
    encoder = load_encoder(tools.path, tools.manifest.tokenizer)
    read = load_examples(path.with_name("rows.jsonl"), encoder, tools.manifest.max_length, truncate=False)
    assert read.rows == len(expected)
    assert not [notice for notice in read.notices if "further keys" in notice]


TOOLS: dict[str, object] = {
    "OpenAI": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c", "content": "21"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    },
    "OpenAI before tools": {
        "messages": [
            USER,
            {"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}},
            {"role": "function", "name": "get_weather", "content": "21"},
            ANSWER,
        ],
        "functions": [WEATHER],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Is it on?"},
            {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Zürich"}}'},
            {"from": "observation", "value": "21"},
            {"from": "gpt", "value": "Yes."},
        ],
        "tools": json.dumps([WEATHER]),
    },
    "LLaMA-Factory": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": "Is it on?"}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_call", "value": '{"name": "get_weather", "arguments": {"city": "Zürich"}}'}],
            },
            {"role": "tool", "content": [{"type": "text", "value": "21"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "Yes."}]},
        ],
        "tools": json.dumps([{"type": "function", "function": WEATHER}]),
    },
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools_are_written_in_the_words_of_the_model(path: Path, tools: Bundle, name: str) -> None:
    (row,) = converted(path, [TOOLS[name]], bundle=tools)
    system, *others = row["messages"]
    assert system == {"role": "system", "content": "", "tools": json.dumps([WEATHER])}
    assert others == [USER, {"role": "assistant", "content": CALL}, {"role": "tool", "content": "21"}, ANSWER]
    encoder = load_encoder(tools.path, tools.manifest.tokenizer)
    (example,) = load_examples(path.with_name("rows.jsonl"), encoder, 10_000, truncate=False).examples
    shown = encoder.decode(example.input_ids, skip_special_tokens=False).replace(" ", "")
    for text in ("<|tool|>" + json.dumps([WEATHER]) + "<|/tool|><|end|>", CALL + "<|end|>", "<|tool|>21<|end|>"):
        assert text.replace(" ", "") in shown


@pytest.mark.parametrize("name", TOOLS)
def test_without_a_model_or_with_one_that_has_no_place_for_them_tools_are_refused_in_one_line(
    path: Path, name: str
) -> None:
    (unknown,) = problems(path, [TOOLS[name]] * 3)
    assert unknown.startswith(f"{path}:1: has tool") and "--bundle BUNDLE" in unknown
    (without,) = problems(path, [TOOLS[name]] * 3, bundle=BUNDLE)
    assert "the tokenizer of" in without and "such as Phi-4-mini" in without


def test_the_form_can_be_forced(path: Path) -> None:
    record = {"messages": [USER, ANSWER], "text": "a"}
    assert converted(path, jsonl(record)) == [{"messages": [USER, ANSWER]}]
    assert converted(path, jsonl(record), form="text") == [{"text": "a"}]
    forced = run("data", "convert", path, "--output", path.with_name("forced"), "--from", "text", "--quiet")
    assert (forced.exit_code, path.with_name("forced").read_text()) == (0, '{"text": "a"}\n')
    columns = {"prompt_column": "text", "completion_column": "id", "system_column": "s"}
    assert converted(path, jsonl({"text": "Is it on?", "id": "Yes.", "s": "x"}), **columns) == [
        {"messages": [{"role": "system", "content": "x"}, USER, ANSWER]}
    ]


def test_what_was_found_is_said_in_one_line(path: Path, tmp_path: Path) -> None:
    path.write_text("id,question,answer\n1,a,b\n")
    done = run("data", "convert", path, "--output", tmp_path / "rows.jsonl")
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [
        f"{path}: CSV, prompts and completions: 'question' as the prompt, 'answer' as the completion",
        f"{path}: left out, because nothing is trained on them: id",
    ]
    assert done.stdout == f"{tmp_path / 'rows.jsonl'}: 1 rows\n"
    again = run("data", "convert", path, "--output", tmp_path / "rows.jsonl", "--force", "--json", "--quiet")
    assert again.stderr == ""
    assert json.loads(again.stdout) == {
        "path": str(tmp_path / "rows.jsonl"),
        "container": "CSV",
        "form": "prompt-completion",
        "rows": 1,
        "bad_rows": 0,
        "left_out": ["id"],
    }


def test_all_problems_are_told_together_and_nothing_is_written(path: Path, tmp_path: Path) -> None:
    bad = {"instruction": "a", "input": "", "output": ""}
    path.write_text("[" + ",\n".join(json.dumps(bad | {"output": "x" * (n == 3)}) for n in range(60)) + "]")
    output = tmp_path / "rows.jsonl"
    output.write_text("what was there")
    done = run("data", "convert", path, "--output", output, "--force")
    assert (done.exit_code, done.stdout) == (3, "")
    lines = done.stderr.splitlines()
    assert len(lines) <= 25
    assert f"{path}:1: messages[1].content is empty" in lines[1]
    assert lines[-1] == "… and 39 more"
    assert output.read_text() == "what was there"
    assert list(tmp_path.glob(".*")) == []
    kept = run("data", "convert", path, "--output", output, "--force", "--skip-bad", "--json")
    assert kept.exit_code == 0
    assert (json.loads(kept.stdout)["rows"], json.loads(kept.stdout)["bad_rows"]) == (1, 59)
    assert len(kept.stderr.splitlines()) <= 25 and f"{path}: 59 records were left out" in kept.stderr


def test_an_output_that_is_there_is_not_replaced_unasked(path: Path, tmp_path: Path) -> None:
    path.write_text(jsonl({"text": "a"}))
    convert(path, tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match="already exists; choose another output or add --force"):
        convert(path, tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match="is the file that is converted"):
        convert(path, path, ConvertConfig(force=True))
    with pytest.raises(UsageError, match="is a folder; give the path of the file"):
        convert(path, tmp_path, ConvertConfig(force=True))
    assert path.read_text() == jsonl({"text": "a"})


def test_rows_come_from_a_pipe_as_well(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgetune", "data", "convert", "-", "--output", str(tmp_path / "rows.jsonl")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    packed = gzip.compress(json.dumps([{"instruction": "a", "output": "b"}]).encode())
    done = subprocess.run(command, input=packed, env=environment, capture_output=True, check=True)
    assert done.stderr.decode() == "<stdin>: JSON, Alpaca rows\n"
    assert (tmp_path / "rows.jsonl").exists()


def parquet_of(path: Path, records: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)


def test_parquet_is_read_with_pyarrow(path: Path, tmp_path: Path) -> None:
    parquet_of(path, [{"messages": [USER, ANSWER], "source": "x"}] * 3 + [{"messages": [USER | {"name": "y"}, ANSWER]}])
    done = convert(path, tmp_path / "rows.jsonl")
    assert (done.container, done.form, done.rows) == ("Parquet", "messages", 4)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [{"messages": [USER, ANSWER]}] * 4
    assert done.left_out == ["messages[].name", "source"]
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + b"\0" * 20 + whole[80:-4])
    with pytest.raises(DataError, match=f"{path}:1: the Parquet file is damaged"):
        convert(path, tmp_path / "other.jsonl")


def test_without_pyarrow_the_line_that_installs_it_is_said(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"PAR1 and more")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "edgetune\[data\]"'):
        convert(path, tmp_path / "rows.jsonl")


def peak_of(kind: str, rows: int, folder: Path) -> int:
    """The most memory that Python's objects take while so many records are converted, in bytes."""
    record = {"question": "x" * 400, "answer": "y" * 400}
    path = folder / f"{rows}.{kind}"
    opened: Callable[..., Any] = gzip.open if kind.endswith("gz") else open
    with opened(path, "wt", newline="") as file:
        match kind:
            case "csv":
                writer = csv.DictWriter(file, record)
                writer.writeheader()
                writer.writerows([record] * rows)
            case "json":
                file.write("[" + ",\n".join([json.dumps(record)] * rows) + "]")
            case _:
                file.writelines([json.dumps(record) + "\n"] * rows)
    tracemalloc.start()
    done = convert(path, folder / f"{rows}.rows")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done.rows == rows
    return peak


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "json"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    assert peak_of(kind, 9_000, tmp_path) < peak_of(kind, 3_000, tmp_path) + (1 << 20)


# Files of others, where they lie


PREFERENCE = "holds preference rows"
REFUSED = {
    "mlxlm_dpo.jsonl": PREFERENCE,
    "dpo_en_demo.json": PREFERENCE,
    "kto_en_demo.json": PREFERENCE,
    "v1_dpo_demo.jsonl": PREFERENCE,
}
FLAGS = {"phicookbook_classification.json": {"prompt_column": "phrase", "completion_column": "tone"}}
LEAST_FILES = 26


def found_files() -> list[Path]:
    return sorted(path for path in (shared_material() / "real" / "rows").rglob("*") if path.is_file())


def test_what_people_have_trains_after_one_command_or_is_refused_in_one_line(tmp_path: Path, tools: Bundle) -> None:
    files = found_files()
    assert len(files) >= LEAST_FILES
    encoder = load_encoder(tools.path, tools.manifest.tokenizer)
    refused: set[str] = set()
    shortest: dict[frozenset[str], list[str]] = {}
    for path in files:
        output = tmp_path / "rows.jsonl"
        config = ConvertConfig(**FLAGS.get(path.name, {}), force=True)
        try:
            done = convert(path, output, config, bundle=tools)
        except DataError as error:
            assert len(error.problems) == 1 and REFUSED[path.name] in str(error), path
            refused.add(path.name)
            continue
        read = load_examples(output, encoder, tools.manifest.max_length, truncate=False)
        assert read.rows == done.rows and not read.too_long, path
        lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
        # The tokenizer knows few words: long rows, of thousands of tokens here, would take long.
        line = lines[min(read.examples, key=lambda example: len(example.input_ids)).line - 1]
        shortest.setdefault(frozenset(json.loads(line)), []).append(line)
    assert refused == REFUSED.keys()
    assert sum(map(len, shortest.values())) == len(files) - len(REFUSED)
    assert len(shortest) == 3
    for number, lines in enumerate(shortest.values()):
        (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        config_of_run = TrainConfig("onnxruntime", epochs=1, truncate=True)
        assert train(tools, tmp_path / "rows.jsonl", tmp_path / f"adapter-{number}", config_of_run).final_loss > 0


def test_what_is_said_of_such_a_file_without_converting_it_is_one_line() -> None:
    """Whoever gives the file itself reads the command that converts it, or why nothing does."""
    for path in found_files():
        done = run("preview", BUNDLE, "--data", path, "--json")
        assert done.exit_code in (0, 3), path
        if done.exit_code == 3:
            (line,) = done.stderr.splitlines()
            assert "edgetune data convert" in line or PREFERENCE in line, line
