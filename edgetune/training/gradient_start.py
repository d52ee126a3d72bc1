"""A first adapter that points where the loss falls: `--init gradient`.

A's rows are the leading right singular vectors of the loss's gradient by the frozen weight, and B is zero, so that the
first model is the base and the adapter stays plain LoRA (after LoRA-GA, Wang et al. 2024, and LoRA-One, Zhang et al.
2025, which change the base as well). No gradient of a frozen weight is ever computed: the graphs give those of A and B,
and these are products with it. With G = ∂L/∂W and scaling s,

    B = 0:         ∂L/∂B = s · G · Aᵀ    a sketch of G's columns by A's random rows
    A = 0, B = Q:  ∂L/∂A = s · Qᵀ · G    what G is within the sketch, whose orthonormal basis Q is

which is a randomised singular value decomposition (Halko, Martinsson and Tropp 2011, algorithm 5.1) of as many columns
as the slot has ranks. It is done again with the rows that were found in the place of the random ones (their algorithm
4.4): a sketch along them misses less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.errors import EdgetuneError, IncompatibleError
from edgetune.model.lora import Lora, Parameters
from edgetune.runtimes.contract import Session

FIRST_STEPS = 2
"""Whose batches the gradient is taken of."""
_ROUNDS = 2
"""Of the decomposition, each with two gradients."""


@runtime_checkable
class Differentiating(Session, Protocol):
    """A session that gives gradients by name, and takes parameters."""

    def set_parameter(self, name: str, values: NDArray[np.float32]) -> None:
        """Give a parameter other values; they are copied."""
        ...

    def gradients(self) -> Parameters:
        """The last step's gradients, before clipping, until the next step."""
        ...


def start_from_gradient(session: Session, lora: Lora, batches: Sequence[Batch]) -> None:
    """Set A of every slot of a fresh session by the gradient of these batches; all else is as it was.

    A's rows have the length that random ones have on average, 1 / √3. Where the gradient has fewer directions than the
    slot has ranks, the remaining rows stay random.

    Args:
        session: Before its first step, B being zero.
        lora: The slots that are trained.
        batches: Of the first steps.

    Raises:
        EdgetuneError: The gradient is not finite.
        IncompatibleError: The session gives no gradients by name.
    """
    if not isinstance(session, Differentiating):
        raise IncompatibleError(
            "this runtime gives no gradients by name, so --init gradient has nothing to start from; use --runtime "
            "onnxruntime or openvino, or leave --init out"
        )
    fresh = {name: array.copy() for name, array in session.state().items()}
    rows = {slot.a: np.array(session.adapter()[slot.a]) for slot in lora.slots}
    for _ in range(_ROUNDS):
        sketches = _gradients(session, batches, [slot.b for slot in lora.slots])
        for slot in lora.slots:
            session.set_parameter(slot.a, np.zeros_like(rows[slot.a]))
            basis, _ = np.linalg.qr(sketches[slot.b].astype(np.float64))
            session.set_parameter(slot.b, np.ascontiguousarray(basis, np.float32))
        within = _gradients(session, batches, [slot.a for slot in lora.slots])
        # What the steps made of the moments is no training; B is zero again.
        session.restore(fresh)
        for slot in lora.slots:
            rows[slot.a] = _rows(within[slot.a], rows[slot.a])
            session.set_parameter(slot.a, rows[slot.a])


def _gradients(session: Differentiating, batches: Sequence[Batch], names: Sequence[str]) -> Parameters:
    # A learning rate of zero changes no parameter.
    result = session.step(batches, 0.0)
    if not result.applied:
        raise EdgetuneError("the gradient of the first batches is not finite, so --init gradient has no start")
    found = session.gradients()
    return {name: np.array(found[name]) for name in names}


def _rows(within: NDArray[np.float32], random: NDArray[np.float32]) -> NDArray[np.float32]:
    """A (rank, in): right singular vectors of Qᵀ·G, the leading ones first."""
    _, values, rows = np.linalg.svd(within.astype(np.float64), full_matrices=False)
    started = random.copy()
    known = int((values > values[0] * np.finfo(np.float32).eps).sum()) if values[0] else 0
    started[:known] = rows[:known] / math.sqrt(3)
    return started
