"""The golden folder: a tiny bundle, its rows, and what PyTorch and PEFT say of them."""

from __future__ import annotations

from support.repository import ROOT

GOLDEN = ROOT / "artifacts" / "golden"
BUNDLE, ADAPTER = GOLDEN / "bundle", GOLDEN / "initial_adapter"
EARLIER = ROOT / "artifacts" / "earlier"
"""Bundle and expectations as an earlier version made them, of the same checkpoint: they have to load and train."""
TRAIN, VALID = GOLDEN / "train.jsonl", GOLDEN / "valid.jsonl"
