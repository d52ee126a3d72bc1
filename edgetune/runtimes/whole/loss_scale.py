"""Loss scaling: gradients in half precision stay between its smallest and its largest number.

float16 ends at 65,504 and has no normal number below 6e-5. The gradient of the logits is (p − 1) · scale / count, so
the scale follows the count of trained tokens: whatever the batch, a wrong token starts with a gradient of about 8.
Measured on the HTP, gradients are equally good with 1 to 256 there, and worse from 2⁻⁸ on. Powers of two change no
mantissa. The scale is halved when a gradient overflows, and grows back later (Micikevicius et al. 2018, "Mixed
Precision Training", section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

_HEADROOM = 3
"""Log2 of the gradient that a wrong token starts with."""
_LARGEST = 15
"""Log2 of the largest scale: it is a float16 itself on its way in."""
_PATIENCE = 200
"""Batches without overflow after which the scale doubles, up to where it began. Batches, not steps: if it is too large
again, one batch is computed twice."""


class LossScale:
    """A power of two for each batch."""

    def __init__(self) -> None:
        self._headroom = _HEADROOM
        self._calm = 0

    @property
    def state(self) -> tuple[int, int]:
        """What `restore` takes."""
        return self._headroom, self._calm

    def restore(self, state: Iterable[int]) -> None:
        """Go on where another one was when it gave this state."""
        self._headroom, self._calm = map(int, state)

    def of(self, trained_tokens: int) -> float:
        """What the loss of a batch is multiplied with.

        Args:
            trained_tokens: Labels of the batch that count.
        """
        return float(2.0 ** min(_LARGEST, math.floor(math.log2(max(1, trained_tokens))) + self._headroom))

    def overflowed(self) -> bool:
        """Halve the scale; False when that helps no more: then the step itself is not finite."""
        self._calm = 0
        self._headroom -= 1
        return self._headroom >= -_HEADROOM

    def fitted(self) -> None:
        """The gradient of a batch was finite."""
        self._calm += 1
        if self._calm >= _PATIENCE and self._headroom < _HEADROOM:
            self._headroom += 1
            self._calm = 0
