"""By which plan the steps are executed, on which of the runtimes that may do so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from edgetune.config import PlanName, TrainConfig
from edgetune.devices.profile import Profile
from edgetune.errors import IncompatibleError, ResourceError
from edgetune.formats.manifest import BundleManifest
from edgetune.formats.roles import INT8, LAYERS
from edgetune.machine.memory import free_memory_bytes
from edgetune.planning.accelerator import accelerated_plan, is_accelerated, on_accelerator
from edgetune.planning.candidates import STOCK, candidates, footprint_of
from edgetune.planning.memory import Work
from edgetune.planning.planner import Planner, Prediction
from edgetune.runtimes import find_runtime
from edgetune.runtimes.contract import Runtime
from edgetune.runtimes.execution import LAYERED, WHOLE_STEP, ExecutionPlan
from edgetune.runtimes.footprint import Footprint
from edgetune.text.byte_size import bytes_text, parse_bytes

_SHARE = 0.85
"""Of the memory that is free, or that a device has, which others need as well, that a plan may take."""
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
    """What the whole step takes more than on a device that was named; none where the memory is predicted."""
    place: int = 0
    """Of the runtime among those that may do it, the fastest first."""
    free: bool = True
    """Whether with more memory the choice would be no other."""
    fits: bool = True
    """Otherwise it is the smallest there is, and more than the machine has free."""

    @property
    def on_accelerator(self) -> bool:
        """Whether something else than the CPU executes the steps."""
        return on_accelerator(self.name, self.plan)

    @property
    def compiles(self) -> bool:
        """Whether a batch of another shape costs a compilation, in the layered form."""
        return self.footprint is not None and self.footprint.shape > 0

    @property
    def emulated(self) -> bool:
        """Whether this machine would simulate the hardware that the steps are for."""
        return self.runtime.abilities().emulation


def choose(
    manifest: BundleManifest,
    config: TrainConfig,
    work: Work,
    notice: Callable[[str], None],
    profile: Profile | None = None,
    trunk: ExecutionPlan | None = None,
    *,
    elsewhere: bool = False,
) -> Choice:
    """The fastest runtime and plan that the configuration, the device and the bundle allow.

    Args:
        manifest: The bundle's.
        config: How to train.
        work: The largest pass of training and of validation.
        notice: Hears when the machine has too little free memory, or edgetune not the device's runtime.
        profile: The device's, where one was given.
        trunk: What `plan_of_trunk` says.
        elsewhere: The device is not this machine: what is free here, and what this processor is good at, do not count.

    Raises:
        IncompatibleError: The bundle does not have the form that was asked for, or the device not the runtime.
        TooLargeError: No plan fits into the memory budget, or into the device.
        UsageError: No runtime executes the plan.
    """
    plan = config.plan if is_accelerated(config.runtime, config.plan) else _layered_plan(manifest, config)
    forward_only = config.method == "forward-only"
    given = replace(trunk or LAYERED, forward_only=forward_only)
    planned = []
    for name in candidates(config, plan, profile, notice, elsewhere=elsewhere):
        runtime = find_runtime(name)
        if is_accelerated(name, plan):
            return _whole(name, runtime, accelerated_plan(manifest, config), profile, manifest, work)
        footprint = footprint_of(name, plan, config.method)
        if footprint is None:
            whole = replace(WHOLE_STEP, forward_only=forward_only)
            return _whole(name, runtime, whole, profile, manifest, work)
        planned.append(_Planned(name, runtime, Planner(manifest, footprint, work, given), footprint))
    return _fitting(planned, config, notice, profile, elsewhere=elsewhere)


def _layered_plan(manifest: BundleManifest, config: TrainConfig) -> PlanName:
    """The configuration's plan, or the whole step of a bundle that has no other form.

    Raises:
        IncompatibleError: Another form was asked for.
    """
    folder = f"{LAYERS}/{INT8}/" if config.plan == "int8" else f"{LAYERS}/"
    if any(graph.role.startswith(folder) for graph in manifest.graphs):
        return config.plan
    if config.plan not in ("auto", "whole") or config.memory_budget or config.runtime == "openvino":
        raise IncompatibleError(
            f"the bundle has no graphs under {folder}; prepare it again, or leave --runtime and --plan at auto and "
            "give no --memory-budget"
        )
    return "whole"


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


def _fitting(
    planned: Sequence[_Planned],
    config: TrainConfig,
    notice: Callable[[str], None],
    profile: Profile | None,
    *,
    elsewhere: bool,
) -> Choice:
    """Of the fastest runtime that has a plan which fits, the fastest such plan."""
    limits = list(_limits(config, profile))
    free = None if elsewhere else free_memory_bytes()
    soft = [] if limits and profile is None else [int(_SHARE * free)] if free is not None else []
    limit = min([size for size, _ in limits] + soft, default=None)
    for place, each in enumerate(planned):
        if prediction := each.planner.choose(config.plan, limit):
            free = not place and prediction == each.planner.choose(config.plan, None)
            return replace(each.choice(prediction), place=place, free=free)
    smallest = min((each.smallest(config.plan) for each in planned), key=_peak)
    hard = min(limits, key=lambda each: each[0], default=None)
    if hard is None or _peak(smallest) <= hard[0]:
        notice(
            f"this machine has {bytes_text(free or 0)} of memory free; the smallest plan is expected to need "
            f"{bytes_text(_peak(smallest))}; it is tried"
        )
        return replace(smallest, free=False, fits=False)
    streamed = min((each.smallest("stream") for each in planned), key=_peak)
    less = _budget(streamed) != _budget(smallest)
    shorter = "have shorter rows (prepare --max-length, train --truncate)"
    if hard[1] is None:
        hint = f", or --plan stream and {_budget(streamed)}" if less else ""
        raise TooLargeError(
            _peak(smallest),
            f"a memory budget of {config.memory_budget} is too small: the smallest plan for this bundle and these rows "
            f"needs --memory-budget {_budget(smallest)}; give that{hint}, or {shorter}",
        )
    hint = f"use --plan stream, which needs {bytes_text(_peak(streamed))}, or " if _peak(streamed) <= hard[0] else ""
    raise TooLargeError(
        _peak(smallest),
        f"{hard[1]} is too small: a run may take {bytes_text(hard[0])}, {_SHARE:.0%} of its memory, and the smallest "
        f"plan for this bundle and these rows needs {bytes_text(_peak(smallest))}; {hint}{shorter}",
    )


def _whole(
    name: str, runtime: Runtime, whole: ExecutionPlan, profile: Profile | None, manifest: BundleManifest, work: Work
) -> Choice:
    """A whole step, whose memory is not predicted: it is more than that of the smallest layered plan.

    Raises:
        ResourceError: Not even that plan would fit into the device.
    """
    footprint = None if profile is None else footprint_of(STOCK, "auto", "backpropagation")
    if profile is None or footprint is None:
        return Choice(name, runtime, whole, None)
    given = replace(LAYERED, forward_only=whole.forward_only)
    least = Planner(manifest, footprint, work, given).smallest("stream").peak_memory_bytes
    memory = profile.hardware.memory
    if memory is not None and least > (most := int(_SHARE * memory.value)):
        raise TooLargeError(
            least,
            f"{profile.name} is too small: a run may take {bytes_text(most)}, {_SHARE:.0%} of its memory, and the "
            f"whole step needs more than the {bytes_text(least)} that training layer by layer does; use a smaller "
            "model, or shorter rows (prepare --max-length, train --truncate)",
        )
    return Choice(name, runtime, whole, None, least_bytes=least)


def _limits(config: TrainConfig, profile: Profile | None) -> Iterator[tuple[int, str | None]]:
    """Most memory that a run may take, in bytes, and the device that has no more; none where it is the budget."""
    if config.memory_budget is not None:
        yield int(parse_bytes(config.memory_budget) / _MARGIN), None
    if profile is not None and (memory := profile.hardware.memory) is not None:
        yield int(_SHARE * memory.value), profile.name


def _peak(choice: Choice) -> int:
    return choice.predicted_peak_bytes or 0


def _budget(choice: Choice) -> str:
    return f"{math.ceil(_MARGIN * _peak(choice) / 1e6)}MB"
