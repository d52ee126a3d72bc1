"""An int4 base that is rounded on rows: nearer to the checkpoint in PyTorch, and as every other base in all else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.config import PrepareConfig
from edgetune.data.encode import Example
from edgetune.errors import DataError, UsageError
from edgetune.preparation import gptq, prepare
from support.massive_activations import save_massive
from support.prepared_bundles import CONFIG, prepare_tiny
from support.tiny_phi3 import (
    build_here,
    bundle,
    checkpoint,
    genai_greedy,
    genai_model,
    greedy,
    silent,
    torch_model_of,
    weights,
)

ON_ROWS = replace(CONFIG, quantiser="gptq")


def rows_of(seed: int, count: int = 24) -> list[Example]:
    """Rows of few words, so that some inputs occur more often than others; each begins as a conversation does."""
    generator = np.random.default_rng(seed)
    words = np.random.default_rng(9).integers(10, 440, 40)
    ids = [[1, *map(int, generator.choice(words, 30))] for _ in range(count)]
    return [Example(line, row, row) for line, row in enumerate(ids)]


def rounded_on_rows(source: Path, built: Path, folder: Path, rows: list[Example]) -> Path:
    shutil.copytree(built, folder)
    gptq.round_on_rows(source, folder, bundle("grouped-query", "int4").manifest.architecture, rows, silent)
    return folder


def distance(source: Path, folder: Path, rows: list[Example]) -> float:
    """Mean divergence of what a model predicts from what the checkpoint predicts, in nats a token."""
    import torch
    from transformers import Phi3ForCausalLM

    def predicted(model: Any) -> Any:
        ids = torch.tensor([list(row.input_ids) for row in rows])
        with torch.no_grad():
            return torch.log_softmax(model(ids).logits, -1)

    exact, found = predicted(Phi3ForCausalLM.from_pretrained(source).eval()), predicted(torch_model_of(source, folder))
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def test_it_is_nearer_to_the_checkpoint_on_rows_that_it_did_not_see(tmp_path: Path) -> None:
    source, built = checkpoint("grouped-query"), genai_model("grouped-query", "int4")
    folder = rounded_on_rows(source, built, tmp_path / "model", rows_of(1))
    nearest, least_squares, on_rows = (
        distance(source, model, rows_of(2))
        for model in (genai_model("grouped-query", "int4", "nearest"), built, folder)
    )
    assert least_squares < nearest
    assert on_rows < 0.8 * least_squares
    assert all((weights(folder)[name] != value).any() for name, value in weights(built).items())
    assert (folder / "model.onnx").read_bytes() == (built / "model.onnx").read_bytes()
    assert (folder / "model.onnx.data").stat().st_size == (built / "model.onnx.data").stat().st_size
    prompt = list(rows_of(2)[0].input_ids)
    assert genai_greedy(folder, prompt, 12) == greedy(torch_model_of(source, folder), prompt, 12)


@pytest.mark.parametrize("largest", [24_890, 60_000])
def test_a_massive_activation_hides_no_other_token(tmp_path: Path, largest: int) -> None:
    source = save_massive(tmp_path / "checkpoint", largest)
    built = build_here(source, tmp_path / "built", "int4")
    shutil.copytree(built, tmp_path / "model")
    architecture = replace(
        bundle("multi-head", "int4").manifest.architecture, num_hidden_layers=4, num_key_value_heads=4
    )
    gptq.round_on_rows(source, tmp_path / "model", architecture, rows_of(1), silent)
    assert distance(source, tmp_path / "model", rows_of(2)) < 0.8 * distance(source, built, rows_of(2))


def test_of_many_rows_some_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(1, count=100)
    monkeypatch.setattr(gptq, "_MOST_TOKENS", 31 * 40)
    lines = [row.line for row in gptq.drawn(rows)]
    assert lines == list(range(0, 100, 3))
    monkeypatch.setattr(gptq, "_MOST_TOKENS", 31 * 100)
    assert list(gptq.drawn(rows)) == rows


def test_prepare_rounds_on_calibration_rows_and_says_so(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the lamp in the kitchen is on now, turn it off"}\n' * 8)
    made = prepare_tiny("grouped-query", tmp_path / "bundle", replace(ON_ROWS, calibration=rows))
    assert made.manifest.provenance["quantiser"] == "gptq"
    plain = weights(genai_model("grouped-query", "int4"))
    assert all((value != plain[name]).any() for name, value in weights(made.path).items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ON_ROWS, "--calibration.*least-squares needs none"),
        (replace(ON_ROWS, base="int8", calibration=Path("rows.jsonl")), "belongs to base int4; base is int8"),
    ],
)
def test_what_cannot_be_meant_is_refused(config: PrepareConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(checkpoint("grouped-query"), tmp_path / "bundle", config, say=pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_row_is_found_before_anything_is_built(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        prepare(
            checkpoint("grouped-query"), tmp_path / "bundle", replace(ON_ROWS, calibration=rows), say=pytest.fail
        )
