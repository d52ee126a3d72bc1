"""A runtime in numpy for the bigram model of `tiny_bundle`: plain gradient descent, everything written down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from edgetune.data.batches import Batch
from edgetune.formats.bundle import Bundle
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import Abilities, OptimizerConfig, Runtime, SessionState, StepResult
from edgetune.runtimes.execution import ExecutionPlan
from support.tiny_bundle import BASE_LOGITS, LORA, SLOT, VOCABULARY

SCALING = LORA.scaling_of(SLOT.module)


def loss_and_gradient(batch: Batch, parameters: Parameters) -> tuple[float, np.ndarray]:
    """Summed loss and d(summed loss)/d(logit table)."""
    table = (BASE_LOGITS + SCALING * (parameters[SLOT.b] @ parameters[SLOT.a]).T).astype(np.float64)
    log_p = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    trained = batch.labels != -100
    seen, target = batch.input_ids[trained], batch.labels[trained]
    gradient = np.zeros_like(table)
    np.add.at(gradient, seen, np.exp(log_p[seen]))
    np.add.at(gradient, (seen, target), -1.0)
    return float(-log_p[seen, target].sum()), gradient


class BigramSession:
    """Follows `edgetune.runtimes.contract.Session`."""

    opened: BigramSession
    """The session of the last run."""
    break_at = 0
    """The step, from 1, whose loss is not finite; 0 for none."""
    interrupt_at = 0
    """The step at which somebody presses Ctrl-C; 0 for none."""

    def __init__(self, parameters: Parameters, optimizer: OptimizerConfig) -> None:
        self.parameters = {name: value.copy() for name, value in parameters.items()}
        self.first = {name: value.copy() for name, value in parameters.items()}
        self.optimizer = optimizer
        self.passes: list[int] = []
        self.rows: list[tuple[int, ...]] = []
        self.rates: list[float] = []

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        number = len(self.rates) + 1
        if number == self.interrupt_at:
            raise KeyboardInterrupt
        if number == self.break_at:
            return StepResult(float("nan"), float("inf"), applied=False)
        sums = [loss_and_gradient(batch, self.parameters) for batch in batches]
        tokens = sum(batch.trained_tokens for batch in batches)
        gradient = np.sum([gradient for _, gradient in sums], axis=0) / tokens
        a, b = self.parameters[SLOT.a], self.parameters[SLOT.b]
        grad_a, grad_b = SCALING * (gradient @ b).T, SCALING * (gradient.T @ a.T)
        a -= learning_rate * grad_a
        b -= learning_rate * grad_b
        self.passes.append(len(batches))
        self.rates.append(learning_rate)
        self.rows += [tuple(row.tolist()) for batch in batches for row in batch.input_ids]
        norm = float(np.sqrt((grad_a**2).sum() + (grad_b**2).sum()))
        return StepResult(sum(loss for loss, _ in sums) / tokens, norm, applied=True)

    def evaluate(self, batch: Batch) -> float:
        return loss_and_gradient(batch, self.parameters)[0] / batch.trained_tokens

    def set_parameter(self, name: str, values: np.ndarray) -> None:
        self.parameters[name] = values.copy()

    def adapter(self) -> Parameters:
        return {name: value.copy() for name, value in self.parameters.items()}

    def state(self) -> SessionState:
        return self.parameters

    def restore(self, state: SessionState) -> None:
        self.parameters = {name: state[name].copy() for name in self.parameters}


def abilities() -> Abilities:
    return Abilities(whole=True, exact=None, int8=None, preferred=True)


def version() -> str:
    return "bigram 1"


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan
) -> Iterator[BigramSession]:
    """Follows `edgetune.runtimes.contract.Runtime`."""
    assert bundle.manifest.architecture.vocab_size == VOCABULARY
    BigramSession.opened = BigramSession(parameters, optimizer)
    yield BigramSession.opened


@contextmanager
def open_forward(bundle: Bundle, parameters: Parameters, plan: ExecutionPlan) -> Iterator[BigramSession]:
    """Follows `edgetune.runtimes.contract.Runtime`."""
    with open_session(bundle, parameters, OptimizerConfig(0.0, 0.0), plan) as session:
        yield session


RUNTIME = Runtime(abilities, version, open_session, open_forward)
