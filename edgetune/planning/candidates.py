"""Which runtimes may execute a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from edgetune.config import PlanName, TrainingPrecision
from edgetune.errors import IncompatibleError, UsageError
from edgetune.planning.run import RunRequest
from edgetune.runtimes import RUNTIMES, find_runtime, preferred_runtimes
from edgetune.runtimes.contract import Runtime
from edgetune.runtimes.footprint import Footprint

STOCK = "onnxruntime"
"""The runtime whose memory does not depend on the processor."""


def candidates(request: RunRequest, plan: PlanName) -> tuple[list[str], list[str]]:
    """The runtimes that may be taken, the preferred first, and what is to be said of them.

    Args:
        request: What the run asks for.
        plan: What is left of its plan for this bundle.

    Raises:
        IncompatibleError: The device does not have the runtime.
        UsageError: No runtime that is installed here executes the plan.
    """
    place, profile, asked = request.place, request.place.profile, request.runtime
    if profile is None:
        able: list[str] = list(_able(request, plan)) if asked == "auto" else [asked]
        if not able:
            precision = "" if request.precision == "auto" else f" in --precision {request.precision}"
            raise UsageError(
                f"no runtime that is installed here executes --plan {plan}{precision} with --method {request.method}; "
                "see `edgetune doctor`"
            )
        return able, []
    listed = ", ".join(profile.runtime.names)
    if asked not in ("auto", *profile.runtime.names):
        raise IncompatibleError(
            f"{profile.name} runs {listed}, not --runtime {asked}; leave it out, or choose one of them"
        )
    notes = []
    if absent := [name for name in profile.runtime.names if name not in RUNTIMES]:
        notes.append(f"{profile.name}: this edgetune has no runtime {', '.join(absent)}; it has {', '.join(RUNTIMES)}")
    if asked != "auto":
        return [asked], notes
    if place.here:
        able = list(_able(request, plan, profile.runtime.names))
    else:
        able = [STOCK] if STOCK in profile.runtime.names else []
        if profile.runtime.names[0] != STOCK:
            notes.append(f"predicted for {STOCK} on the CPU: what others take there depends on what they find")
    if not able:
        raise IncompatibleError(f"{profile.name} runs {listed}; none of them is here: {profile.install.step}")
    return able, notes


def footprint_of(name: str, request: RunRequest, plan: PlanName) -> Footprint | None:
    """The footprint with which a runtime executes a plan; none for the whole step.

    Args:
        name: Of the runtime.
        request: What the run asks for.
        plan: What is left of its plan for this bundle.

    Raises:
        MissingDependencyError: The runtime's package is not installed.
        UsageError: The runtime does not execute it.
    """
    runtime = find_runtime(name)
    abilities = runtime.abilities()
    if not _has_method(runtime, request):
        raise UsageError(f"--runtime {name} has no --method {request.method}; use --runtime auto")
    footprint = None if plan == "whole" else layered_footprint(runtime, request.precision)
    layered = plan not in ("auto", "whole") or request.needs_layers
    if footprint is None and (layered or not abilities.whole):
        asked = f"--plan {plan}" if request.precision == "auto" else f"--precision {request.precision}"
        asked = asked if request.layers is None else f"--layers {request.layers}"
        asked = asked if request.trunk is None else "--trunk"
        raise UsageError(f"--runtime {name} does not execute {asked}; use --runtime auto")
    return footprint


def layered_footprint(runtime: Runtime, precision: TrainingPrecision) -> Footprint | None:
    """What a runtime needs for the layered form in a precision; none where it does not have that."""
    abilities = runtime.abilities()
    return abilities.int8 if precision == "int8" else abilities.exact


def require_runtime(request: RunRequest) -> None:
    """Refuse a runtime that is not here, or does not execute the plan.

    Raises:
        MissingDependencyError: Its package is not installed.
        UsageError: It does not execute the plan.
    """
    if request.accelerator is not None:
        find_runtime(request.runtime).abilities()
    elif request.runtime != "auto":
        footprint_of(request.runtime, request, request.plan)


def _able(request: RunRequest, plan: PlanName, among: Collection[str] | None = None) -> Iterator[str]:
    """The runtimes, among those or all, that `auto` may take for a plan, the fastest first."""
    for name in preferred_runtimes(among):
        runtime = find_runtime(name)
        does = runtime.abilities().whole if plan == "whole" else layered_footprint(runtime, request.precision)
        if does and _has_method(runtime, request):
            yield name


def _has_method(runtime: Runtime, request: RunRequest) -> bool:
    return runtime.open_forward is not None or not request.forward_only
