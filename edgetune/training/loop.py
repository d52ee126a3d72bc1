"""The training loop: batches in, steps done, whatever runtime executes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from time import perf_counter

import numpy as np

from edgetune.data.batches import Batch
from edgetune.data.stored_examples import token_counts
from edgetune.errors import EdgetuneError
from edgetune.planning.schedule import learning_rate
from edgetune.planning.trainer import open_trainer
from edgetune.runtimes.contract import Placed, Recalling, Session, StepResult
from edgetune.text.pulse import Pulse
from edgetune.training.early_end import EarlyEnd, held_back
from edgetune.training.gradient_start import FIRST_STEPS, start_from_gradient
from edgetune.training.observer import Observer, StartInfo, StepMetrics
from edgetune.training.record import RunRecord, memory_bytes
from edgetune.training.rest import Rest
from edgetune.training.saved_run import RunIdentity, SavedState
from edgetune.training.saver import Saver
from edgetune.training.state import PlannedRun, RunState

REMEDY = "try a lower --learning-rate, more --warmup-steps, or --max-grad-norm 1"
"""Where a loss or gradient is not finite."""


def learn(
    run: PlannedRun,
    state: RunState,
    folder: Path,
    observer: Observer,
    *,
    identity: RunIdentity,
    saver: Saver,
    earlier: SavedState | None,
) -> None:
    """Do the steps of a run, and take what was learnt into its state. No session is left afterwards.

    Args:
        run: The plan.
        state: What changes on the way.
        folder: Where the record is written.
        observer: Is told what happens.
        identity: What the run is, for the states that are saved.
        saver: Saves them.
        earlier: Where the run goes on; none where it begins.

    Raises:
        EdgetuneError: Not even the first step was finite.
        InterruptedRunError: A signal came; the state is saved.
        PausedRunError: The run was asked to pause; the state is saved.
    """
    request, choice = run.request, run.fit.choice
    rest = Rest(run.config.pause_below_battery, run.config.pause_above_temperature, observer.on_notice)
    with open_trainer(run.bundle, state.first, choice, request.optimizer, request.queries) as session:
        if earlier is not None:
            session.restore(earlier.session)
            state.take_up(earlier.progress, earlier.best)
            _recall(run, session, state.steps)
        elif run.config.init == "gradient":
            first = islice(run.fit.workload.steps(), FIRST_STEPS)
            start_from_gradient(session, run.lora, [batch for batches in first for batch in batches])
        observer.on_start(_start_info(run, state, saver))
        _tell_notices(session, observer)
        # The session has its own.
        state.first.clear()
        before = b"" if earlier is None else earlier.record
        with held_back(observer.on_notice) as signals, RunRecord(folder, observer.on_notice, before) as record:
            end = EarlyEnd(signals, request.time_budget_seconds, run.config.pause_file)
            _Loop(run, state, session, observer, record, identity, saver).run(end, rest)
        if state.stopped and not state.steps:
            raise EdgetuneError(f"{state.stopped}; nothing was learnt, so nothing is written; {REMEDY}")
        state.learnt = state.best or session.adapter()


class _Loop:
    def __init__(
        self,
        run: PlannedRun,
        state: RunState,
        session: Session,
        observer: Observer,
        record: RunRecord,
        identity: RunIdentity,
        saver: Saver,
    ) -> None:
        self._run, self._state, self._session, self._observer = run, state, session, observer
        self._record, self._identity, self._saver = record, identity, saver
        self._workload, self._schedule = run.fit.workload, run.fit.workload.schedule
        self._spent, self._done_before = 0.0, state.steps
        """Seconds of the steps alone, and steps of earlier processes."""
        self._seconds_before, self._begin = state.seconds, perf_counter()

    def run(self, end: EarlyEnd, rest: Rest) -> None:
        """All steps that are left, or those before one that is not finite, or before an early end."""
        state, config, total = self._state, self._run.config, self._schedule.total_steps
        peak = self._run.learning_rate
        first_validation = self._validate() if not state.steps else None
        if not state.steps and end.is_interrupted:
            self._end_early(end)  # a budget, though, is for one step at least
        steps = self._workload.steps(state.steps)
        for step in range(state.steps, total):
            rate = learning_rate(config.schedule, peak, step, total, config.warmup_steps)
            metrics = self._step(steps, rate)
            if metrics is None:
                break
            self._tell_placements()
            _tell_notices(self._session, self._observer)
            self._observer.on_step(metrics)
            validation = self._validate() if self._schedule.validates_after(step + 1) else None
            self._record.write(
                metrics,
                validation_loss=validation,
                initial_validation_loss=first_validation if step == 0 else None,
            )
            if self._saver.is_due(state.steps):
                self._save()
            if self._lost_patience():
                break
            if state.steps < total:
                self._end_early(end)
                rest.take(before=self._save, look=lambda: self._end_early(end))
        state.seconds = self._elapsed()
        if state.steps and (state.stopped or config.keep_state):
            self._save(again=bool(state.stopped))

    def _end_early(self, end: EarlyEnd) -> None:
        steps = self._state.steps
        if (cause := end.cause()) is None:
            return
        kind, reason = cause
        saved = steps > 0 and self._save()
        if saved:
            how = "the same command and --resume go on from there"
        elif (last := self._saver.last_steps) is not None:
            how = f"its state is not saved, the same command and --resume go on from step {last}"
        else:
            how = "no state is saved, so the run starts over"
        raise kind(f"{reason} after step {steps} of {self._schedule.total_steps}; {how}")

    def _save(self, *, again: bool = False) -> bool:
        self._state.seconds = self._elapsed()
        return self._saver.save(self._saved_state, self._state.steps, again=again)

    def _saved_state(self) -> SavedState:
        state, total = self._state, self._schedule.total_steps
        session = self._session.state()
        return SavedState(self._identity, total, state.progress, session, self._record.lines(), state.best)

    def _elapsed(self) -> float:
        return self._seconds_before + perf_counter() - self._begin

    def _lost_patience(self) -> bool:
        patience = self._run.config.patience
        if patience is None or self._state.worse < patience:
            return False
        best = self._state.best_step
        self._observer.on_notice(
            f"the validation loss has not fallen since step {best}; the run ends after step {self._state.steps}"
        )
        return True

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
            eta_seconds=self._spent / (state.steps - self._done_before) * (total - state.steps),
            seconds=self._elapsed(),
            memory_bytes=memory_bytes(),
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
        if self._state.steps:
            self._compare(loss)
        self._observer.on_validation(self._state.steps, loss)
        return loss

    def _compare(self, loss: float) -> None:
        """Take note of the best step."""
        state, config = self._state, self._run.config
        if loss >= state.best_loss:
            state.worse += 1
            return
        state.best_step, state.best_loss, state.worse = state.steps, loss, 0
        if config.keep_best or config.patience is not None:
            state.best = {name: array.copy() for name, array in self._session.adapter().items()}

    def _tell_placements(self) -> None:
        """Say where each graph runs, once it is compiled."""
        if isinstance(self._session, Placed):
            placements = self._session.placements()
            for placement in placements[len(self._state.placements) :]:
                self._observer.on_notice(str(placement))
            self._state.placements = placements


def _recall(run: PlannedRun, session: Session, done: int) -> None:
    """Let a session keep what it kept when so many steps were done, even where its file was lost.

    A row's states are those of the batch in which it came first, and so they are again.
    """
    if not isinstance(session, Recalling):
        return
    workload = run.fit.workload
    first = FIRST_STEPS if run.config.init == "gradient" else 0
    once = min(done, workload.schedule.steps_per_epoch)
    for batches in chain(islice(workload.steps(), first), [workload.validation()], islice(workload.steps(), once)):
        for batch in batches:
            session.recall(batch)


def _tell_notices(session: Session, observer: Observer) -> None:
    for notice in session.notices() if isinstance(session, Recalling) else ():
        observer.on_notice(notice)


def _start_info(run: PlannedRun, state: RunState, saver: Saver) -> StartInfo:
    train, schedule = run.rows.train, run.fit.workload.schedule
    return StartInfo(
        **asdict(run.execution),
        batch_size=run.request.batching.batch_size,
        steps=schedule.total_steps,
        steps_per_epoch=schedule.steps_per_epoch,
        rows=len(train.examples),
        rows_left_out=train.too_long,
        rows_truncated=train.truncated,
        validation_rows=len(run.rows.valid),
        tokens_per_epoch=int(token_counts(train.examples).sum(dtype=np.int64)),
        trained_tokens_per_epoch=train.trained_tokens,
        trainable_parameters=sum(state.first[name].size for name in run.trained_names()),
        learning_rate=run.learning_rate,
        first_step=state.steps + 1,
        saved=saver.rhythm,
        shared_prefixes=run.fit.workload.shared_prefixes(),
        kept=run.fit.choice.plan.kept_text,
    )


def _stopped(step: int, result: StepResult) -> str:
    what = "loss" if not math.isfinite(result.loss) else "gradient"
    return f"the {what} of step {step} is not finite, so the step was not applied and training stopped"
