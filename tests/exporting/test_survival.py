"""The gate: what share of a gain is kept, and which way out a refusal names."""

from __future__ import annotations

from typing import Any

import pytest

from edgetune.config import ExportConfig
from edgetune.errors import IncompatibleError
from edgetune.exporting.survival import refuse_what_lost_too_much, share_kept

LOSSES = {"base": 3.0, "base + adapter": 1.0, "merged fp32": 1.0, "merged int8": 1.1, "merged int4": 1.5}
"""Shares of 100, 95 and 75 %."""


def test_without_a_gain_there_is_no_share_of_it() -> None:
    losses = {"base": 2.0, "base + adapter": 1.0, "merged int4": 1.25}
    assert share_kept(losses, "merged int4") == 0.75
    assert share_kept(losses | {"merged int4": 2.5}, "merged int4") == -0.5
    assert share_kept(losses | {"base": 1.0}, "merged int4") is None
    assert share_kept(losses, "merged fp32") is None
    assert share_kept({}, "merged int4") is None


@pytest.mark.parametrize(
    "config", [{"precision": "int8"}, {"precision": "int4", "least_kept": 0.75}, {"least_kept": 1.0}]
)
def test_what_keeps_enough_passes(config: dict[str, Any]) -> None:
    refuse_what_lost_too_much(LOSSES, ExportConfig(**config), "int4")


@pytest.mark.parametrize(
    ("losses", "config", "base", "ways"),
    [
        (LOSSES, {"precision": "int4"}, "int4", "--precision int8 (95.0%), --precision fp32 (100.0%), --keep-adapter"),
        (LOSSES, {"precision": "int4", "least_kept": 0.96}, "int4", "it: --precision fp32 (100.0%), --keep-adapter"),
        (LOSSES, {"precision": "int4"}, "fp32", "--keep-adapter (100.0%), an adapter that was trained on an int4 base"),
        (
            {name: LOSSES[name] for name in ("base", "base + adapter", "merged int4")},
            {"precision": "int4", "trials": False},
            "int4",
            "it: --format genai --precision fp32, --keep-adapter (100.0%);",
        ),
        (
            {"base": 3.0, "base + adapter": 1.0, "merged checkpoint": 1.5},
            {"format": "safetensors"},
            "int4",
            "it: --format genai --precision fp32, --keep-adapter (100.0%);",
        ),
        (LOSSES | {"merged int4": float("nan")}, {"precision": "int4"}, "int4", "--precision int8 (95.0%)"),
    ],
)
def test_what_loses_too_much_is_refused_with_the_ways_out(
    losses: dict[str, float], config: dict[str, Any], base: str, ways: str
) -> None:
    with pytest.raises(IncompatibleError) as refusal:
        refuse_what_lost_too_much(losses, ExportConfig(**config), base)
    assert ways in str(refusal.value)
    assert all(f"{name} {loss:.4f}" in str(refusal.value) for name, loss in losses.items())
    assert "--least-kept (0 accepts any)" in str(refusal.value)
    refuse_what_lost_too_much(losses, ExportConfig(**config | {"least_kept": 0.0}), base)


def test_an_adapter_without_a_gain_is_not_judged() -> None:
    refuse_what_lost_too_much(LOSSES | {"base": 1.0}, ExportConfig(precision="int4"), "int4")
