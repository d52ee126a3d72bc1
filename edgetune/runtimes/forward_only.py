"""Training without a backward pass: the gradient is estimated from losses alone.

SPSA (Spall 1992), with perturbations that are regenerated from their seed as in MeZO (Malladi et al. 2023). A query
adds ε·u to all trained parameters at once, u being ±1 at random, and measures the loss; how much it changes says how
far the gradient points along u. The mean of what the queries say is an unbiased estimate of the gradient, up to ε².

Some matrices change the loss much more than others; all moved alike, the others would hardly be heard. So each has a
size of its own, by what it is moved in queries and in steps, smaller where the loss answered strongly when that matrix
alone was moved.

Only the B matrices are trained, as in LoRA-FA (Zhang et al. 2023). Noise is what limits this method: it moves all
parameters the same, and A's are so small that they would soon be nothing but noise.

Nothing as large as the gradient is kept. AdamW divides every parameter's step by the root mean square of its gradient;
here noise makes that the same for all parameters, so that one number takes the place of both moments. Another number
keeps the noise in bounds. It raises the loss by the curvature, and the queries' losses tell how much: they lie above
the loss in their middle by ε²/2 times the trace of the Hessian. Where the learning rate asks for more than what gains
most, the step is that short. What gains most at once is too long in the end, when noise is what is left of the loss; so
that length follows the schedule of the learning rate. And no step is longer than a perturbation: nothing was measured
beyond.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.model.adamw import clip_factor
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import Forward, OptimizerConfig, Placed, Recalling, SessionState, StepResult
from edgetune.runtimes.placement import Placement

Floats = NDArray[np.float32]
_TRAINED = ".lora_B."
_DECAY = 0.98
"""A step, of what is averaged over steps: slopes and curvature. Not one of AdamW's."""
_SHARED = 0.3
"""Of the squared gradient of a batch, what all rows have in common with it, and only that is a gain. On the demo's rows
it was 0.2 to 0.4 while the model learnt without noise."""
_PROBE = 10.0
"""Perturbations' sizes by which a matrix is moved alone: it has to be heard above the rounding of a loss."""
_LEAST_RESPONSE = 1e-4
"""Of the mean: a matrix that changes nothing is not moved without end."""
_EPSILON = 1e-8
_AVERAGES, _HIGHEST_RATE, _STEPS = "averages", "highest_rate", "steps"
"""Of a session's state, beside its parameters."""
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


def passes_a_step(queries: int) -> int:
    """Through the model: the queries, the loss itself, and one parameter alone; in the first step every one alone."""
    return queries + 2


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
        self._sum += (1 - _DECAY) * (value - self._sum)
        self._weight += (1 - _DECAY) * (1 - self._weight)

    @property
    def mean(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    @property
    def state(self) -> tuple[float, float]:
        """What `restore` takes."""
        return self._sum, self._weight

    def restore(self, state: Sequence[float]) -> None:
        self._sum, self._weight = map(float, state)


class _Responses:
    """How the loss answers to each trained parameter, and by what each is moved for it.

    Args:
        sizes: Elements of each parameter.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = np.array(sizes, np.float64)
        self._squares = [_Average() for _ in sizes]

    def add(self, place: int, slope: float) -> None:
        """Take in how the loss changed with all elements of one parameter, by so much for each unit of their size."""
        self._squares[place].add(slope**2 / self._sizes[place])

    def averages(self) -> list[_Average]:
        """Of each parameter, whose state is that of all of this."""
        return self._squares

    def scales(self) -> NDArray[np.float64]:
        """A factor for each parameter's perturbations; their squares are 1 in the mean over all elements.

        It goes with the root of the response: half the way to where every element counts the same.
        """
        squares = np.array([square.mean for square in self._squares])
        if not squares.any():
            return np.ones(len(squares))
        scales: NDArray[np.float64] = np.maximum(squares, _LEAST_RESPONSE * squares.mean()) ** -0.25
        return scales / math.sqrt(np.average(scales**2, weights=self._sizes))


class ForwardOnlySession:
    """A model in training on a runtime that only runs forward; see `edgetune.runtimes.contract.Session`.

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
        self._responses = self._no_responses()
        self._scales = self._responses.scales()
        self._steps_done = 0
        self._highest_rate = _EPSILON
        self._square, self._clipped_square, self._curvature = _Average(), _Average(), _Average()

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """As `contract.Session.step` says; the gradient's norm is an estimate, with each parameter's scale in it.

        A query moves the parameters along its direction, in proportion to its slope: by `learning_rate` where the slope
        is as usual. Queries add up like noise: a step moves a parameter by the root of their number times that.
        """
        loss = self._loss(batches)
        answered = True
        if not self._steps_done:
            self._responses = self._no_responses()
            answered = all(self._probe(place, batches, loss) for place in range(len(self._trained)))
            self._scales = self._responses.scales()
        losses = self._query_losses(batches)
        self._unperturb()
        # E (g·u)² = |g|² for random signs u.
        slopes = self._slopes(losses)
        norm = math.sqrt(float(np.mean(slopes**2)))
        applied = answered and math.isfinite(loss) and math.isfinite(norm)
        if applied:
            if self._steps_done:
                self._probe(self._steps_done % len(self._trained), batches, loss)
            self._curvature.add(2 * (float(losses.mean()) - loss) / self._config.perturbation_size**2)
            self._update(slopes, norm, learning_rate)
            self._scales = self._responses.scales()
            self._steps_done += 1
            self._unperturb()
        return StepResult(loss, norm, applied)

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.contract.Session.evaluate`."""
        return self._forward.evaluate(batch)

    def adapter(self) -> Parameters:
        """See `edgetune.runtimes.contract.Session.adapter`."""
        return self._parameters

    def state(self) -> SessionState:
        """See `edgetune.runtimes.contract.Session.state`."""
        return {
            **self._parameters,
            _AVERAGES: np.array([average.state for average in self._averages()], np.float64),
            _HIGHEST_RATE: np.array(self._highest_rate, np.float64),
            _STEPS: np.array(self._steps_done, np.int64),
        }

    def restore(self, state: SessionState) -> None:
        """See `edgetune.runtimes.contract.Session.restore`."""
        for name, array in self._parameters.items():
            array[...] = state[name]
            self._forward.set_parameter(name, array)
        for average, values in zip(self._averages(), state[_AVERAGES], strict=True):
            average.restore(values)
        self._highest_rate, self._steps_done = float(state[_HIGHEST_RATE]), int(state[_STEPS])
        self._scales = self._responses.scales()

    def _averages(self) -> list[_Average]:
        return [self._square, self._clipped_square, self._curvature, *self._responses.averages()]

    def placements(self) -> list[Placement]:
        """Where the forward graphs run that were compiled so far; none on a runtime without an accelerator."""
        return self._forward.placements() if isinstance(self._forward, Placed) else []

    def recall(self, batch: Batch) -> None:
        """See `edgetune.runtimes.contract.Recalling`."""
        if isinstance(self._forward, Recalling):
            self._forward.recall(batch)

    def notices(self) -> list[str]:
        """See `edgetune.runtimes.contract.Recalling`."""
        return self._forward.notices() if isinstance(self._forward, Recalling) else []

    def gradient(self, batches: Sequence[Batch]) -> Parameters:
        """The estimate of the next step's gradient, for every trained parameter; changes nothing."""
        slopes = self._slopes(self._query_losses(batches))
        self._unperturb()
        estimates = zip(self._combined(slopes / len(slopes)), self._scales, strict=True)
        return {name: total / np.float32(scale**2) for (name, total), scale in estimates}

    def _no_responses(self) -> _Responses:
        return _Responses([self._parameters[name].size for name in self._trained])

    def _probe(self, place: int, batches: Sequence[Batch], loss: float) -> bool:
        """Move one parameter alone; tells whether the loss answered with a number. Changes nothing in the model."""
        name, size = self._trained[place], _PROBE * self._config.perturbation_size
        moved = np.float32(size) * self._signs(self._config.queries, place)
        self._forward.set_parameter(name, self._parameters[name] + moved)
        slope = (self._loss(batches) - loss) / size
        self._forward.set_parameter(name, self._parameters[name])
        if not math.isfinite(slope):
            return False
        self._responses.add(place, slope)
        return True

    def _query_losses(self, batches: Sequence[Batch]) -> NDArray[np.float64]:
        """The loss of each query (queries). Leaves the model perturbed."""
        losses = []
        sizes = (self._config.perturbation_size * self._scales).astype(np.float32)
        for query in range(self._config.queries):
            for place, name in enumerate(self._trained):
                perturbed = sizes[place] * self._signs(query, place)
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
        self._highest_rate = max(self._highest_rate, learning_rate)
        share = _SHARED * learning_rate / self._highest_rate
        gains_most = share * math.sqrt(self._square.mean) / trace
        as_long_as_a_perturbation = self._config.perturbation_size / math.sqrt(len(slopes))
        rate = min(learning_rate, gains_most, as_long_as_a_perturbation)
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
        """Σ share · scale · direction over the queries, for each trained parameter."""
        for place, name in enumerate(self._trained):
            total = np.zeros(self._parameters[name].shape, np.float32)
            for query, share in enumerate(shares * self._scales[place]):
                total += np.float32(share) * self._signs(query, place)
            yield name, total

    def _signs(self, query: int, place: int) -> Floats:
        """The direction of a query of the next step."""
        shape = self._parameters[self._trained[place]].shape
        return signs(self._config.seed, self._steps_done + 1, query, place, math.prod(shape)).reshape(shape)

    def _loss(self, batches: Sequence[Batch]) -> float:
        """Mean over all trained tokens of the passes."""
        total = sum(batch.trained_tokens for batch in batches)
        return sum(batch.trained_tokens / total * self._forward.evaluate(batch) for batch in batches)
