"""What a run tells whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Execution:
    """How a run is executed, as planning chose."""

    runtime: str
    """What executes the steps."""
    plan: str
    """How it executes them, in a few words."""
    pass_rows: int | None
    """See `Workload.pass_rows`."""
    predicted_peak_memory_bytes: int | None
    """Highest resident memory that is expected; none where it is not known."""


@dataclass(frozen=True)
class StartInfo(Execution):
    """What is known once everything is checked and the model is loaded."""

    batch_size: int
    """Rows of a batch."""
    steps: int
    """Optimizer steps of the run."""
    steps_per_epoch: int
    rows: int
    """Rows that are trained on."""
    rows_left_out: int
    """Rows longer than the bundle's maximum."""
    rows_truncated: int
    """Rows that were cut to the bundle's maximum, because that was asked for."""
    validation_rows: int
    """0 without validation data."""
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    """Those of them that count for the loss."""
    trainable_parameters: int
    learning_rate: float
    """The highest."""
    first_step: int = 1
    """Not 1 where the run goes on after an interruption."""
    saved: str = "never"
    """How often the run's state is saved, in a few words: what is lost at most."""
    shared_prefixes: float = 0.0
    """Which part of the tokens is not computed again, being the prefix of another row as well."""
    kept: str = ""
    """What of the lowest layers' work is kept on disk for later epochs, in a few words; empty where nothing is."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; the keys of a line of `metrics.jsonl`, but for `eta_seconds`."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the step's trained tokens, before the update."""
    learning_rate: float
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    tokens: int
    """Tokens of the step that are not padding."""
    tokens_per_second: float
    peak_memory_bytes: int | None
    """Highest resident memory so far of this process and a runtime's own; none where the system does not tell."""
    eta_seconds: float
    """Expected time to the end, without validation."""
    seconds: float = 0.0
    """Wall time of the run's steps and validations so far."""
    memory_bytes: int | None = None
    """Resident memory after the step, of this process and a runtime's own; none where the system does not tell."""


@dataclass(frozen=True)
class TrainResult(Execution):
    """What a run came to."""

    path: Path
    """The adapter folder."""
    steps: int
    """That were done; of a run that went on, all of them."""
    final_loss: float
    """Loss of the last step."""
    first_validation_loss: float | None
    """Before the first step; none without validation data."""
    last_validation_loss: float | None
    """After the last step."""
    seconds: float
    """Wall time of the steps and validations."""
    peak_memory_bytes: int | None
    """Highest resident memory; none where the system does not tell."""
    best_step: int | None = None
    """The step that the adapter is of, where it is the one with the lowest validation loss; else it is the last."""
    placement: list[dict[str, Any]] = field(default_factory=list)
    """Of each compiled graph on an accelerator: its shape, what runs where, and what fell back to the CPU."""


class Observer(Protocol):
    """Is told how a run goes on. Subclasses override what they want to hear; the rest says nothing.

    What a method raises ends the run: the exception comes out of `train`, and no adapter is written.
    """

    # `return` tells type checkers that a method has a body, and need not be overridden.

    def on_start(self, info: StartInfo) -> None:
        """Called once, when everything is checked and the model is loaded."""
        return

    def on_step(self, metrics: StepMetrics) -> None:
        """Called after each optimizer step."""
        return

    def on_validation(self, step: int, loss: float) -> None:
        """Called when the validation loss was measured, after so many steps; in nats a trained token."""
        return

    def on_notice(self, text: str) -> None:
        """Called with one line of text that a person should know."""
        return


class SilentObserver(Observer):
    """Hears nothing."""
