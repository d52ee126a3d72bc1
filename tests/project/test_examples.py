"""The examples: rows that train, a loop with nothing but onnxruntime and numpy that does train, and one in Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edgetune.data.problems import Problems
from edgetune.data.rows import ChatRow, read_rows
from edgetune.evaluation import evaluate
from edgetune.preview import preview
from support.golden import GOLDEN
from support.repository import ROOT

EXAMPLES = ROOT / "examples"


def test_the_device_assistant_has_enough_rows_and_holds_ten_out() -> None:
    paths = [EXAMPLES / "device_assistant" / f"{name}.jsonl" for name in ("train", "valid")]
    train, valid = (list(read_rows(path, Problems(path))) for path in paths)
    questions = [row.messages[0].content for row in (*train, *valid) if isinstance(row, ChatRow)]
    assert len(train) >= 60
    assert len(valid) == 10
    assert len(set(questions)) == len(questions) == len(train) + len(valid)


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
