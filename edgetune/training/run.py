"""`train`: plan the run, take its first state, let the loop do its steps, and seal what was learnt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from os import PathLike
from pathlib import Path

from edgetune.config import TrainConfig, check_config
from edgetune.devices.place import this_machine
from edgetune.errors import EdgetuneError, VerificationError
from edgetune.formats.adapter import MANIFEST, most_bytes, write_adapter
from edgetune.formats.bundle import Bundle, as_bundle
from edgetune.formats.storage import atomic_folder
from edgetune.machine.disk import reserve
from edgetune.machine.threads import computing_with
from edgetune.planning.fit import Fitting
from edgetune.planning.flash import flash_of, require_flash
from edgetune.planning.options import Resolved, resolve
from edgetune.planning.rows import RowReader, RunRows, fingerprint
from edgetune.runtimes import install
from edgetune.runtimes.placement import placement_record
from edgetune.training.loop import REMEDY, learn
from edgetune.training.observer import Observer, SilentObserver, TrainResult
from edgetune.training.output import save_elsewhere
from edgetune.training.provenance import provenance_of, validation_rows
from edgetune.training.state import PlannedRun, RunState, first_state


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
        ResourceError: No plan fits into the memory budget, the run takes more than the device has, or the disk has no
            room for the adapter.
        VerificationError: A file of the bundle or the initial adapter was changed.
        LockedError: Another process writes `output`.
        EdgetuneError: A loss or gradient was not finite.
    """
    data, output = Path(data), Path(output)
    valid = None if valid is None else Path(valid)
    observer = SilentObserver() if observer is None else observer
    check_config(config)  # before the device's name is looked up
    resolved = resolve(config, this_machine(config.device))
    _tell(observer, resolved.notes)
    run: PlannedRun | None = None
    state: RunState | None = None
    try:
        with computing_with(config.threads), atomic_folder(output, replace=config.force, marker=MANIFEST) as folder:
            run = _plan(bundle, data, valid, resolved, observer)
            state = first_state(run)
            install(run.fit.choice.runtime, observer.on_notice)
            reserve(folder, most_bytes(run.lora, run.fit.workload.schedule.total_steps), output)
            learn(run, state, folder, observer)
            _seal(run, state, valid, output, folder)
            state.look_at_memory()
    except VerificationError:
        raise
    except (EdgetuneError, OSError) as error:
        if run is None or state is None or state.learnt is None:
            raise
        raise save_elsewhere(output, error, partial(_seal, run, state, valid, output)) from error
    if state.stopped:
        raise EdgetuneError(f"{state.stopped}; {output} holds the adapter after step {state.steps}; {REMEDY}")
    losses = state.validation_losses
    return TrainResult(
        **asdict(run.execution),
        path=output,
        steps=state.steps,
        final_loss=state.final_loss,
        first_validation_loss=losses[0] if losses else None,
        last_validation_loss=losses[-1] if losses else None,
        seconds=state.seconds,
        peak_memory_bytes=state.peak_memory_bytes,
        placement=[placement_record(placement) for placement in state.placements],
    )


def _plan(
    bundle: Bundle | str | PathLike[str], data: Path, valid: Path | None, resolved: Resolved, observer: Observer
) -> PlannedRun:
    """Read the rows, and choose how the run is executed."""
    request, opened = resolved.request, as_bundle(bundle)
    reader = RowReader(opened, request)
    train = reader.read(data)
    _tell(observer, train.notices)
    measured = None if valid is None else reader.read(valid)
    _tell(observer, () if measured is None else measured.notices)
    rows = RunRows(train, [] if measured is None else measured.examples, fingerprint(valid))
    fit = Fitting(opened, rows.train.examples, rows.valid, request).fit()
    _tell(observer, fit.notes)
    require_flash(flash_of(opened, fit), opened, request.place)
    return PlannedRun(opened, resolved.config, request, rows, fit)


def _seal(run: PlannedRun, state: RunState, valid: Path | None, output: Path, folder: Path) -> None:
    """Write what was learnt as an adapter into a folder; `output` is where it was to go from the start."""
    if state.learnt is None:
        raise ValueError("nothing was learnt yet")
    provenance = provenance_of(run, state)
    if valid is not None and run.rows.valid_sha256:
        provenance |= validation_rows(valid, run.rows.valid_sha256, output)
    write_adapter(
        folder,
        base=run.bundle.manifest.base,
        tokenizer=run.bundle.manifest.tokenizer,
        lora=run.bundle.manifest.lora,
        parameters=state.learnt,
        provenance=provenance,
        encoding=run.rows.train.encoding,
    )


def _tell(observer: Observer, notes: Iterable[str]) -> None:
    for note in notes:
        observer.on_notice(note)
