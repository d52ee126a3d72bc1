"""How long a run takes: a few steps that were timed, or a device's figures, and the work of all its steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import mean, median
from time import perf_counter

from edgetune.data.batcher import BatchShape
from edgetune.data.batches import Batch
from edgetune.devices.place import Place
from edgetune.errors import UsageError
from edgetune.formats.bundle import Bundle
from edgetune.machine.threads import computing_with
from edgetune.planning.choice import Choice
from edgetune.planning.cost import CostModel
from edgetune.planning.run import RunRequest
from edgetune.planning.timing import Timing, time_steps
from edgetune.planning.workload import Workload
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.forward_only import passes_a_step

_OPERATIONS = 2
"""Floating-point operations of a product: a multiplication and an addition."""
_TYPICAL_STEPS = 16
"""Steps whose batches may be measured."""
_FORWARD = 1 / 2.5
"""Share of a pass that is forward only, as validation is."""


@dataclass(frozen=True)
class Times:
    """Seconds; none where nothing tells."""

    step: float | None
    """Of a usual step, the median: of the first epoch, where later ones take less."""
    start: float | None
    """What first batches take more than others."""
    run: float | None
    """All steps and validations."""
    source: str
    """Where they come from, or why there are none."""
    later_step: float | None = None
    """Of a usual step of later epochs, where what enters the lowest trained layer is kept; else none."""


def predict_times(bundle: Bundle, workload: Workload, choice: Choice, request: RunRequest) -> Times:
    """Predict how long steps and the run take.

    Args:
        bundle: What would be trained.
        workload: The run.
        choice: Its runtime and plan.
        request: What the run asks for; on this machine a few steps are timed.

    Raises:
        UsageError: The device does not have so many cores.
    """
    place, profile = request.place, request.place.profile
    if place.here and choice.emulated:
        return Times(None, None, None, f"unknown: {choice.name} simulates hardware, at a speed that says nothing of it")
    steps, validation = workload.step_shapes, workload.validation_shapes
    model = CostModel(bundle.manifest, choice.plan, choice.footprint)

    if place.here or profile is None:
        batches, layout = _typical(workload, model)
        with computing_with(request.threads):
            measured = time_steps(bundle, choice, batches)
        source = f"measured here in {measured.took:.1f} s"
    elif choice.on_accelerator:
        return Times(None, None, None, f"unknown: no figure says how fast the accelerator of {profile.name} is")
    elif (products := profile.hardware.products) is not None:
        share, some = _share(place, request.threads)
        measured, layout = Timing(((1.0, _OPERATIONS / (share * products.value)),)), 0.0
        source = f"an estimate: {some}{products.value / 1e9:g} GFLOP/s ({products.source})"
    else:
        return Times(None, None, None, f"unknown: the profile {profile.name} has no figure hardware.products")
    starts = _starts(measured, choice, steps)
    saved = _saved(choice)

    def seconds(shape: BatchShape, *, again: bool) -> float:
        """Of a pass, for the first time or whenever its rows come again."""
        whole, upper = (
            measured.seconds(model.work(shape.positions, shape.scores, shape.trained_tokens, upper_alone=alone))
            for alone in (False, True)
        )
        return whole - saved * (whole - upper) if again else whole

    # All matrices but one that the first step moves alone, and others do not.
    probes = len(choice.plan.trained_slots(bundle.manifest.lora).slots) - 1
    passes = 1 if request.queries is None else passes_a_step(request.queries.queries)
    if choice.plan.forward_only:
        starts[0] += probes * sum(seconds(shape, again=True) for shape in steps[0])

    def of_step(step: Sequence[BatchShape], *, again: bool) -> float:
        further = (passes - 1) * sum(seconds(shape, again=True) for shape in step)
        return further + sum(seconds(shape, again=again) + layout for shape in step)

    first, later = (
        [start + of_step(step, again=again) for start, step in zip(starts, steps, strict=True)]
        for again in (False, True)
    )
    share = 1.0 if choice.plan.forward_only else _FORWARD
    once, again = (share * sum(seconds(shape, again=again) for shape in validation) for again in (False, True))
    looked_at, total, epoch = len(first), workload.schedule.total_steps, workload.schedule.steps_per_epoch
    new = min(total, epoch)
    run = sum(first[:new]) + sum(later[new:])
    # What comes later is like the second half of what was looked at: most shapes have occurred by then.
    half = looked_at // 2
    run += max(0, new - looked_at) * mean(first[half:]) + (total - max(new, looked_at)) * mean(later[half:])
    if validations := workload.validations():
        run += once + (validations - 1) * again
    return Times(median(first), sum(starts), run, source, median(later) if saved and total > epoch else None)


def _saved(choice: Choice) -> float:
    """Which share of the work of the layers below the trained ones is saved where rows come again."""
    states = choice.plan.states if isinstance(choice.plan, LayeredPlan) else None
    if states is None:
        return 0.0
    # Where graphs are compiled for shapes, a row that is not kept lets them run for its whole batch.
    return states.share if states.share == 1 or not choice.compiles else 0.0


def _share(place: Place, threads: int | None) -> tuple[float, str]:
    """Which part of a device's speed so many threads have, and how that is said; all of it without a number.

    Raises:
        UsageError: The device does not have so many cores.
    """
    cores = place.cores()
    if threads is None or cores is None:
        return 1.0, ""
    if not 1 <= threads <= cores:
        raise UsageError(f"--threads is {threads}, and {place.name} has {cores} cores; give 1 to {cores}")
    return threads / cores, f"{threads} of {cores} cores, all of which have "


def _starts(measured: Timing, choice: Choice, steps: Sequence[Sequence[BatchShape]]) -> list[float]:
    """What each step takes more because a graph was not compiled for its shape, or not any more."""
    most = 1 if choice.footprint is None else choice.footprint.shapes_held
    held: deque[tuple[int, int]] = deque(maxlen=most)
    seconds: list[float] = []
    for step in steps:
        compiling = 0.0
        for shape in step:
            if (key := (shape.sequences, shape.length)) not in held:
                held.append(key)
                compiling += measured.kept_seconds if key in measured.shapes else measured.shape_seconds
        seconds.append(compiling * choice.compiles)
    # The first step's has that of one shape in it.
    seconds[0] += measured.first_seconds - measured.kept_seconds * choice.compiles
    return seconds


def _typical(workload: Workload, model: CostModel) -> tuple[list[Batch], float]:
    """Of the first batches the one with the most work, and one in the middle; seconds that making a batch takes."""
    begin = perf_counter()
    batches = [batch for step in islice(workload.steps(), _TYPICAL_STEPS) for batch in step]
    layout = (perf_counter() - begin) / len(batches)
    ordered = sorted({batch.input_ids.shape: batch for batch in batches}.values(), key=model.of)
    middle = ordered[(len(ordered) - 1) // 2]
    return ([middle, ordered[-1]] if len(ordered) > 1 else [middle]), layout
