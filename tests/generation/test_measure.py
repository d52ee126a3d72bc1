"""Rows that are measured together have the losses that they have alone, and somebody hears how far it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgetune.config import Base, ExportConfig
from edgetune.data.batcher import MEASURED_ROWS
from edgetune.data.encode import IGNORED
from edgetune.evaluation import evaluate
from edgetune.exporting import export
from edgetune.generation.measure import Measured, batches
from edgetune.host.checkpoint import open_checkpoint
from edgetune.model.rope import Rope
from edgetune.text import pulse as pulses
from edgetune.text.pulse import Pulse
from support.random_rows import prompted_rows
from support.tiny_bundle import make_bundle, write_rows
from support.tiny_bundle import some_rows as word_rows
from support.tiny_phi3 import VARIANTS, bundle, checkpoint, save_adapter, silent

LENGTHS = [40, 9, 21, 33, 12, 100, 5, 17, 25, 60, 8, 64, 65]
"""The longrope variant serves 64 positions with its short factors."""
PLAIN = Rope(16, 1e4, 1.0, None, None, 64)
LONGROPE = Rope(16, 1e4, 1.0, [1.0] * 8, [2.0] * 8, 64)


@pytest.mark.own
@pytest.mark.parametrize("base", ["int4", "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_together_as_alone(variant: str, base: Base) -> None:
    rope = open_checkpoint(str(checkpoint(variant)), download=False, blocks=False).architecture.rope
    assert (rope.long_factor is not None) == (variant == "longrope")
    rows = prompted_rows(LENGTHS)
    model, pulse = Measured(bundle(variant, base).path, rope), Pulse(silent, "{}")
    assert len(list(batches(rows, rope))) < len(rows)
    alone = [model.answer_loss([row], pulse) for row in rows]
    expected = np.average(alone, weights=[row.trained_tokens for row in rows])
    assert model.answer_loss(rows, pulse) == pytest.approx(expected, rel=1e-6)
    for row, loss in zip(rows, alone, strict=True):
        only = [each if each is row else replace(each, labels=[IGNORED] * len(each.labels)) for each in rows]
        assert model.answer_loss(only, pulse) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("rope", [PLAIN, LONGROPE])
def test_what_shares_a_pass(rope: Rope) -> None:
    rows = prompted_rows(LENGTHS * 5)
    found = list(batches(rows, rope))
    assert sorted(row.line for batch in found for row in batch) == [row.line for row in rows]
    assert max(map(len, found)) > MEASURED_ROWS
    longest = max(LENGTHS)
    for batch in found:
        lengths = [len(row.input_ids) for row in batch]
        assert len(batch) * max(lengths) <= MEASURED_ROWS * longest
        assert len(batch) * max(lengths) ** 2 <= MEASURED_ROWS * longest**2
        if rope is LONGROPE:
            assert (max(lengths) > 64) == (min(lengths) > 64)
    assert any(max(len(row.input_ids) for row in batch) > 64 for batch in found)


def test_one_row() -> None:
    (row,) = prompted_rows([7])
    assert list(batches([row], PLAIN)) == [[row]]


def test_a_pulse_is_heard_when_nothing_was_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pulses, "monotonic", lambda: now)
    said: list[str] = []
    pulse = Pulse(said.append, "measured {} of 9 rows")
    for _ in range(3):
        pulse.add(1)
    assert said == []
    now += pulses.EVERY
    pulse.add(2)
    pulse.add(1)
    assert said == ["measured 5 of 9 rows"]
    now += pulses.EVERY
    pulse.add(3)
    assert said == ["measured 5 of 9 rows", "measured 9 of 9 rows"]


@pytest.mark.parametrize("merge", [True, False])
def test_export_says_how_far_it_is(merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "EVERY", 0.0)
    source = bundle("grouped-query", "int4")
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "is it on?", "completion": " yes"}] * 7)
    said: list[str] = []
    adapter = save_adapter(tmp_path / "adapter", source)
    export(source, adapter, tmp_path / "model", ExportConfig(merge=merge), valid=rows, say=said.append)
    models = 5 if merge else 2
    assert said[-1] == f"measured {7 * models} of {7 * models} rows ({models} models)"


def test_eval_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "EVERY", 0.0)
    source = make_bundle(tmp_path / "bundle")
    said: list[str] = []
    evaluate(source.path, write_rows(tmp_path / "rows.jsonl", word_rows(9)), say=said.append)
    assert said[-1] == "measured 9 of 9 rows"
