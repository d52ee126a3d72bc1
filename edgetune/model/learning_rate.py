"""The peak learning rate that suits a run which asks for none: a closed form of the model, its adapter and the steps.

The best rate of LoRA falls with the width of the model and hardly depends on the rank: for Llama's architecture, which
is Phi-3's as well, as (2000 / hidden)^0.781. In runs of a hundred steps it is half as much again as in long ones
(Schulman et al. 2025, "LoRA Without Regret", and the code that its authors publish for it). B·A is scaled by alpha, and
when a run is over both have moved about as far: what B·A has become grows with alpha and the square of the rate.
`docs/decisions/0038-default-learning-rate.md` has what was measured.
"""

from __future__ import annotations

import math

from edgetune.model.lora import Lora

FORWARD_ONLY_RATE = 3e-3
"""Where the gradient is estimated without a backward pass: the steps are shorter where the measured curvature asks for
it, so that too high a rate does little harm."""
_RATE, _HIDDEN, _ALPHA, _WIDTH_EXPONENT = 5e-4, 2000, 16, 0.781
"""A short run's rate where the hidden size and alpha are these, and how it falls with the former."""
_SHORT, _LONG, _LONG_SHARE = 100, 1000, 2 / 3
"""Steps of a short run and of a long one, and how much of the former's rate the latter has."""
_DIGITS = 2
"""Of the number that is told and recorded."""


def suitable_rate(hidden_size: int, lora: Lora, steps: int, lora_plus_ratio: float = 1.0) -> float:
    """A peak learning rate for AdamW, of two digits.

    Args:
        hidden_size: Width of the model's hidden states.
        lora: The slots that are trained, at least one.
        steps: Optimizer steps of the whole run.
        lora_plus_ratio: The rate of B matrices as a multiple of that of all else. The geometric mean of both is what
            one rate for all would be.
    """
    alpha = max(lora.scaling_of(slot.module) * lora.rank_of(slot.module) for slot in lora.slots)
    rate = _RATE * (_HIDDEN / hidden_size) ** _WIDTH_EXPONENT * math.sqrt(_ALPHA / alpha)
    length = math.log(min(max(steps, _SHORT), _LONG) / _SHORT) / math.log(_LONG / _SHORT)
    return float(f"{rate * _LONG_SHARE**length / math.sqrt(lora_plus_ratio):.{_DIGITS}g}")
