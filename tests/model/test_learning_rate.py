"""The rate of a run that asks for none, against the figures that its source publishes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgetune.model.learning_rate import suitable_rate
from edgetune.model.lora import Lora, Slot

SLOTS = [Slot(f"model.layers.0.{name}", 64, 64) for name in ("self_attn.qkv_proj", "mlp.down_proj")]
LORA = Lora(rank=8, alpha=32.0, target_modules=["qkv_proj", "down_proj"], slots=SLOTS)
MANY = 10_000


def test_it_is_the_published_one_where_that_was_measured() -> None:
    """Thinking Machines' code gives 5e-4 · (2000 / hidden)^0.781 for Llama models, whose hidden sizes these are."""
    for hidden, published in {2048: 4.9e-4, 3072: 3.6e-4, 4096: 2.9e-4}.items():
        assert suitable_rate(hidden, LORA, MANY) == pytest.approx(published, rel=0.02)


def test_the_rank_alone_changes_nothing() -> None:
    assert suitable_rate(576, replace(LORA, rank=64), MANY) == suitable_rate(576, LORA, MANY)


def test_the_slots_that_are_scaled_most_decide() -> None:
    strong = replace(LORA, alpha_pattern={"down_proj": 128.0})
    assert suitable_rate(576, strong, MANY) == suitable_rate(576, replace(LORA, alpha=128.0), MANY)
    stabilised = replace(LORA, rank=16, rank_stabilised=True)
    assert suitable_rate(576, stabilised, MANY) == suitable_rate(576, replace(LORA, alpha=128.0), MANY)


def test_b_and_everything_else_lie_around_it_with_lora_plus() -> None:
    plain, plus = (suitable_rate(2048, LORA, MANY, ratio) for ratio in (1.0, 16.0))
    assert plus * (plus * 16) == pytest.approx(plain**2, rel=0.05)
