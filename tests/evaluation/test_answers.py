"""A model answers rows: what `generate` says, the perplexity that the loss graph has, and another model beside it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgetune.cli import main
from edgetune.config import AnswersConfig, ExportConfig, GenerateConfig, TrainConfig
from edgetune.errors import DataError, UsageError
from edgetune.evaluation import evaluate
from edgetune.evaluation.answered_rows import read_answered_rows
from edgetune.evaluation.answers import evaluate_answers
from edgetune.exporting import export
from edgetune.generation import generate
from edgetune.text import pulse as pulses
from edgetune.training import train
from support.golden import BUNDLE, GOLDEN, TRAIN
from support.tiny_bundle import write_rows

CONFIG = AnswersConfig(max_new_tokens=40)
EVERY_OTHER = 2


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that has learnt the golden rows, and the model that has it beside the base."""
    folder = tmp_path_factory.mktemp("learnt")
    config = TrainConfig(runtime="onnxruntime", steps=150, batch_size=5, learning_rate=1e-2, schedule="constant")
    train(BUNDLE, TRAIN, folder / "adapter", config)
    export(BUNDLE, folder / "adapter", folder / "model", ExportConfig(merge=False))
    return folder


def test_answers_are_those_of_generate_and_every_row_is_written(learnt: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, metric=("exact-match", "token-f1", "accuracy"), rows_output=tmp_path / "rows.jsonl")
    found = evaluate_answers(learnt / "model", TRAIN, config)
    rows = read_answered_rows(tmp_path / "rows.jsonl")
    source = [json.loads(line)["messages"] for line in TRAIN.read_text().splitlines()]
    assert (found.rows, found.left_out) == (len(rows), 0) == (len(source), 0)
    for row, messages in zip(rows, source, strict=True):
        *before, (_, last) = [tuple(message.values()) for message in messages]
        assert ([(message.role, message.content) for message in row.prompt], row.reference) == (before, last)
        if len(before) <= EVERY_OTHER:
            system = before[0][1] if len(before) == EVERY_OTHER else None
            answer = "".join(generate(learnt / "model", before[-1][1], GenerateConfig(40), system=system))
            assert row.answer == answer
    right = [row.answer == row.reference for row in rows]
    assert sum(right) >= len(rows) // 2, "it has learnt them"
    assert [row.scores["accuracy"] for row in rows] == [float(each) for each in right]
    assert found.scores["accuracy"] == pytest.approx(sum(right) / len(rows))


@pytest.mark.parametrize("adapter", [None, "base"])
def test_perplexity_is_that_of_the_loss_graph(learnt: Path, adapter: str | None) -> None:
    trained = learnt / "adapter" if adapter is None else None
    expected = evaluate(BUNDLE, TRAIN, adapter=trained).perplexity
    found = evaluate_answers(learnt / "model", TRAIN, replace(CONFIG, metric=("perplexity",)), adapter=adapter)
    assert found.scores["perplexity"] == pytest.approx(expected, rel=1e-3)


def test_a_model_is_compared_with_another_or_with_its_answers(learnt: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, metric=("token-f1", "perplexity", "distinct-1"))
    base = evaluate_answers(BUNDLE, TRAIN, replace(config, rows_output=tmp_path / "base.jsonl"))
    asked = evaluate_answers(learnt / "model", TRAIN, replace(config, compare=BUNDLE))
    read = evaluate_answers(learnt / "model", TRAIN, replace(config, compare=tmp_path / "base.jsonl"))
    assert asked == read
    differences = asked.differences
    assert {name: differences[name].other for name in differences} == base.scores
    assert [differences[name].verdict for name in config.metric or ()] == ["better", "better", "not compared"]
    other_way = evaluate_answers(BUNDLE, TRAIN, replace(config, compare=learnt / "model"))
    assert [other_way.differences[name].verdict for name in config.metric or ()] == ["worse", "worse", "not compared"]
    assert other_way.differences["perplexity"].low == pytest.approx(-(differences["perplexity"].high or 0))


def test_only_the_same_rows_are_compared(learnt: Path, tmp_path: Path) -> None:
    lines = TRAIN.read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(lines[:4]))
    output = tmp_path / "rows.jsonl"
    evaluate_answers(BUNDLE, tmp_path / "some.jsonl", replace(CONFIG, rows_output=output))
    (tmp_path / "others.jsonl").write_text("\n".join(lines[2:6]))
    with pytest.raises(DataError, match="has 4 rows, of which 2 are among the 4"):
        evaluate_answers(BUNDLE, tmp_path / "others.jsonl", replace(CONFIG, compare=output))
    with pytest.raises(UsageError, match="has no losses, which perplexity needs"):
        evaluate_answers(BUNDLE, tmp_path / "some.jsonl", replace(CONFIG, compare=output, metric=("perplexity",)))
    with pytest.raises(UsageError, match="no model here"):
        evaluate_answers(BUNDLE, TRAIN, replace(CONFIG, compare=tmp_path))


def test_completions_are_asked_and_rows_without_a_question_refused(tmp_path: Path) -> None:
    found = evaluate_answers(BUNDLE, GOLDEN / "completion.jsonl", replace(CONFIG, rows_output=tmp_path / "rows.jsonl"))
    first = json.loads((GOLDEN / "completion.jsonl").read_text().splitlines()[0])
    row = read_answered_rows(tmp_path / "rows.jsonl")[0]
    assert (row.prompt, row.reference) == (first["prompt"], first["completion"])
    assert row.answer == "".join(generate(BUNDLE, first["prompt"], GenerateConfig(40)))
    raw = evaluate_answers(BUNDLE, GOLDEN / "completion.jsonl", replace(CONFIG, raw_prompts=True))
    assert raw.rows == found.rows
    with pytest.raises(DataError, match=r"text\.jsonl:1: is a text row, which asks nothing"):
        evaluate_answers(BUNDLE, GOLDEN / "text.jsonl", CONFIG)
    data = tmp_path / "rows.json"
    data.write_text('{"messages": [{"role": "assistant", "content": "hello"}]}\n')
    with pytest.raises(DataError, match="nothing stands before the answer"):
        evaluate_answers(BUNDLE, data, CONFIG)


def test_what_cannot_be_measured_is_refused_before_the_model_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime_genai.Model", None)
    with pytest.raises(DataError, match=r"train\.jsonl:1: --metric json-match: the answer .* is not an object"):
        evaluate_answers(BUNDLE, TRAIN, replace(CONFIG, metric=("json-match",)))
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UsageError, match="already exists"):
        evaluate_answers(BUNDLE, TRAIN, replace(CONFIG, rows_output=tmp_path / "rows.jsonl"))
    with pytest.raises(UsageError, match="expected for 'f1': one of accuracy, macro-f1"):
        evaluate_answers(BUNDLE, TRAIN, replace(CONFIG, metric=("f1",)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"top_p \(0\.5\) means nothing without temperature"):
        evaluate_answers(BUNDLE, TRAIN, replace(CONFIG, top_p=0.5))
    with pytest.raises(UsageError, match="no adapters beside its base"):
        evaluate_answers(BUNDLE, TRAIN, CONFIG, adapter="mine")


def test_long_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    short = {"prompt": "Turn on the lamp.", "completion": "Done."}
    long = {"prompt": "Turn on the lamp. " * 400, "completion": "Done."}
    found = evaluate_answers(BUNDLE, write_rows(tmp_path / "rows.jsonl", [long, short]), CONFIG)
    assert (found.rows, found.left_out) == (1, 1)
    with pytest.raises(DataError, match="all 1 rows are longer than the model's"):
        evaluate_answers(BUNDLE, write_rows(tmp_path / "long.jsonl", [long]), CONFIG)


def test_it_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "EVERY", 0.0)
    said: list[str] = []
    evaluate_answers(BUNDLE, TRAIN, replace(CONFIG, metric=("accuracy", "perplexity")), say=said.append)
    assert "answered 10 of 10 rows" in said
    assert said[-1] == "measured 10 of 10 rows"


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_a_table_or_one_object(learnt: Path, tmp_path: Path) -> None:
    asked = ("eval", learnt / "model", "--generate", "--data", TRAIN, "--max-new-tokens", 40, "--metric", "token-f1")
    code, table, _ = invoke(*asked, "--metric", "distinct-2", "--compare", BUNDLE)
    assert code == 0
    assert re.search(r"token-f1 +│ 0\.\d{4} +│ 0\.\d{4} +│ \+0\.\d{4} +│ \+0\.\d{4} to \+\d\.\d{4} +│ better", table)
    assert re.search(r"distinct-2 .*│ not compared", table)
    code, printed, _ = invoke(*asked, "--adapter", "base", "--json", "--rows-output", tmp_path / "rows.jsonl")
    found = json.loads(printed)
    assert (code, found["rows"], found["left_out"], found["differences"]) == (0, 10, 0, {})
    assert f"{found['scores']['token-f1']:.4f}" in table, "the base is what the adapter was compared with"
    assert len(read_answered_rows(tmp_path / "rows.jsonl")) == 10
    code, _, said = invoke("eval", learnt / "model", "--data", TRAIN)
    assert code == 2 and "measure its answers with --generate" in said
    code, _, said = invoke(*asked, "--adapter", "kitchen")
    assert code == 2 and "has no adapter 'kitchen'; there are adapter, base" in said
