"""The examples: rows that train, a loop with nothing but onnxruntime and numpy that does train, and one in Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.data.problems import Problems
from edgetune.data.rows import ChatRow, read_rows
from edgetune.evaluation import evaluate
from edgetune.evaluation.metrics import problem_of
from edgetune.preview import preview
from examples.tasks.run import ALL
from support.golden import GOLDEN
from support.repository import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(("folder", "least", "held_out"), [("device_assistant", 60, 10), ("house_commands", 100, 42)])
def test_a_demo_has_enough_rows_and_asks_nothing_twice(folder: str, least: int, held_out: int) -> None:
    paths = [EXAMPLES / folder / f"{name}.jsonl" for name in ("train", "valid")]
    train, valid = (list(read_rows(path, Problems(path))) for path in paths)
    questions = [row.messages[-2].content for row in (*train, *valid) if isinstance(row, ChatRow)]
    assert len(train) >= least
    assert len(valid) == held_out
    assert len(set(questions)) == len(questions) == len(train) + len(valid)


def test_a_command_of_the_house_is_in_the_words_of_its_request_and_none_that_is_held_out_is_trained() -> None:
    commands: dict[str, set[str]] = {"train": set(), "valid": set()}
    for name, found in commands.items():
        path = EXAMPLES / "house_commands" / f"{name}.jsonl"
        for row in read_rows(path, Problems(path)):
            assert isinstance(row, ChatRow)
            request, command = (message.content for message in row.messages[-2:])
            found.add(command)
            said = json.loads(command)
            assert list(said) in (["intent", "device", "place"], ["intent", "device", "place", "value"])
            assert ("value" in said) == (said.pop("intent") in ("set", "remind")), command
            assert [word for word in said.values() if word not in request.lower()] == []
    assert commands["train"] & commands["valid"] == set()


TASKS = sorted(path for path in (EXAMPLES / "tasks").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", TASKS, ids=lambda folder: folder.name)
def test_a_task_has_rows_that_its_metrics_can_measure_and_none_twice(folder: Path) -> None:
    task = ALL[folder.name]
    rows = []
    for name in ("train", "test"):
        problems = Problems(folder / f"{name}.jsonl")
        rows.append(list(read_rows(folder / f"{name}.jsonl", problems)))
        problems.raise_if_any()
    train, test = ([repr(replace(row, line=0)) for row in part] for part in rows)
    assert 60 <= len(train) + len(test) <= 200 and len(test) >= 15
    assert len({*train, *test}) == len(train) + len(test)
    answers = [row.messages[-1].content for part in rows for row in part if isinstance(row, ChatRow)]
    assert bool(answers) == task.asked
    assert [problem for answer in answers if (problem := problem_of(answer, task.metrics))] == []


def test_every_task_is_run_and_described() -> None:
    assert sorted(ALL) == [folder.name for folder in TASKS]
    page = (EXAMPLES / "tasks" / "README.md").read_text(encoding="utf-8")
    for name, task in ALL.items():
        assert re.search(
            rf"^\| \[{name}\].*\| {', '.join(f'`{metric}`' for metric in task.metrics)} \|$", page, re.MULTILINE
        )


def test_the_runner_trains_exports_and_compares_with_the_base_and_with_peft(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.tasks.run", "chat", "domain", "--rows", "3"]
    places = ["--bundle", GOLDEN / "bundle", "--checkpoint", GOLDEN / "edgetune-golden-base", "--work"]
    done = subprocess.run(
        [*command, *places, tmp_path / "work"],
        cwd=ROOT, env={**os.environ, "COLUMNS": "140"}, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    scores = {(name, metric): (base, ours, theirs) for name, metric, base, ours, _, theirs, *_ in lines}
    assert list(scores) == [("chat", "token-f1"), ("chat", "perplexity"), ("domain", "perplexity")], done.stderr
    assert all(re.fullmatch(r"\d+\.\d{3}", score) for told in scores.values() for score in told)
    # A model so small answers at random after four steps.
    higher = {(name, metric): metric != "perplexity" for name, metric in scores}
    gains = {key: (float(ours) - float(base)) * (1 if higher[key] else -1) for key, (base, ours, _) in scores.items()}
    worse = [f"{metric} of {name}" for (name, metric), gain in gains.items() if gain <= 0]
    assert done.returncode == bool(worse), done.stderr
    assert not worse or done.stderr.splitlines()[-1] == f"not better than the base: {', '.join(worse)}"
    assert (tmp_path / "work" / "model" / "adapters" / "domain.onnx_adapter").is_file()


def test_the_portable_loop_learns_and_writes_an_adapter(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"input_ids": row.input_ids, "labels": row.labels}) + "\n"
            for row in preview(GOLDEN / "bundle", GOLDEN / "train.jsonl")
        )
    )
    loop = [sys.executable, str(EXAMPLES / "portable_loop.py"), str(GOLDEN / "bundle"), str(rows), "adapter"]
    done = subprocess.run(loop, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before = evaluate(GOLDEN / "bundle", GOLDEN / "train.jsonl").loss
    after = evaluate(GOLDEN / "bundle", GOLDEN / "train.jsonl", adapter=tmp_path / "adapter").loss
    assert after < before / 2


def test_learning_rates_are_told_from_the_best_to_the_worst(tmp_path: Path) -> None:
    script, files = EXAMPLES / "learning_rates.py", [GOLDEN / name for name in ("bundle", "train.jsonl", "valid.jsonl")]
    command = [sys.executable, str(script), *map(str, files), "adapters", "1e-4", "1e-2", "--steps", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    base, *told = [line.partition(": loss ") for line in done.stdout.splitlines() if ": loss " in line]
    assert [name for name, _, _ in (base, *told)] == ["base", "adapters/0.01", "adapters/0.0001"]
    for name, _, rest in told:
        measured = evaluate(files[0], files[2], adapter=tmp_path / name)
        assert float(rest.split(",")[0]) == round(measured.loss, 3)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, "exists" in again.stderr) == (1, True), again.stderr
