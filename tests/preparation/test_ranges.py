"""What a step computes on rows: which tensors float16 does not hold, by the rows that `prepare` is given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.preparation import prepare
from support.massive_activations import save_massive
from support.prepared_bundles import CONFIG


@pytest.mark.parametrize(("largest", "held"), [(24_890.0, True), (200_000.0, False)])
def test_prepare_says_what_float16_does_not_hold(largest: float, held: bool, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps({'prompt': 'the lamp', 'completion': 'is on'})}\n" * 20)
    said: list[str] = []
    source = save_massive(tmp_path / "checkpoint", largest)
    bundle = prepare(source, tmp_path / "bundle", replace(CONFIG, calibration=rows), say=said.append)
    told = bundle.manifest.provenance["float16"]
    assert f"In float16: {told}" in said
    assert told.startswith("every tensor is held" if held else "")
    assert ("not held, the first '" in told) is not held
    assert told.endswith(" of 65,504")
    reached = float(told.rpartition(" reaches ")[2].removesuffix(" of 65,504").replace(",", ""))
    assert (reached <= 65_504) is held
    # The residual stream reaches `largest`; what squares it would be far beyond.
    assert 0.3 * largest < reached < 3 * largest


def test_without_rows_nothing_is_said_of_float16(tmp_path: Path) -> None:
    bundle = prepare(save_massive(tmp_path / "checkpoint", 100.0), tmp_path / "bundle", CONFIG, say=lambda line: None)
    assert "float16" not in bundle.manifest.provenance
