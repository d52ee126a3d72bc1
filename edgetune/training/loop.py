"""The training loop: rows in, adapter out, whatever runtime executes the steps."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from edgetune.config import TrainConfig
from edgetune.devices.profile import Profile, load_profile
from edgetune.errors import EdgetuneError, IncompatibleError, VerificationError
from edgetune.formats.adapter import MANIFEST, most_bytes, read_adapter, write_adapter
from edgetune.formats.bundle import Bundle, as_bundle
from edgetune.formats.storage import atomic_folder
from edgetune.machine.disk import reserve
from edgetune.machine.threads import computing_with
from edgetune.model.lora import Parameters, initial_parameters
from edgetune.planning.fit import Fitting
from edgetune.planning.options import resolve_config
from edgetune.planning.rows import RowReader, read_run_rows
from edgetune.planning.schedule import learning_rate
from edgetune.planning.session import open_trainer
from edgetune.runtimes import install
from edgetune.runtimes.contract import Placed, Session, StepResult
from edgetune.runtimes.placement import Placement, placement_record
from edgetune.text.pulse import Pulse
from edgetune.training.observer import Observer, SilentObserver, StartInfo, StepMetrics, TrainResult
from edgetune.training.output import save_elsewhere
from edgetune.training.provenance import Outcome, provenance_of, validation_rows
from edgetune.training.record import RunRecord, peak_memory_bytes


def train(
    bundle: Bundle | str | PathLike[str],
    data: str | PathLike[str],
    output: str | PathLike[str],
    config: TrainConfig = TrainConfig(),
    *,
    valid: str | PathLike[str] | None = None,
    observer: Observer | None = None,
) -> TrainResult:
    """Train an adapter. All that can be refused is refused before the model is loaded.

    The folder `output` appears when the run is over. A step whose loss or gradient is not finite is not applied and
    ends the run: then the adapter of the step before is written, its provenance says `stopped`, and EdgetuneError is
    raised. If there is no step before, nothing is written.

    Room for all that is written is taken before the first step. Where `output` still cannot be written, the adapter is
    saved elsewhere, and the error says where.

    Args:
        bundle: What `prepare` made: its path, or what `load_bundle` gave.
        data: JSONL rows to train on; `-` is standard input.
        output: The adapter folder to make.
        config: How to train.
        valid: JSONL rows to measure on, if any.
        observer: Is told what happens; without one nobody is.

    Returns:
        Where the adapter is, what the run measured, and what executed it.

    Raises:
        UsageError: Options that cannot be meant, a path that is not there, an output that is.
        DataError: Rows that cannot be trained on.
        IncompatibleError: The initial adapter does not fit the bundle, or the bundle lacks what the plan runs.
        MissingDependencyError: The runtime's package is not installed.
        ResourceError: No plan fits into the memory budget, or the disk has no room for the adapter.
        VerificationError: A file of the bundle or the initial adapter was changed.
        LockedError: Another process writes `output`.
        EdgetuneError: A loss or gradient was not finite.
    """
    data, output = Path(data), Path(output)
    valid = None if valid is None else Path(valid)
    observer = SilentObserver() if observer is None else observer
    profile = None if config.device is None else load_profile(config.device)
    config = resolve_config(config, profile, observer.on_notice)
    run: _Run | None = None
    try:
        with computing_with(config.threads), atomic_folder(output, replace=config.force, marker=MANIFEST) as partial:
            run = _Run(as_bundle(bundle), data, valid, output, config, profile, observer)
            steps = run.execute(partial)
    except VerificationError:
        raise
    except (EdgetuneError, OSError) as error:
        if run is None or run.learnt is None:
            raise
        raise save_elsewhere(output, error, run.write) from error
    if run.stopped:
        raise EdgetuneError(f"{run.stopped}; {output} holds the adapter after step {steps}; {_REMEDY}")
    losses = run.validation_losses
    return TrainResult(
        path=output,
        steps=steps,
        final_loss=run.final_loss,
        first_validation_loss=losses[0] if losses else None,
        last_validation_loss=losses[-1] if losses else None,
        seconds=run.seconds,
        runtime=run.choice.name,
        plan=str(run.choice.plan),
        pass_rows=run.pass_rows,
        predicted_peak_memory_bytes=run.choice.predicted_peak_bytes,
        peak_memory_bytes=run.peak,
        placement=[placement_record(placement) for placement in run.placements],
    )


_REMEDY = "try a lower --learning-rate, more --warmup-steps, or --max-grad-norm 1"


class _Run:
    """One run: everything that can be refused is refused here, before a session is opened."""

    def __init__(
        self,
        bundle: Bundle,
        data: Path,
        valid: Path | None,
        output: Path,
        config: TrainConfig,
        profile: Profile | None,
        observer: Observer,
    ) -> None:
        self._bundle, self._config, self._observer = bundle, config, observer
        self._output, self._valid_path = output, valid
        manifest = bundle.manifest
        rows = read_run_rows(RowReader(bundle, config, profile, observer.on_notice), data, valid)
        self._rows, self._valid, self._valid_sha256 = rows.train, rows.valid, rows.valid_sha256
        fit = Fitting(bundle, self._rows.examples, self._valid, profile, here=True).fit(config, observer.on_notice)
        self._workload, self.choice = fit.workload, fit.choice
        self._schedule, self.pass_rows = self._workload.schedule, self._workload.pass_rows
        self.placements: list[Placement] = []
        self._lora = manifest.lora.from_layer(self.choice.plan.trunk_layers)
        """The slots that are trained."""
        self._parameters = self._first_parameters()
        install(self.choice.runtime, observer.on_notice)
        self.validation_losses: list[float] = []
        self.final_loss = math.nan
        self.seconds = 0.0
        self.peak: int | None = None
        """Highest resident memory; it is told while the worker of a session lives, whose memory counts as well."""
        self.stopped = ""
        """Why the run ended early; empty when it did not."""
        self.learnt: Parameters | None = None
        """The last values, once there are any to write."""
        self._steps = 0
        """Steps that were applied."""

    def execute(self, folder: Path) -> int:
        """Train, and write the adapter into `folder`; returns the number of steps that were applied.

        Raises:
            NoRoomError: There is no room for the adapter.
            EdgetuneError: Not even the first step was finite.
        """
        reserve(folder, most_bytes(self._lora, self._schedule.total_steps), self._output)
        self._steps, self.learnt = self._learn(folder)
        self.write(folder)
        self._notice_peak()
        return self._steps

    def write(self, folder: Path) -> None:
        """Write what was learnt as an adapter."""
        if self.learnt is None:
            raise ValueError("nothing was learnt yet")
        manifest = self._bundle.manifest
        write_adapter(
            folder,
            base=manifest.base,
            tokenizer=manifest.tokenizer,
            lora=self._lora,
            parameters=self.learnt,
            provenance=self._provenance(self._steps),
            encoding=self._rows.encoding,
        )

    def _learn(self, folder: Path) -> tuple[int, Parameters]:
        """Train; returns the number of steps and what was learnt. No session is left when the adapter is written."""
        with open_trainer(self._bundle, self._parameters, self._config, self.choice) as session:
            self._observer.on_start(self._start_info())
            # The session has its own.
            self._parameters.clear()
            begin = perf_counter()
            with RunRecord(folder, self._observer.on_notice) as record:
                steps = self._train(session, record)
            self.seconds = perf_counter() - begin
            if self.stopped and not steps:
                raise EdgetuneError(f"{self.stopped}; nothing was learnt, so nothing is written; {_REMEDY}")
            return steps, session.adapter()

    def _train(self, session: Session, record: RunRecord) -> int:
        schedule, config = self._schedule, self._config
        first_validation = self._validate(session, 0)
        spent = 0.0
        steps = self._workload.steps()
        for step in range(schedule.total_steps):
            rate = learning_rate(config.schedule, config.learning_rate, step, schedule.total_steps, config.warmup_steps)
            begin = perf_counter()
            batches = next(steps)
            result = session.step(batches, rate)
            seconds = perf_counter() - begin
            if not result.applied:
                self.stopped = _stopped(step + 1, result)
                return step
            spent += seconds
            self.final_loss = result.loss
            tokens = sum(batch.tokens for batch in batches)
            metrics = StepMetrics(
                step=step + 1,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=tokens,
                tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
                peak_memory_bytes=self._notice_peak(),
                eta_seconds=spent / (step + 1) * (schedule.total_steps - step - 1),
            )
            self._notice_placements(session)
            self._observer.on_step(metrics)
            validation = self._validate(session, step + 1) if schedule.validates_after(step + 1) else None
            record.write(
                metrics,
                validation_loss=validation,
                initial_validation_loss=first_validation if step == 0 else None,
            )
        return schedule.total_steps

    def _validate(self, session: Session, step: int) -> float | None:
        """Mean loss over the trained tokens of all validation rows; none when there are no rows."""
        if not self._valid:
            return None
        total, tokens = 0.0, 0
        pulse = Pulse(self._observer.on_notice, f"measured {{}} of {len(self._valid):,} validation rows")
        for batch in self._workload.validation():
            total += session.evaluate(batch) * batch.trained_tokens
            tokens += batch.trained_tokens
            pulse.add(len(batch.examples))
        self._notice_placements(session)
        loss = total / tokens
        self.validation_losses.append(loss)
        self._observer.on_validation(step, loss)
        return loss

    def _notice_peak(self) -> int | None:
        found = [peak for peak in (self.peak, peak_memory_bytes()) if peak is not None]
        self.peak = max(found, default=None)
        return self.peak

    def _notice_placements(self, session: Session) -> None:
        """Say where each graph runs, once it is compiled."""
        if isinstance(session, Placed):
            placements = session.placements()
            for placement in placements[len(self.placements) :]:
                self._observer.on_notice(str(placement))
            self.placements = placements

    def _first_parameters(self) -> dict[str, NDArray[np.float32]]:
        manifest, start = self._bundle.manifest, self._config.init_adapter
        if start is None:
            parameters = initial_parameters(manifest.lora, self._config.seed)
        else:
            parameters = read_adapter(start, manifest.lora, manifest.base, manifest.tokenizer)
        trained = self._lora.shapes()
        lost = [slot for slot in manifest.lora.slots if slot.b not in trained and parameters[slot.b].any()]
        if lost:
            raise IncompatibleError(
                f"{start} changes {len(lost)} projections of the trunk, such as {lost[0].name}, and a trunk has no "
                "adapters; start from an adapter of the layers above, or train without --plan split"
            )
        return {name: parameters[name] for name in trained}

    def _start_info(self) -> StartInfo:
        return StartInfo(
            runtime=self.choice.name,
            plan=str(self.choice.plan),
            batch_size=self._config.batch_size,
            pass_rows=self.pass_rows,
            predicted_peak_memory_bytes=self.choice.predicted_peak_bytes,
            steps=self._schedule.total_steps,
            steps_per_epoch=self._schedule.steps_per_epoch,
            rows=len(self._rows.examples),
            rows_left_out=len(self._rows.too_long),
            rows_truncated=len(self._rows.truncated),
            validation_rows=len(self._valid),
            tokens_per_epoch=sum(len(example.input_ids) for example in self._rows.examples),
            trained_tokens_per_epoch=self._rows.trained_tokens,
            trainable_parameters=sum(self._parameters[name].size for name in self._trained()),
        )

    def _trained(self) -> list[str]:
        """The parameters that steps change."""
        if self.choice.plan.forward_only:
            return [slot.b for slot in self._lora.slots]
        return list(self._parameters)

    def _provenance(self, steps: int) -> dict[str, str]:
        losses = self.validation_losses
        outcome = Outcome(
            rows=len(self._rows.examples),
            steps=steps,
            final_loss=self.final_loss,
            validation_loss=losses[-1] if losses else None,
            placements=self.placements,
            stopped=self.stopped,
        )
        sha256 = self._bundle.manifest.manifest_sha256
        provenance = provenance_of(sha256, self._config, self.choice, self.pass_rows, outcome)
        if self._valid_path is not None and self._valid_sha256:
            provenance |= validation_rows(self._valid_path, self._valid_sha256, self._output)
        return provenance


def _stopped(step: int, result: StepResult) -> str:
    what = "loss" if not math.isfinite(result.loss) else "gradient"
    return f"the {what} of step {step} is not finite, so the step was not applied and training stopped"
