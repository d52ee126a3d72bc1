"""The hidden states between sublayers, and how they are kept for the backward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.runtimes.layered.workspace import Workspace

_HALF = np.dtype(np.float16)
_SHRINK = np.float32(2**-4)
"""Applied to what is kept in float16, which then reaches to a million."""


class HiddenStates:
    """States by their numbers: 2 · layer enters a layer, 2 · layer + 1 its feed-forward network.

    Args:
        workspace: Gives arrays, in the backend's storage.
        short: Keep float32 in 16 bits.
    """

    def __init__(self, workspace: Workspace, short: bool) -> None:
        self._workspace = workspace
        self._short = short and workspace.storage == np.float32

    def array(self, number: int, shape: tuple[int, ...], *, kept: bool) -> NDArray[Any]:
        """Where a state is computed; when it is not kept as it is, the next but one is computed there, too."""
        own = kept and not self._short
        return self._workspace.array(f"hidden.{number}" if own else f"hidden.turn.{number % 2}", shape)

    def keep(self, number: int, hidden: NDArray[Any]) -> None:
        """Keep a state that was computed where `array` said."""
        if self._short:
            short = self._workspace.array(f"hidden.{number}", hidden.shape, _HALF)
            np.multiply(hidden, _SHRINK, out=short, dtype=np.float32, casting="same_kind")

    def take(self, number: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """A state that was kept; valid until the next but one is taken."""
        if not self._short:
            return self._workspace.array(f"hidden.{number}", shape)
        hidden = self._workspace.array(f"hidden.turn.{number % 2}", shape)
        short = self._workspace.array(f"hidden.{number}", shape, _HALF)
        np.divide(short, _SHRINK, out=hidden, dtype=np.float32)
        return hidden
