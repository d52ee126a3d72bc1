"""Loss and gradient of the trained rows, never with all logits at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.frozen import FrozenWeights
from edgetune.runtimes.layered.backend import Backend
from edgetune.runtimes.layered.weights import LinearWeights

NORM, WEIGHT = "model.norm.weight", "lm_head.weight"
Floats = NDArray[np.float32]


class Head:
    """Final norm, logits and cross entropy.

    Args:
        folder: Holds the graphs `head`, `head_grad` and `head_step`.
        backend: Runs them.
        frozen: Holds the norm's weight.
        linear: Holds the weight of the logits.
        rows: How many rows have logits at the same time.
    """

    def __init__(self, folder: Path, backend: Backend, frozen: FrozenWeights, linear: LinearWeights, rows: int) -> None:
        self._step = backend.load(folder / "head_step.onnx")
        self._forward = backend.load(folder / "head.onnx")
        self._linear = linear
        self._norm = frozen.plain(NORM)
        self._rows = rows

    def losses(self, hidden: Floats, labels: NDArray[np.int64]) -> Floats:
        """The loss of each row.

        Args:
            hidden: (rows, hidden_size) before the final norm.
            labels: (rows) target tokens.
        """
        count = len(labels)
        logsumexp, target = np.empty((2, count, 1), dtype=np.float32)
        for part, shared in self._parts(count):
            inputs = {**shared, "hidden": hidden[part], "labels": labels[part], "inside": np.ones_like(target[part])}
            self._forward.run(inputs, {"logsumexp": logsumexp[part], "target": target[part]})
        return (logsumexp - target)[:, 0]

    def step(self, hidden: Floats, labels: NDArray[np.int64], scale: float) -> tuple[Floats, Floats]:
        """The loss of each row (rows), and the gradient of scale · Σ losses (rows, hidden_size)."""
        losses, gradient = np.empty((len(labels), 1), dtype=np.float32), np.empty_like(hidden)
        scales = np.array([scale], dtype=np.float32)
        for part, shared in self._parts(len(labels)):
            inputs = {**shared, "hidden": hidden[part], "labels": labels[part], "scale": scales}
            self._step.run(inputs, {"losses": losses[part], "hidden.grad": gradient[part]})
        return losses[:, 0], gradient

    def _parts(self, count: int) -> list[tuple[slice, dict[str, NDArray[Any]]]]:
        shared = {NORM: self._norm, WEIGHT: self._linear.take([WEIGHT])[WEIGHT]}
        return [(slice(start, min(count, start + self._rows)), shared) for start in range(0, count, self._rows)]
