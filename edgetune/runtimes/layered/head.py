"""Loss and gradient of the trained rows, never with all logits at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import HEAD, FrozenWeights
from edgetune.formats.roles import LAYERS
from edgetune.model.pieces import Slice
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.layered.backend import Backend, LayeredGraph
from edgetune.runtimes.layered.weights import LinearWeights

NORM, WEIGHT = "model.norm.weight", HEAD
SPLIT = np.float32(2**16 + 1)
"""c − (c − x) with c = this times x are the 8 leading bits of x (Veltkamp's splitting)."""
_UNLIKELY = np.float32(1e-30)
"""A probability that nothing needs to be done for."""
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class Head:
    """Final norm, logits and cross entropy.

    With the whole vocabulary at a time one run of the graph gives losses and gradient. With pieces of it there
    are two runs for each: the first adds up logsumexp, the second the gradient.

    Args:
        bundle: Holds the graphs `head`, `head_grad` and `head_step`; the latter two are loaded when they are needed.
        backend: Runs them.
        frozen: Holds the norm's weight.
        linear: Holds the weight of the logits.
        plan: How many rows and tokens have logits at the same time.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, frozen: FrozenWeights, linear: LinearWeights, plan: LayeredPlan
    ) -> None:
        self._bundle, self._backend = bundle, backend
        self._forward = self._load("head")
        self._fixed_shapes = backend.fixed_shapes
        self._frozen, self._linear = frozen, linear
        self._channels = backend.channels
        self._norm = self._channels.put(frozen.plain(NORM), 0)
        self._rows = plan.head_rows
        self._vocabulary = frozen.shape(WEIGHT)[0]
        self._tokens = plan.head_tokens or self._vocabulary

    def _load(self, name: str) -> LayeredGraph:
        return self._backend.load(self._bundle.file(f"{LAYERS}/{name}"))

    @cached_property
    def _gradient(self) -> LayeredGraph:
        return self._load("head_grad")

    @cached_property
    def _whole(self) -> LayeredGraph:
        return self._load("head_step")

    def losses(self, hidden: Floats, labels: Labels) -> Floats:
        """The loss of each row.

        Args:
            hidden: (rows, hidden_size) before the final norm, channels in the backend's order.
            labels: (rows) target tokens.
        """
        count = len(labels)
        logsumexp, target = self._logsumexp(*self._padded(hidden, self._label_weights(labels)))
        return _not_negative(logsumexp - target)[:count]

    def step(self, hidden: Floats, labels: Labels, scale: float) -> tuple[Floats, Floats]:
        """The loss of each row (rows), and the gradient of scale · Σ losses (rows, hidden_size)."""
        count, scales = len(labels), np.array([scale], dtype=np.float32)
        hidden, label_weights = self._padded(hidden, self._label_weights(labels))
        if self._tokens >= self._vocabulary:
            losses, gradient = np.empty((len(hidden), 1), dtype=np.float32), np.empty_like(hidden)
            shared = {NORM: self._norm, WEIGHT: self._weight(0, self._vocabulary), "scale": scales}
            for rows in self._row_slices(len(hidden)):
                inputs = {**shared, "hidden": hidden[rows], "label_weights": label_weights[rows]}
                self._whole.run(inputs, {"losses": losses[rows], "hidden.grad": gradient[rows]})
            return _not_negative(losses)[:count], gradient[:count]
        logsumexp, target = self._logsumexp(hidden, label_weights)
        divisor, grown = _short_probability(logsumexp, target)
        gradient = np.zeros_like(hidden)
        for rows, inputs in self._pieces(hidden, label_weights * grown):
            piece = np.empty_like(hidden[rows])
            self._gradient.run({**inputs, "logsumexp": divisor[rows], "scale": scales}, {"hidden.grad": piece})
            gradient[rows] += piece / grown[rows]
        return _not_negative(logsumexp - target)[:count], gradient[:count]

    def _padded(self, hidden: Floats, label_weights: Floats) -> tuple[Floats, Floats]:
        """With rows of zeros behind, where graphs are compiled for every number of rows: then few numbers occur."""
        count = len(hidden)
        missing = -count % min(self._rows, 1 << max(0, count - 1).bit_length())
        if not self._fixed_shapes or not missing:
            return hidden, label_weights
        padding = ((0, missing), (0, 0))
        return np.pad(hidden, padding), np.pad(label_weights, padding)

    def _logsumexp(self, hidden: Floats, label_weights: Floats) -> tuple[Floats, Floats]:
        """(rows, 1) logsumexp over the vocabulary, and the label's logit."""
        logsumexp = np.full((len(hidden), 1), -np.inf, dtype=np.float32)
        target = np.zeros((len(hidden), 1), dtype=np.float32)
        for rows, inputs in self._pieces(hidden, label_weights):
            piece, picked = np.empty((2, len(inputs["hidden"]), 1), dtype=np.float32)
            self._forward.run(inputs, {"logsumexp": piece, "target": picked})
            logsumexp[rows] = np.logaddexp(logsumexp[rows], piece)
            target[rows] += picked
        return logsumexp, target

    def _pieces(self, hidden: Floats, label_weights: Floats) -> Iterator[tuple[slice, dict[str, NDArray[Any]]]]:
        """Pieces of the vocabulary, and within each slices of the rows."""
        nothing = np.zeros_like(label_weights[: self._rows])
        for first in range(0, self._vocabulary, self._tokens):
            shared = {NORM: self._norm, WEIGHT: self._weight(first, min(self._vocabulary, first + self._tokens))}
            for rows in self._row_slices(len(hidden)):
                # Labels count with the first piece, wherever they are.
                labels = nothing[: rows.stop - rows.start] if first else label_weights[rows]
                yield rows, {**shared, "hidden": hidden[rows], "label_weights": labels}

    def _label_weights(self, labels: Labels) -> Floats:
        """Rounded as the weight is that logits are products with: the loss and its gradient are differences of both."""
        weights = self._channels.put(self._frozen.rows(WEIGHT, labels), 1)
        stored = np.empty(weights.shape, dtype=self._backend.storage)
        self._backend.store(weights, stored)
        return self._backend.restore(stored)

    def _weight(self, first: int, last: int) -> NDArray[Any]:
        return self._linear.take({WEIGHT: Slice(WEIGHT, (first, last))})[WEIGHT]

    def _row_slices(self, count: int) -> list[slice]:
        return [slice(start, min(count, start + self._rows)) for start in range(0, count, self._rows)]


def _not_negative(losses: Floats) -> Floats:
    """(rows) of (rows, 1): a cross entropy. Logsumexp and logit are sums in different orders, off by their rounding."""
    return np.maximum(losses, 0)[:, 0]


def _short_probability(logsumexp: Floats, target: Floats) -> tuple[Floats, Floats]:
    """A number in place of each logsumexp with which the label's probability has 8 bits, and by how much all grow.

    Softmax(z)·W − W[label] is small where the label is likely. A product that rounds probabilities to bfloat16 would
    leave the rounding of that one; so it gets a number that is not rounded.
    """
    probability = np.exp(target - logsumexp)
    grown = probability * SPLIT
    short = grown - (grown - probability)
    divisor = np.where(short > _UNLIKELY, target - np.log(np.maximum(short, _UNLIKELY)), logsumexp)
    return divisor, np.exp(logsumexp - divisor)
