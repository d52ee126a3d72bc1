"""Training without a backward pass: the gradient is estimated from losses alone.

SPSA (Spall 1992), with perturbations that are regenerated from their seed as in MeZO (Malladi et al. 2023). A query
adds ε·u to all trained parameters at once, u being ±1 at random, and measures the loss; how much it changes says how
far the gradient points along u. The mean of what the queries say is an unbiased estimate of the gradient, up to ε².

Only the B matrices are trained, as in LoRA-FA (Zhang et al. 2023). Noise is what limits this method: it moves all
parameters the same, and A's are so small that they would soon be nothing but noise.

Nothing as large as the gradient is kept. AdamW divides every parameter's step by the root mean square of its gradient;
here noise makes that the same for all parameters, so that one number takes the place of both moments. Another number
keeps the noise in bounds. It raises the loss by the curvature, and the queries' losses tell how much: they lie above
the loss in their middle by ε²/2 times the trace of the Hessian. Where the learning rate asks for more than what gains
most, the step is that short.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.adamw import clip_factor
from edgetune.data.batches import Batch
from edgetune.runtimes import Forward, OptimizerConfig, Parameters, StepResult

Floats = NDArray[np.float32]
_TRAINED = ".lora_B."
_BETA = 0.98
"""Of what is averaged over steps: slopes and curvature."""
_SHARED = 0.2
"""Of the squared gradient of a batch, what all rows have in common with it, and only that is a gain: at least so much,
as measured on the demo's rows (0.4 in the beginning, 0.24 later)."""
_EPSILON = 1e-8
_WORD = 64
"""Bits that the generator gives at a time."""


@dataclass(frozen=True)
class QueryConfig:
    """How the gradient is estimated."""

    queries: int
    """Perturbations a step, two at least."""
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


class _Average:
    """Over steps, the last ones counting most; without bias towards zero, as Adam's moments."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> None:
        self._sum += (1 - _BETA) * (value - self._sum)
        self._weight += (1 - _BETA) * (1 - self._weight)

    @property
    def mean(self) -> float:
        return self._sum / self._weight


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
        self._square, self._clipped_square, self._curvature = _Average(), _Average(), _Average()

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `edgetune.runtimes.Session.step`; the gradient's norm is an estimate.

        A query moves the parameters along its direction, in proportion to its slope: by `learning_rate` where the slope
        is as usual. Queries add up like noise: a step moves a parameter by the root of their number times that.
        """
        loss = self._loss(batches)
        losses = self._query_losses(batches)
        # E (g·u)² = |g|² for random signs u.
        slopes = self._slopes(losses)
        norm = math.sqrt(float(np.mean(slopes**2)))
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            self._curvature.add(2 * (float(losses.mean()) - loss) / self._config.perturbation_size**2)
            self._update(slopes, norm, learning_rate)
            self._steps_done += 1
        self._unperturb()
        return StepResult(loss, norm, applied)

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.Session.evaluate`."""
        return self._forward.evaluate(batch)

    def adapter(self) -> Parameters:
        """See `edgetune.runtimes.Session.adapter`."""
        return self._parameters

    def gradient(self, batches: Sequence[Batch]) -> Parameters:
        """The estimate of the next step's gradient, for every trained parameter; changes nothing."""
        slopes = self._slopes(self._query_losses(batches))
        self._unperturb()
        return dict(self._combined(slopes / len(slopes)))

    def _query_losses(self, batches: Sequence[Batch]) -> NDArray[np.float64]:
        """The loss of each query (queries). Leaves the model perturbed."""
        losses = []
        for query in range(self._config.queries):
            for place, name in enumerate(self._trained):
                perturbed = np.float32(self._config.perturbation_size) * self._signs(query, place)
                perturbed += self._parameters[name]
                self._forward.set_parameter(name, perturbed)
            losses.append(self._loss(batches))
        return np.array(losses)

    def _slopes(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each query says of the gradient along its direction: (queries).

        A loss is compared with the mean of the other queries' (leave one out), which has in it what curvature adds to
        all of them alike.
        """
        count = len(losses)
        with np.errstate(invalid="ignore"):
            differences: NDArray[np.float64] = losses - losses.mean()
            return differences * (count / (count - 1) / self._config.perturbation_size)

    def _update(self, slopes: NDArray[np.float64], norm: float, learning_rate: float) -> None:
        clip = clip_factor(norm, self._optimizer.max_grad_norm)
        self._square.add(norm**2)
        self._clipped_square.add((clip * norm) ** 2)
        # A step of this rate gains rate · |g| a query, of which a share lasts, and loses rate²/2 · trace.
        trace = max(self._curvature.mean, _EPSILON)
        rate = min(learning_rate, _SHARED * math.sqrt(self._square.mean) / trace)
        usual = math.sqrt(self._clipped_square.mean) + _EPSILON
        decay = np.float32(1 - learning_rate * self._optimizer.weight_decay)
        for name, change in self._combined(slopes * (rate * clip / usual)):
            parameter = self._parameters[name]
            parameter *= decay
            parameter -= change

    def _unperturb(self) -> None:
        for name in self._trained:
            self._forward.set_parameter(name, self._parameters[name])

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
