"""The constants of AdamW (Loshchilov and Hutter 2019): torch.optim.AdamW's defaults.

`prepare` writes them into the graphs, and into the training artifacts: another value needs other bundles, or an input
of the graphs, which is a change of the format (artifacts/FORMAT.md).
"""

from __future__ import annotations

BETA1, BETA2 = 0.9, 0.999
"""Decay of the two moments."""
EPSILON = 1e-8
"""Added to the root of the second moment."""
CLIP_EPSILON = 1e-6
"""torch.nn.utils.clip_grad_norm_ adds this to the norm."""


def clip_factor(norm: float, max_norm: float) -> float:
    """What a gradient of this 2-norm is multiplied with, so that it has at most `max_norm`; 1 where that is 0.

    As torch.nn.utils.clip_grad_norm_ computes it.
    """
    return min(1.0, max_norm / (norm + CLIP_EPSILON)) if max_norm else 1.0
