"""PyTorch + PEFT beside edgetune: the example that learns the same rows with an adapter's settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgetune.config import TrainConfig
from edgetune.evaluation import evaluate
from edgetune.evaluation.answered_rows import read_answered_rows
from edgetune.training import train
from examples import pytorch_peft as script
from support.golden import BUNDLE, GOLDEN, TRAIN, VALID

CHECKPOINT = GOLDEN / "edgetune-golden-base"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps over the golden rows, of which the last of each epoch has fewer rows."""
    config = TrainConfig(
        runtime="onnxruntime", steps=12, batch_size=3, learning_rate=1e-2, schedule="linear", warmup_steps=2
    )
    return train(BUNDLE, TRAIN, tmp_path_factory.mktemp("trained") / "adapter", config).path


def test_it_learns_what_edgetune_learns_and_answers_rows_that_eval_reads(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [CHECKPOINT, BUNDLE, adapter, "--data", TRAIN, "--test", VALID, "--metric", "token-f1"]
    arguments += ["--metric", "perplexity", "--max-new-tokens", "4", "--rows-output", tmp_path / "rows.jsonl"]
    monkeypatch.setattr(sys, "argv", ["pytorch_peft.py", *map(str, arguments)])
    script.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    before, ours = evaluate(BUNDLE, VALID).perplexity, evaluate(BUNDLE, VALID, adapter=adapter).perplexity
    assert ours < before / 2
    assert found["perplexity"] == pytest.approx(ours, rel=0.25)
    assert found["scores"]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
    assert found["train_seconds"] > 0 and found["answer_seconds"] > 0 and found["peak_memory_bytes"] > 1e8
    answered = read_answered_rows(tmp_path / "rows.jsonl")
    lines = [json.loads(line)["messages"] for line in VALID.read_text().splitlines()]
    assert [row.reference for row in answered] == [messages[-1]["content"] for messages in lines]
    assert all(row.answer for row in answered)


def test_without_a_step_it_measures_as_edgetune_measures_the_base(adapter: Path) -> None:
    """The int4 weights of the bundle are all that differs."""
    rows = script.rows_of(VALID, BUNDLE)
    model = script.model_of(CHECKPOINT, adapter)
    counted = script.losses(model, rows)
    tokens = sum(count for _, count in counted)
    base = evaluate(BUNDLE, VALID)
    assert tokens == base.trained_tokens
    assert sum(loss * count for loss, count in counted) / tokens == pytest.approx(base.loss, rel=0.02)
