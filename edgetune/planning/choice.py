"""By which plan the steps are executed, on which of the runtimes that may do so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from edgetune.config import PlanName
from edgetune.errors import IncompatibleError, ResourceError
from edgetune.formats.manifest import BundleManifest
from edgetune.formats.roles import INT8, INT8_STEP, LAYERS
from edgetune.machine.memory import free_memory_bytes
from edgetune.planning.candidates import STOCK, candidates, footprint_of, layered_footprint
from edgetune.planning.memory import Work
from edgetune.planning.planner import Planner, Prediction
from edgetune.planning.run import RunRequest
from edgetune.runtimes import find_runtime
from edgetune.runtimes.contract import Runtime
from edgetune.runtimes.execution import ACCELERATING, ExecutionPlan, LayeredPlan, WholePlan
from edgetune.runtimes.footprint import Footprint
from edgetune.text.byte_size import bytes_text

_SHARE = 0.85
"""Of the memory that is free, or that a device has, a plan may take this share: others need some as well."""
_WITH_MAGNITUDES = ("onnxruntime", "openvino", "torch")
"""Runtimes that train the magnitudes of DoRA."""
_MARGIN = 1.05
"""By which a budget is larger than the prediction of a plan that fits: predictions are rarely further off."""


class TooLargeError(ResourceError):
    """A run needs more memory than there is.

    Args:
        peak: What the smallest plan needs, in bytes.
        message: Says so.
    """

    def __init__(self, peak: int, message: str) -> None:
        super().__init__(message)
        self.peak = peak


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    name: str
    """Of the runtime."""
    runtime: Runtime
    plan: ExecutionPlan
    predicted_peak_bytes: int | None
    """Highest resident memory; none where it is not known."""
    footprint: Footprint | None = None
    """The runtime's; none for the whole step."""
    least_bytes: int | None = None
    """The whole step takes more than this, on a device that was named; none where the memory is predicted."""
    speed_order: int = 0
    """Of the runtime among those that may do it, the fastest first."""
    unconstrained: bool = True
    """Whether with more memory the choice would be no other."""
    fits: bool = True
    """Otherwise it is the smallest there is, and more than the machine has free."""
    notes: tuple[str, ...] = ()
    """What is to be said of it."""

    @property
    def on_accelerator(self) -> bool:
        """Whether something else than the CPU executes the steps."""
        accelerator = self.plan.accelerator if isinstance(self.plan, WholePlan) else None
        # OpenVINO takes the CPU where nothing is named.
        return accelerator is not None and ACCELERATING[self.name].device(accelerator.device_type) != "CPU"

    @property
    def compiles(self) -> bool:
        """Whether a batch of another shape costs a compilation, in the layered form."""
        return self.footprint is not None and self.footprint.shape_bytes > 0

    @property
    def emulated(self) -> bool:
        """Whether this machine would simulate the hardware that the steps are for."""
        return self.runtime.abilities().emulation


def choose(
    manifest: BundleManifest,
    request: RunRequest,
    work: Work,
    given: LayeredPlan | None = None,
) -> Choice:
    """The fastest runtime and plan that the request, its place and the bundle allow.

    Args:
        manifest: The bundle's.
        request: What the run asks for.
        work: The largest pass of training and of validation.
        given: What every layered plan of the run has: the trunk, the layers that are trained, what is kept of what
            enters them, and how AdamW's moments are kept.

    Raises:
        IncompatibleError: The bundle does not have the form that was asked for, or the device not the runtime.
        TooLargeError: No plan fits into the memory budget, or into the device.
        UsageError: No runtime executes the plan.
    """
    _refuse_magnitudes(manifest, request)
    plan = request.plan if request.accelerator is not None else _plan_of_bundle(manifest, request)
    given = replace(given or LayeredPlan(), forward_only=request.forward_only)
    names, notes = candidates(request, plan)
    planned = []
    for name in names:
        runtime = find_runtime(name)
        if request.accelerator is not None:
            choice = _whole(name, runtime, _accelerated(manifest, request), request, manifest, work)
            return replace(choice, notes=tuple(notes))
        footprint = footprint_of(name, request, plan)
        if footprint is None:
            whole = WholePlan(forward_only=request.forward_only, sharding=request.sharding)
            return replace(_whole(name, runtime, whole, request, manifest, work), notes=tuple(notes))
        planned.append(_Planned(name, runtime, Planner(manifest, footprint, work, given), footprint))
    choice = _fitting(planned, request)
    return replace(choice, notes=(*notes, *choice.notes))


def _refuse_magnitudes(manifest: BundleManifest, request: RunRequest) -> None:
    """Refuse what does not train the magnitudes of a bundle's slots yet.

    Raises:
        IncompatibleError: It was asked for.
    """
    if not manifest.lora.dora:
        return
    accelerated = request.accelerator is not None and request.accelerator.device_type not in ("auto", "CPU")
    refused = {
        f"--runtime {request.runtime}": request.runtime not in ("auto", *_WITH_MAGNITUDES),
        f"--device-type {request.accelerator.device_type}" if request.accelerator is not None else "": accelerated,
        f"--method {request.method}": request.forward_only,
        "--trunk": request.trunk is not None,
    }
    if names := [name for name, is_asked in refused.items() if is_asked]:
        raise IncompatibleError(
            f"the bundle's slots have magnitudes (DoRA), which {' and '.join(names)} does not train yet; use --runtime "
            f"{' or '.join(_WITH_MAGNITUDES)}, or a bundle that was prepared without --dora"
        )


def _plan_of_bundle(manifest: BundleManifest, request: RunRequest) -> PlanName:
    """The plan of the request, or the whole step of a bundle that has no other form.

    Raises:
        IncompatibleError: Another form was asked for.
    """
    folder = f"{LAYERS}/{INT8}/" if request.precision == "int8" else f"{LAYERS}/"
    if any(graph.role.startswith(folder) for graph in manifest.graphs):
        return request.plan
    layered = request.plan not in ("auto", "whole") or request.needs_layers
    if layered or request.memory_budget_bytes is not None or request.runtime == "openvino":
        raise IncompatibleError(
            f"the bundle has no graphs under {folder}; prepare it again, or leave --runtime, --plan, --precision and "
            "--optimizer-states at auto and give no --memory-budget, --layers or --lora-plus-ratio"
        )
    return "whole"


def _accelerated(manifest: BundleManifest, request: RunRequest) -> WholePlan:
    """The whole step on the accelerator that the request means.

    Raises:
        IncompatibleError: The bundle lacks the graph.
    """
    int8 = request.precision == "int8"
    if int8 and not any(graph.role == INT8_STEP for graph in manifest.graphs):
        raise IncompatibleError(
            f"the bundle has no graph {INT8_STEP!r}; prepare it again with --npu blocks, or leave --precision at auto"
        )
    return WholePlan("int8" if int8 else "fp32", request.accelerator, request.forward_only)


@dataclass(frozen=True)
class _Planned:
    name: str
    runtime: Runtime
    planner: Planner
    footprint: Footprint

    def choice(self, prediction: Prediction) -> Choice:
        return Choice(self.name, self.runtime, prediction.plan, prediction.peak_memory_bytes, self.footprint)

    def smallest(self, plan: PlanName) -> Choice:
        return self.choice(self.planner.smallest(plan))


def _fitting(planned: Sequence[_Planned], request: RunRequest) -> Choice:
    """Of the fastest runtime that has a plan which fits, the fastest such plan."""
    # What is free here counts as well, unless a budget was given on this very machine.
    limits = list(_limits(request))
    sizes = [limit.size for limit in limits]
    free_bytes = request.free_memory_bytes
    if free_bytes is None and request.place.here:
        free_bytes = free_memory_bytes()
    if free_bytes is not None and (request.place.profile is not None or not limits):
        sizes.append(int(_SHARE * free_bytes))
    limit = min(sizes, default=None)
    # The first runtime with a plan that fits is the fastest.
    for speed_order, each in enumerate(planned):
        if prediction := each.planner.choose(request.plan, limit):
            unconstrained = not speed_order and prediction == each.planner.choose(request.plan, None)
            return replace(each.choice(prediction), speed_order=speed_order, unconstrained=unconstrained)
    # Nothing fits. Where it is only what is free now, which may change, the smallest plan is tried.
    smallest = min((each.smallest(request.plan) for each in planned), key=_peak)
    hard = min(limits, key=lambda each: each.size, default=None)
    if hard is None or _peak(smallest) <= hard.size:
        note = (
            f"this machine has {bytes_text(free_bytes or 0)} of memory free; the smallest plan is expected to need "
            f"{bytes_text(_peak(smallest))}; it is tried"
        )
        return replace(smallest, unconstrained=False, fits=False, notes=(note,))
    # A budget or a device is refused, with what would do.
    streamed = min((each.smallest("stream") for each in planned), key=_peak)
    less = _budget(streamed) != _budget(smallest)
    shorter = "have shorter rows (prepare --max-length, train --truncate)"
    if hard.device is None:
        hint = f", or --plan stream and {_budget(streamed)}" if less else ""
        raise TooLargeError(
            _peak(smallest),
            f"a memory budget of {bytes_text(request.memory_budget_bytes or 0)} is too small: the smallest plan for "
            f"this bundle and these rows needs --memory-budget {_budget(smallest)}; give that{hint}, or {shorter}",
        )
    hint = f"use --plan stream, which needs {bytes_text(_peak(streamed))}, or " if _peak(streamed) <= hard.size else ""
    raise TooLargeError(
        _peak(smallest),
        f"{hard.device} is too small: a run may take {bytes_text(hard.size)}, {_SHARE:.0%} of its memory, and the "
        f"smallest plan for this bundle and these rows needs {bytes_text(_peak(smallest))}; {hint}{shorter}",
    )


def _whole(
    name: str, runtime: Runtime, whole: WholePlan, request: RunRequest, manifest: BundleManifest, work: Work
) -> Choice:
    """A whole step, whose memory is not predicted: it is more than that of the smallest layered plan.

    Raises:
        ResourceError: Not even that plan would fit into the device.
    """
    place = request.place
    footprint = None if place.profile is None else layered_footprint(find_runtime(STOCK), "auto")
    if footprint is None:
        return Choice(name, runtime, whole, None)
    given = LayeredPlan(forward_only=whole.forward_only)
    least = Planner(manifest, footprint, work, given).smallest("stream").peak_memory_bytes
    memory = place.memory_limit()
    if memory is not None and least > (most := int(_SHARE * memory)):
        raise TooLargeError(
            least,
            f"{place.name} is too small: a run may take {bytes_text(most)}, {_SHARE:.0%} of its memory, and the "
            f"whole step needs more than the {bytes_text(least)} that training layer by layer does; use a smaller "
            "model, or shorter rows (prepare --max-length, train --truncate)",
        )
    return Choice(name, runtime, whole, None, least_bytes=least)


@dataclass(frozen=True)
class _Limit:
    """Most memory that a run may take."""

    size: int
    """Bytes."""
    device: str | None
    """That has no more; none where it is the budget."""


def _limits(request: RunRequest) -> Iterator[_Limit]:
    if request.memory_budget_bytes is not None:
        yield _Limit(int(request.memory_budget_bytes / _MARGIN), None)
    if (memory := request.place.memory_limit()) is not None:
        yield _Limit(int(_SHARE * memory), request.place.name)


def _peak(choice: Choice) -> int:
    return choice.predicted_peak_bytes or 0


def _budget(choice: Choice) -> str:
    return f"{math.ceil(_MARGIN * _peak(choice) / 1e6)}MB"
