"""The constants of AdamW (Loshchilov and Hutter 2019), for every graph and loop: torch.optim.AdamW's defaults."""

from __future__ import annotations

BETA1, BETA2 = 0.9, 0.999
"""Decay of the two moments."""
EPSILON = 1e-8
"""Added to the root of the second moment."""
CLIP_EPSILON = 1e-6
"""torch.nn.utils.clip_grad_norm_ adds this to the norm."""


def clip_factor(norm: float, most: float) -> float:
    """What a gradient of this 2-norm is multiplied with, so that it has at most `most`; 1 where that is 0.

    As torch.nn.utils.clip_grad_norm_ computes it.
    """
    return min(1.0, most / (norm + CLIP_EPSILON)) if most else 1.0
