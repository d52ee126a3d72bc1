"""The peak learning rate that suits a run which asks for none: a closed form of the model, its adapter and the steps.

The best rate of LoRA falls with the width of the model and hardly depends on the rank; at alpha 32 it is
5e-4 · (2000 / hidden)^0.781 for Llama's architecture, which is Phi-3's as well, and half as much again in short runs
(Schulman et al. 2025, "LoRA Without Regret", and the code that they publish beside it).
`docs/decisions/0038-default-learning-rate.md` has what was measured.
"""

from __future__ import annotations

import math

from edgetune.model.lora import Lora

FORWARD_ONLY_RATE = 3e-3
"""Of steps that are estimated without a backward pass, which are shorter where the measured curvature asks for it."""
_RATE, _HIDDEN, _ALPHA, _WIDTH_EXPONENT = 5e-4, 2000, 32, 0.781
_SHORT_RUN, _SHORT_STEPS = 1.5, 100
_DIGITS = 2
"""Of the number that is told and recorded."""


def suitable_rate(hidden_size: int, lora: Lora, steps: int, lora_plus_ratio: float = 1.0) -> float:
    """A peak learning rate for AdamW with one of the schedules, of two digits.

    Args:
        hidden_size: Width of the model's hidden states.
        lora: The slots that are trained, at least one.
        steps: Optimizer steps of the whole run.
        lora_plus_ratio: The rate of B matrices as a multiple of that of all else: the geometric mean of both is what
            suits a run without it.
    """
    strength = max(lora.scaling_of(slot.module) * lora.rank_of(slot.module) for slot in lora.slots)
    rate = _RATE * (_HIDDEN / hidden_size) ** _WIDTH_EXPONENT * _ALPHA / strength
    rate *= _SHORT_RUN if steps <= _SHORT_STEPS else 1
    return float(f"{rate / math.sqrt(lora_plus_ratio):.{_DIGITS}g}")
