"""The rate of a run that asks for none, against what its source publishes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgetune.model.learning_rate import suitable_rate
from edgetune.model.lora import Lora, Slot

SLOTS = [Slot(f"model.layers.0.{name}", 64, 64) for name in ("self_attn.qkv_proj", "mlp.down_proj")]
LORA = Lora(rank=8, alpha=16.0, target_modules=["qkv_proj", "down_proj"], slots=SLOTS)
SHORT, LONG = 100, 1000


def test_it_falls_with_the_width_as_published() -> None:
    """5e-4 · (2000 / hidden)^0.781 for Llama models, whose hidden sizes these are."""
    for hidden, published in {2048: 4.9e-4, 3072: 3.6e-4, 4096: 2.9e-4}.items():
        assert suitable_rate(hidden, LORA, SHORT) == pytest.approx(published, rel=0.02)


def test_a_short_run_has_half_as_much_again_as_a_long_one() -> None:
    assert suitable_rate(2048, LORA, SHORT) / suitable_rate(2048, LORA, LONG) == pytest.approx(1.5, rel=0.02)
    rates = [suitable_rate(2048, LORA, steps) for steps in (1, SHORT, 200, 400, LONG, 10**6)]
    assert rates == sorted(rates, reverse=True) and (rates[0], rates[-2]) == (rates[1], rates[-1])


def test_the_rank_alone_changes_nothing() -> None:
    assert suitable_rate(576, replace(LORA, rank=64), SHORT) == suitable_rate(576, LORA, SHORT)


def test_four_times_alpha_halves_it_and_the_slots_that_are_scaled_most_decide() -> None:
    strong = replace(LORA, alpha=64.0)
    assert suitable_rate(576, strong, SHORT) == pytest.approx(suitable_rate(576, LORA, SHORT) / 2, rel=0.02)
    for alike in (replace(LORA, alpha_pattern={"down_proj": 64.0}), replace(LORA, rank=16, rank_stabilised=True)):
        assert suitable_rate(576, alike, SHORT) == suitable_rate(576, strong, SHORT)


def test_b_and_everything_else_lie_around_it_with_lora_plus() -> None:
    plain, plus = (suitable_rate(2048, LORA, SHORT, ratio) for ratio in (1.0, 16.0))
    assert plus * (plus * 16) == pytest.approx(plain**2, rel=0.05)
