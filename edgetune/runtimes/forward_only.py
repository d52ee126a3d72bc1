"""Training without a backward pass: the gradient is estimated from losses alone.

SPSA (Spall 1992), with perturbations that are regenerated from their seed as in MeZO (Malladi et al. 2023). A query
adds ε·u to all trained parameters at once, u being ±1 at random, and measures the loss; how much it changes says how
far the gradient points along u. The mean of what the queries say is an unbiased estimate of the gradient, up to ε².

Only the B matrices are trained, as in LoRA-FA (Zhang et al. 2023). Noise is what limits this method: it moves all
parameters the same, and A's are so small that they would soon be nothing but noise.

Nothing as large as the gradient is kept. AdamW divides every parameter's step by the root mean square of its gradient;
here noise makes that nearly the same for all parameters, so that one number takes the place of both moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.runtimes import Forward, OptimizerConfig, Parameters, StepResult

Floats = NDArray[np.float32]
_TRAINED = ".lora_B."
_BETA = 0.99
"""Of the mean square of the slopes, over steps."""
_EPSILON = 1e-8
_CLIP_EPSILON = 1e-6
"""As torch.nn.utils.clip_grad_norm_ has it."""
_WORD = 64
"""Bits that the generator gives at a time."""


@dataclass(frozen=True)
class QueryConfig:
    """How the gradient is estimated."""

    queries: int
    """Perturbations a step."""
    perturbation_size: float
    """ε: by how much each parameter is moved to measure the loss."""
    seed: int


def signs(seed: int, step: int, query: int, parameter: int, size: int) -> Floats:
    """A perturbation's direction: ±1, the same for the same arguments on every machine.

    Bits of Philox4x64-10 (Salmon et al. 2011), the lowest of a word first; a set bit is +1.

    Args:
        seed: The generator's key.
        step: Counted from 1; with `query` and `parameter` it is the counter at which the generator starts.
        query: Counted from 0.
        parameter: Its place among the trained parameters.
        size: How many.
    """
    generator = np.random.Philox(key=seed % (1 << 128), counter=[0, parameter, query, step])
    words = generator.random_raw(-(-size // _WORD)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=size, bitorder="little")
    return bits.astype(np.float32) * np.float32(2) - np.float32(1)


class ForwardOnlySession:
    """A model in training on a runtime that only runs forward; see `edgetune.runtimes.Session`.

    Args:
        forward: The model. It holds the parameters that are measured.
        parameters: First values; they are copied.
        optimizer: Decay and clipping.
        config: How the gradient is estimated.
    """

    def __init__(
        self, forward: Forward, parameters: Parameters, optimizer: OptimizerConfig, config: QueryConfig
    ) -> None:
        self._forward, self._optimizer, self._config = forward, optimizer, config
        # What is measured is always made from this copy, so that nothing drifts.
        self._parameters = {name: array.copy() for name, array in parameters.items()}
        self._trained = [name for name in parameters if _TRAINED in name]
        self._steps_done = 0
        self._mean_square = 0.0

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `edgetune.runtimes.Session.step`; the gradient's norm is an estimate, the root mean square of slopes."""
        loss = self._loss(batches)
        slopes = self._slopes(batches)
        # Slope and gradient's norm: E (g·u)² = |g|² for random signs u.
        square = float(np.mean(slopes**2))
        norm = math.sqrt(square)
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            self._update(slopes, norm, learning_rate)
            self._steps_done += 1
        for name in self._trained:
            self._forward.set_parameter(name, self._parameters[name])
        return StepResult(loss, norm, applied)

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.Session.evaluate`."""
        return self._forward.evaluate(batch)

    def adapter(self) -> Parameters:
        """See `edgetune.runtimes.Session.adapter`."""
        return self._parameters

    def gradient(self, batches: Sequence[Batch]) -> Parameters:
        """The estimate of the next step's gradient, for every trained parameter; changes nothing."""
        slopes = self._slopes(batches)
        for name in self._trained:
            self._forward.set_parameter(name, self._parameters[name])
        return dict(self._combined(slopes / len(slopes)))

    def _slopes(self, batches: Sequence[Batch]) -> NDArray[np.float64]:
        """What each query says of the gradient along its direction: (queries). Leaves the model perturbed.

        The other queries' mean is the loss that a query's is compared with (leave one out): it has in it what curvature
        adds to all of them alike, and takes no pass of its own. A single query is compared with the loss as it is.
        """
        count, size = self._config.queries, self._config.perturbation_size
        unperturbed = self._loss(batches) if count == 1 else 0.0
        losses = []
        for query in range(count):
            for place, name in enumerate(self._trained):
                perturbation = np.float32(size) * self._signs(query, place)
                perturbation += self._parameters[name]
                self._forward.set_parameter(name, perturbation)
            losses.append(self._loss(batches))
        measured = np.array(losses)
        with np.errstate(invalid="ignore"):
            if count == 1:
                return (measured - unperturbed) / size
            return (measured - measured.mean()) * (count / (count - 1) / size)

    def _update(self, slopes: NDArray[np.float64], norm: float, learning_rate: float) -> None:
        most = self._optimizer.max_grad_norm
        clip = min(1.0, most / (norm + _CLIP_EPSILON)) if most else 1.0
        self._mean_square = _BETA * self._mean_square + (1 - _BETA) * (clip * norm) ** 2
        expected = self._mean_square / (1 - _BETA ** (self._steps_done + 1))
        # Root mean square of an element of the estimate: independent queries add up like noise.
        element = math.sqrt(expected / len(slopes)) + _EPSILON
        shares = slopes * (learning_rate * clip / (len(slopes) * element))
        decay = np.float32(1 - learning_rate * self._optimizer.weight_decay)
        for name, change in self._combined(shares):
            parameter = self._parameters[name]
            parameter *= decay
            parameter -= change

    def _combined(self, shares: NDArray[np.float64]) -> Iterator[tuple[str, Floats]]:
        """Σ share · direction over the queries, for each trained parameter."""
        for place, name in enumerate(self._trained):
            total = np.zeros(self._parameters[name].shape, np.float32)
            for query, share in enumerate(shares):
                total += np.float32(share) * self._signs(query, place)
            yield name, total

    def _signs(self, query: int, place: int) -> Floats:
        """The direction of a query of the next step."""
        shape = self._parameters[self._trained[place]].shape
        return signs(self._config.seed, self._steps_done + 1, query, place, math.prod(shape)).reshape(shape)

    def _loss(self, batches: Sequence[Batch]) -> float:
        """Mean over all trained tokens of the micro-batches."""
        total = sum(batch.trained_tokens for batch in batches)
        return sum(batch.trained_tokens / total * self._forward.evaluate(batch) for batch in batches)
