"""`edgetune plan`: what a training run will need on a device, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.config import TrainConfig
from edgetune.data.encode import Example
from edgetune.data.folder import training_files
from edgetune.devices.place import Place
from edgetune.errors import UsageError
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.machine.threads import usable_processors
from edgetune.planning.duration import predict_times
from edgetune.planning.fit import Fitting
from edgetune.planning.flash import Flash, flash_of, within_flash
from edgetune.planning.limits import longest_taken
from edgetune.planning.options import resolve
from edgetune.planning.rows import RowReader
from edgetune.planning.run import RunRequest
from edgetune.planning.workload import Workload
from edgetune.runtimes import install

_MOST_ROWS = 10_000
"""A step, where rows are made up to be counted."""


@dataclass(frozen=True)
class ShapeUse:
    """How many batches of an epoch have a shape."""

    sequences: int
    length: int
    batches: int


@dataclass(frozen=True)
class Preflight:
    """What a run will need."""

    device: str | None
    """Name of the profile; none where no device was named, which means this machine."""
    here: bool
    """Whether the device is this machine."""
    runtime: str
    plan: str
    threads: int | None
    """That compute on the CPU; none where the profile does not say how many cores the device has."""
    on_accelerator: bool
    emulated: bool
    """Whether this machine would simulate that hardware."""
    batch_size: int
    gradient_accumulation_steps: int
    pass_rows: int | None
    """For how many of the longest rows a pass through the model has room: a batch can take several. None where
    `buckets` say it."""
    longest_row: int
    buckets: list[str]
    """The only shapes that batches may have, as `--buckets` takes them; empty where any may come."""
    shapes: list[ShapeUse]
    """That batches have, the most frequent first. Of a long epoch, by its beginning."""
    steps: int
    peak_memory_bytes: int | None
    """Highest resident memory; none where it is not known."""
    least_memory_bytes: int | None
    """What the run takes more than on a device that was named, where its memory is not known."""
    memory_bytes: int | None
    """That the device has; none where it is not known."""
    flash: Flash
    flash_bytes: int
    """`flash`, all together."""
    step_seconds: float | None
    """Of a usual step, the median: of the first epoch, where later ones take less."""
    later_step_seconds: float | None
    """Of a usual step of later epochs, where what enters the lowest trained layer is kept; else none."""
    kept: str
    """What of the lowest layers' work is kept on disk for them, in a few words; empty where nothing is."""
    start_seconds: float | None
    """What first batches take more than others: weights are unpacked, graphs compiled."""
    run_seconds: float | None
    """All steps and validations, from the first on; the bundle has been opened and verified before."""
    time_from: str
    """Where the times come from, or why there are none."""
    notes: list[str]


def preflight(
    bundle: Path,
    data: Path | None,
    valid: Path | None,
    config: TrainConfig,
    place: Place,
    *,
    length: int | None = None,
) -> Preflight:
    """Predict a run.

    Args:
        bundle: What would be trained.
        data: JSONL rows, or a folder of them; without them all rows are taken to be as long as `length` says.
        valid: JSONL rows that would be measured on.
        config: How to train.
        place: Where; on this machine a few steps are timed, and what is free counts.
        length: Tokens of a row, at most the bundle's longest; when it is not given, the most that the device takes.

    Raises:
        UsageError: Options that cannot be meant, or not together.
        DataError: Rows that cannot be trained on.
        IncompatibleError: The device does not run what was asked for, or the bundle lacks it.
        MissingDependencyError: The runtime's package is not installed.
        ResourceError: Nothing fits; the message says what would.
    """
    resolved = resolve(config, place)
    request, notes = resolved.request, list(resolved.notes)
    opened = load_bundle(bundle)
    reader = RowReader(opened, request)
    if data is not None:
        data, valid = training_files(data, valid)
    if data is None:
        rows = _made_up(opened, request, length)
        notes.append(f"no --data: rows of {len(rows[0].input_ids):,} tokens, all of them trained, {len(rows)} an epoch")
    else:
        read = reader.read(data)
        rows = read.examples
        notes += read.notices
    measured: Sequence[Example] = []
    if valid is not None:
        read = reader.read(valid)
        measured = read.examples
        notes += read.notices
    fit = within_flash(opened, Fitting(opened, rows, measured, request).fit(), place)
    notes += fit.notes
    workload, choice = fit.workload, fit.choice
    flash = flash_of(opened, fit)
    if place.here:
        install(choice.runtime, notes.append)
    times = predict_times(opened, workload, choice, request)
    memory = place.memory_limit()
    if memory is None and not place.here:
        notes.append("the profile has no figure hardware.memory: that the run fits into the device is not said")
    elif choice.predicted_peak_bytes is None and place.profile is not None:
        notes.append("the memory of the whole step is not predicted: that the run fits into the device is not said")
    return Preflight(
        device=place.name,
        here=place.here,
        runtime=choice.name,
        plan=str(choice.plan),
        threads=request.threads or (usable_processors() if place.here else place.cores()),
        on_accelerator=choice.on_accelerator,
        emulated=place.here and choice.emulated,
        batch_size=request.batching.batch_size,
        gradient_accumulation_steps=request.batching.gradient_accumulation_steps,
        pass_rows=workload.pass_rows,
        longest_row=workload.longest(),
        buckets=[str(bucket) for bucket in workload.buckets or ()],
        shapes=_uses(workload),
        steps=workload.schedule.total_steps,
        peak_memory_bytes=choice.predicted_peak_bytes,
        least_memory_bytes=choice.least_bytes,
        memory_bytes=memory,
        flash=flash,
        flash_bytes=flash.total,
        step_seconds=times.step,
        later_step_seconds=times.later_step,
        kept=choice.plan.kept_text,
        start_seconds=times.start,
        run_seconds=times.run,
        time_from=times.source,
        notes=notes,
    )


def _made_up(bundle: Bundle, request: RunRequest, length: int | None) -> Sequence[Example]:
    """The rows of a step, all of one length and all of their tokens trained."""
    manifest, batching = bundle.manifest, request.batching
    tokens = length or longest_taken(request, manifest)
    if tokens > manifest.max_length:
        raise UsageError(
            f"--length is {tokens:,}, the bundle's rows have at most {manifest.max_length:,} tokens; give no more, "
            "or prepare it again with a larger --max-length"
        )
    count = batching.batch_size * batching.gradient_accumulation_steps
    if count > _MOST_ROWS:
        raise UsageError(
            f"--batch-size {batching.batch_size} and --gradient-accumulation-steps "
            f"{batching.gradient_accumulation_steps} are {count:,} rows a step, expected at most {_MOST_ROWS:,} "
            "without --data; give fewer, or the rows"
        )
    rows = []
    for line in range(1, count + 1):
        # No row is like another.
        ids = [(line + number) % manifest.architecture.vocab_size for number in range(tokens)]
        rows.append(Example(line, ids, ids))
    return rows


def _uses(workload: Workload) -> list[ShapeUse]:
    steps = workload.schedule.steps_per_epoch
    looked_at = workload.step_shapes[:steps]
    counts = Counter((shape.sequences, shape.length) for step in looked_at for shape in step)
    return [ShapeUse(*shape, round(count * steps / len(looked_at))) for shape, count in counts.most_common()]
