"""`train`: plan the run, take its first state, let the loop do its steps, and seal what was learnt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path

from edgetune.config import TrainConfig, check_config
from edgetune.data.folder import training_files
from edgetune.devices.place import this_machine
from edgetune.errors import EdgetuneError, UsageError, VerificationError
from edgetune.formats.adapter import MANIFEST, most_bytes, write_adapter
from edgetune.formats.bundle import Bundle, as_bundle
from edgetune.formats.storage import atomic_folder
from edgetune.machine.disk import reserve
from edgetune.machine.memory import free_memory_bytes
from edgetune.machine.threads import computing_with
from edgetune.planning.fit import Fitting
from edgetune.planning.flash import within_flash
from edgetune.planning.options import Resolved, resolve
from edgetune.planning.rows import RowReader, RunRows, fingerprint
from edgetune.runtimes import install
from edgetune.runtimes.placement import placement_record
from edgetune.training.continuation import identity_of, require_same
from edgetune.training.loop import REMEDY, learn
from edgetune.training.observer import Observer, SilentObserver, TrainResult
from edgetune.training.output import save_elsewhere
from edgetune.training.provenance import provenance_of, validation_rows
from edgetune.training.saved_run import SavedRun, SavedState
from edgetune.training.saver import Saver
from edgetune.training.state import PlannedRun, RunState, first_state

_MOMENTS = 2
"""Of each parameter, which a state has beside it."""
_SAVED_AT_ONCE = 3
"""States on the disk while one is written: it, and the two newest."""


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
        data: JSONL rows to train on; `-` is standard input. Of a folder, its `train.jsonl`.
        output: The adapter folder to make.
        config: How to train.
        valid: JSONL rows to measure on, if any; without it, the `valid.jsonl` of a folder of rows.
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
    output, observer = Path(output), SilentObserver() if observer is None else observer
    given = None if valid is None else Path(valid)
    data, valid = training_files(Path(data), given)
    if valid is not None and given is None:
        observer.on_notice(f"{valid} is measured on, as --valid would name it")
    _require_rows_to_measure(config, valid)
    check_config(config)  # before the device's name is looked up
    resolved = resolve(config, this_machine(config.device))
    _tell(observer, resolved.notes)
    saved = SavedRun(output)
    # Who goes on replaces what the run left when it stopped at a step that was not finite, or was to keep its state.
    replace_output = config.force or (config.resume and saved.steps() is not None)
    run: PlannedRun | None = None
    state: RunState | None = None
    try:
        with computing_with(config.threads), atomic_folder(output, replace=replace_output, marker=MANIFEST) as folder:
            earlier = _earlier(saved, output, config, observer)
            resolved = _with_rate(_with_memory(resolved, earlier), earlier)
            run = _plan(bundle, data, valid, resolved, observer)
            state = first_state(run, observer.on_notice)
            install(run.fit.choice.runtime, observer.on_notice)
            total_steps = run.fit.workload.schedule.total_steps
            identity = identity_of(run, state, resolved.request.free_memory_bytes)
            if earlier is not None:
                require_same(earlier, identity, total_steps, observer.on_notice)
            reserve(folder, most_bytes(run.lora, total_steps), output)
            if earlier is None:
                saved.remove()  # now that nothing is refused any more
            moments = _MOMENTS * run.fit.choice.plan.moment_bytes
            size = int(sum(array.nbytes + moments * array.size for array in state.first.values()))
            saver = Saver(saved, config.save_steps, size, observer.on_notice)
            run = run.keeping(saved.folder, spare_bytes=_SAVED_AT_ONCE * size)
            try:
                learn(run, state, folder, observer, identity=identity, saver=saver, earlier=earlier)
            finally:
                saved.tidy()
            _seal(run, state, valid, output, folder)
            state.look_at_memory()
        if not (state.stopped or config.keep_state):
            saved.remove()
    except VerificationError:
        raise
    except (EdgetuneError, OSError) as error:
        if run is None or state is None or state.learnt is None:
            raise
        raise save_elsewhere(output, error, partial(_seal, run, state, valid, output)) from error
    if state.stopped:
        after = f"{output} holds the adapter after step {state.steps}"
        on = "" if saved.steps() is None else "; with --resume the run goes on from there"
        raise EdgetuneError(f"{state.stopped}; {after}; {REMEDY}{on}")
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
        best_step=state.best_step if state.best else None,
        placement=[placement_record(placement) for placement in state.placements],
    )


def _earlier(saved: SavedRun, output: Path, config: TrainConfig, observer: Observer) -> SavedState | None:
    """Where the run goes on; none where it begins.

    Raises:
        UsageError: There is an unfinished run, and nobody said what is to become of it.
        VerificationError: No state of it can be read.
    """
    if config.force and not config.resume:
        return None
    steps = saved.steps()
    if config.resume:
        return saved.load(observer.on_notice)
    if steps is not None:
        raise UsageError(
            f"{output}: an unfinished run has its state of step {steps} in {saved.folder}; add --resume to go on with "
            "it, or --force to start over"
        )
    return None


def _with_memory(resolved: Resolved, earlier: SavedState | None) -> Resolved:
    """With the memory to plan with: what is free, or what was when the run began, so that its plan is the same."""
    if not resolved.request.place.here:
        return resolved
    free = free_memory_bytes() if earlier is None else earlier.identity.free_memory_bytes
    return replace(resolved, request=replace(resolved.request, free_memory_bytes=free))


def _with_rate(resolved: Resolved, earlier: SavedState | None) -> Resolved:
    """With the learning rate that the run began with, where a run that goes on is left to choose."""
    if earlier is None or resolved.config.learning_rate != "auto":
        return resolved
    began = earlier.identity.options["learning_rate"]
    return replace(resolved, config=replace(resolved.config, learning_rate=began))


def _require_rows_to_measure(config: TrainConfig, valid: Path | None) -> None:
    """Refuse what only validation rows give a meaning."""
    if valid is not None:
        return
    given = {"--eval-steps": config.eval_steps, "--patience": config.patience, "--keep-best": config.keep_best or None}
    names = [name for name, value in given.items() if value is not None]
    if names:
        means = "mean" if len(names) > 1 else "means"
        raise UsageError(f"{' and '.join(names)} {means} nothing without --valid; give rows to measure as well")


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
    fit = within_flash(opened, fit, request.place)
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
