"""Which runtime executes the steps, by which plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from edgetune.byte_size import bytes_text, parse_bytes
from edgetune.config import PlanName, TrainConfig
from edgetune.device import Profile
from edgetune.errors import IncompatibleError, MissingDependencyError, ResourceError, UsageError
from edgetune.execution import WHOLE_STEP, ExecutionPlan
from edgetune.footprint import Footprint, Work
from edgetune.free_memory import free_memory_bytes
from edgetune.frozen import INT8, LAYERS
from edgetune.manifest import BundleManifest
from edgetune.planner import Planner, Prediction
from edgetune.runtimes import RUNTIMES, Abilities, Runtime, find_runtime, preferred_runtimes

_SHARE = 0.85
"""Of the memory that is free, or that a device has, which others need as well, that a plan may take."""
STOCK = "onnxruntime"
"""The runtime whose memory does not depend on the processor."""


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


def check_plan(config: TrainConfig) -> None:
    """Refuse what is wrong whatever the bundle.

    Raises:
        UsageError: An unknown runtime, a budget that is no size, or one for a plan whose memory is not known.
        MissingDependencyError: The runtime's package is not installed.
    """
    if config.memory_budget is not None:
        parse_bytes(config.memory_budget)
        if config.plan == "whole" or config.runtime == "ort-training":
            raise UsageError(
                "the whole step as one graph keeps all activations and takes no --memory-budget; "
                "use --plan auto with --runtime auto"
            )
    if config.runtime != "auto":
        _check(config.runtime, find_runtime(config.runtime).abilities(), config.plan)


def choose(
    manifest: BundleManifest,
    config: TrainConfig,
    work: Work,
    notice: Callable[[str], None],
    profile: Profile | None = None,
    *,
    elsewhere: bool = False,
) -> Choice:
    """The fastest runtime and plan that the configuration, the device and the bundle allow.

    Args:
        manifest: The bundle's.
        config: How to train.
        work: The largest batch of training and of validation.
        notice: Hears when the machine has too little free memory, or edgetune not the device's runtime.
        profile: The device's, where one was given.
        elsewhere: The device is not this machine: what is free here, and what this processor is good at, do not count.

    Raises:
        IncompatibleError: The bundle does not have the form that was asked for, or the device not the runtime.
        ResourceError: No plan fits into the memory budget, or into the device.
        UsageError: No runtime executes the plan.
    """
    folder = f"{LAYERS}/{INT8}/" if config.plan == "int8" else f"{LAYERS}/"
    layered = any(graph.role.startswith(folder) for graph in manifest.graphs)
    if not layered and (config.plan not in ("auto", "whole") or config.memory_budget or config.runtime == "openvino"):
        raise IncompatibleError(
            f"the bundle has no graphs under {folder}; prepare it again, or leave --runtime and --plan at auto and "
            "give no --memory-budget"
        )
    plan: PlanName = config.plan if layered else "whole"
    planned = []
    for name in _names(config, plan, profile, notice, elsewhere=elsewhere):
        runtime = find_runtime(name)
        footprint = _check(name, runtime.abilities(), plan)
        if footprint is None:
            return Choice(name, runtime, WHOLE_STEP, None)
        planned.append(_Planned(name, runtime, Planner(manifest, footprint, work), footprint))
    return _fitting(planned, config, notice, profile, elsewhere=elsewhere)


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


def _names(
    config: TrainConfig, plan: PlanName, profile: Profile | None, notice: Callable[[str], None], *, elsewhere: bool
) -> list[str]:
    """The runtimes that may be taken, the preferred first."""
    if profile is None:
        able: list[str] = list(_able(plan)) if config.runtime == "auto" else [config.runtime]
        if not able:
            raise UsageError(f"no runtime that is installed here executes --plan {plan}; see `edgetune doctor`")
        return able
    listed = ", ".join(profile.runtime.names)
    if config.runtime not in ("auto", *profile.runtime.names):
        raise IncompatibleError(
            f"{profile.name} runs {listed}, not --runtime {config.runtime}; leave it out, or choose one of them"
        )
    if absent := [name for name in profile.runtime.names if name not in RUNTIMES]:
        notice(f"{profile.name}: this edgetune has no runtime {', '.join(absent)}; it has {', '.join(RUNTIMES)}")
    if config.runtime != "auto":
        return [config.runtime]
    if elsewhere and profile.runtime.names[0] != STOCK:
        notice(f"predicted for {STOCK} on the CPU: what others take there depends on what they find")
    able = [name for name in profile.runtime.names if name == STOCK] if elsewhere else list(_listed(plan, profile))
    if not able:
        raise IncompatibleError(f"{profile.name} runs {listed}; none of them is here: {profile.install.step}")
    return able


def _able(plan: PlanName, among: Collection[str] | None = None) -> Iterator[str]:
    """The runtimes, among those or all, that `auto` may take for a plan, the fastest first."""
    for name in preferred_runtimes(among):
        abilities = find_runtime(name).abilities()
        if abilities.whole if plan == "whole" else _footprint(abilities, plan):
            yield name


def _listed(plan: PlanName, profile: Profile) -> Iterator[str]:
    """The runtimes of a device that are here: first those that run the whole step on its accelerator."""
    if profile.placement.whole_step == "accelerator" and plan in ("auto", "whole"):
        for name in profile.runtime.names:
            with suppress(MissingDependencyError):
                if name in RUNTIMES and name != STOCK and find_runtime(name).abilities().whole:
                    yield name
    yield from _able(plan, profile.runtime.names)


def _check(name: str, abilities: Abilities, plan: PlanName) -> Footprint | None:
    """The footprint with which a runtime executes a plan; none for the whole step."""
    footprint = None if plan == "whole" else _footprint(abilities, plan)
    if footprint is None and not (abilities.whole and plan in ("auto", "whole")):
        raise UsageError(f"--runtime {name} does not execute --plan {plan}; use --runtime auto")
    return footprint


def _footprint(abilities: Abilities, plan: PlanName) -> Footprint | None:
    return abilities.int8 if plan == "int8" else abilities.exact


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
    for each in planned:
        if prediction := each.planner.choose(config.plan, limit):
            return each.choice(prediction)
    smallest = min((each.smallest(config.plan) for each in planned), key=_peak)
    hard = min(limits, key=lambda each: each[0], default=None)
    if hard is None or _peak(smallest) <= hard[0]:
        notice(
            f"this machine has {bytes_text(free or 0)} of memory free; the smallest plan is expected to need "
            f"{bytes_text(_peak(smallest))}; it is tried"
        )
        return smallest
    streamed = min((each.smallest("stream") for each in planned), key=_peak)
    less = _peak(streamed) < _peak(smallest)
    fewer = "have fewer or shorter rows in a batch (--batch-size, --truncate)"
    if hard[1] is None:
        hint = f", or --plan stream and {_budget(streamed)}" if less else ""
        raise ResourceError(
            f"a memory budget of {config.memory_budget} is too small: the smallest plan for this bundle and these rows "
            f"needs --memory-budget {_budget(smallest)}; give that{hint}, or {fewer}"
        )
    hint = f"use --plan stream, which needs {_budget(streamed)}, or " if _peak(streamed) <= hard[0] else ""
    raise ResourceError(
        f"{hard[1]} is too small: a run may take {bytes_text(hard[0])}, {_SHARE:.0%} of its memory, and the smallest "
        f"plan for this bundle and these rows needs {_budget(smallest)}; {hint}{fewer}"
    )


def _limits(config: TrainConfig, profile: Profile | None) -> Iterator[tuple[int, str | None]]:
    """Most memory that a run may take, in bytes, and the device that has no more; none where it is the budget."""
    if config.memory_budget is not None:
        yield parse_bytes(config.memory_budget), None
    if profile is not None and (memory := profile.hardware.memory) is not None:
        yield int(_SHARE * memory.value), profile.name


def _peak(choice: Choice) -> int:
    return choice.predicted_peak_bytes or 0


def _budget(choice: Choice) -> str:
    return f"{math.ceil(_peak(choice) / 1e6)}MB"
