"""The training loop: batches in, steps done, whatever runtime executes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from edgetune.data.batches import Batch
from edgetune.errors import EdgetuneError
from edgetune.planning.schedule import learning_rate
from edgetune.planning.trainer import open_trainer
from edgetune.runtimes.contract import Placed, Session, StepResult
from edgetune.text.pulse import Pulse
from edgetune.training.observer import Observer, StartInfo, StepMetrics
from edgetune.training.record import RunRecord
from edgetune.training.state import PlannedRun, RunState

REMEDY = "try a lower --learning-rate, more --warmup-steps, or --max-grad-norm 1"
"""Where a loss or gradient is not finite."""


def learn(run: PlannedRun, state: RunState, folder: Path, observer: Observer) -> None:
    """Do the steps of a run, and take what was learnt into its state. No session is left afterwards.

    Args:
        run: The plan.
        state: What changes on the way.
        folder: Where the record is written.
        observer: Is told what happens.

    Raises:
        EdgetuneError: Not even the first step was finite.
    """
    request, choice = run.request, run.fit.choice
    with open_trainer(run.bundle, state.first, choice, request.optimizer, request.queries) as session:
        observer.on_start(_start_info(run, state))
        # The session has its own.
        state.first.clear()
        begin = perf_counter()
        with RunRecord(folder, observer.on_notice) as record:
            _Loop(run, state, session, observer).run(record)
        state.seconds = perf_counter() - begin
        if state.stopped and not state.steps:
            raise EdgetuneError(f"{state.stopped}; nothing was learnt, so nothing is written; {REMEDY}")
        state.learnt = session.adapter()


class _Loop:
    def __init__(self, run: PlannedRun, state: RunState, session: Session, observer: Observer) -> None:
        self._run, self._state, self._session, self._observer = run, state, session, observer
        self._workload, self._schedule = run.fit.workload, run.fit.workload.schedule
        self._spent = 0.0
        """Seconds of the steps alone."""

    def run(self, record: RunRecord) -> None:
        """All steps, or those before one that is not finite."""
        first_validation = self._validate()
        steps, config, total = self._workload.steps(), self._run.config, self._schedule.total_steps
        for step in range(total):
            rate = learning_rate(config.schedule, config.learning_rate, step, total, config.warmup_steps)
            metrics = self._step(steps, rate)
            if metrics is None:
                return
            self._tell_placements()
            self._observer.on_step(metrics)
            validation = self._validate() if self._schedule.validates_after(step + 1) else None
            record.write(
                metrics,
                validation_loss=validation,
                initial_validation_loss=first_validation if step == 0 else None,
            )

    def _step(self, steps: Iterator[list[Batch]], rate: float) -> StepMetrics | None:
        """The next step; none where it was not applied, and the state says why."""
        state, total = self._state, self._schedule.total_steps
        begin = perf_counter()
        batches = next(steps)
        result = self._session.step(batches, rate)
        seconds = perf_counter() - begin
        if not result.applied:
            state.stopped = _stopped(state.steps + 1, result)
            return None
        self._spent += seconds
        state.steps, state.final_loss = state.steps + 1, result.loss
        tokens = sum(batch.tokens for batch in batches)
        return StepMetrics(
            step=state.steps,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens=tokens,
            tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
            peak_memory_bytes=state.look_at_memory(),
            eta_seconds=self._spent / state.steps * (total - state.steps),
        )

    def _validate(self) -> float | None:
        """Mean loss over the trained tokens of all validation rows; none when there are no rows."""
        rows = self._run.rows.valid
        if not rows:
            return None
        loss_sum, tokens = 0.0, 0
        pulse = Pulse(self._observer.on_notice, f"measured {{}} of {len(rows):,} validation rows")
        for batch in self._workload.validation():
            loss_sum += self._session.evaluate(batch) * batch.trained_tokens
            tokens += batch.trained_tokens
            pulse.add(len(batch.examples))
        self._tell_placements()
        loss = loss_sum / tokens
        self._state.validation_losses.append(loss)
        self._observer.on_validation(self._state.steps, loss)
        return loss

    def _tell_placements(self) -> None:
        """Say where each graph runs, once it is compiled."""
        if isinstance(self._session, Placed):
            placements = self._session.placements()
            for placement in placements[len(self._state.placements) :]:
                self._observer.on_notice(str(placement))
            self._state.placements = placements


def _start_info(run: PlannedRun, state: RunState) -> StartInfo:
    train, schedule = run.rows.train, run.fit.workload.schedule
    return StartInfo(
        **asdict(run.execution),
        batch_size=run.request.batching.batch_size,
        steps=schedule.total_steps,
        steps_per_epoch=schedule.steps_per_epoch,
        rows=len(train.examples),
        rows_left_out=len(train.too_long),
        rows_truncated=len(train.truncated),
        validation_rows=len(run.rows.valid),
        tokens_per_epoch=sum(len(example.input_ids) for example in train.examples),
        trained_tokens_per_epoch=train.trained_tokens,
        trainable_parameters=sum(state.first[name].size for name in run.trained_names()),
    )


def _stopped(step: int, result: StepResult) -> str:
    what = "loss" if not math.isfinite(result.loss) else "gradient"
    return f"the {what} of step {step} is not finite, so the step was not applied and training stopped"
