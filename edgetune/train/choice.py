"""Which runtime executes the steps, by which plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from edgetune.byte_size import bytes_text, parse_bytes
from edgetune.config import PlanName, TrainConfig
from edgetune.data.packing import Room
from edgetune.errors import IncompatibleError, ResourceError, UsageError
from edgetune.execution import WHOLE_STEP, ExecutionPlan
from edgetune.footprint import Footprint, Work
from edgetune.free_memory import free_memory_bytes
from edgetune.frozen import INT8, LAYERS
from edgetune.manifest import BundleManifest
from edgetune.planner import Planner, Prediction
from edgetune.runtimes import Abilities, Runtime, find_runtime, preferred_runtimes
from edgetune.train.accelerated import accelerated_plan, check_accelerated, is_accelerated

_SHARE = 0.85
"""Of the free memory, which others may need as well, that a plan may take."""


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    name: str
    """Of the runtime."""
    runtime: Runtime
    plan: ExecutionPlan
    predicted_peak_bytes: int | None
    """Highest resident memory; none where it is not known."""


def check_plan(config: TrainConfig) -> None:
    """Refuse what is wrong whatever the bundle.

    Raises:
        UsageError: An unknown runtime, a budget that is no size, or one for a plan whose memory is not known.
        MissingDependencyError: The runtime's package is not installed.
    """
    check_accelerated(config)
    if config.memory_budget is not None:
        parse_bytes(config.memory_budget)
        if config.plan == "whole" or config.runtime == "ort-training" or is_accelerated(config):
            raise UsageError(
                "the whole step as one graph keeps all activations and takes no --memory-budget; "
                "use --plan auto with --runtime auto"
            )
    if config.runtime != "auto" and not is_accelerated(config):
        _check(config.runtime, find_runtime(config.runtime).abilities(), config.plan)


def choose(
    manifest: BundleManifest, config: TrainConfig, rooms: Iterable[Room], notice: Callable[[str], None]
) -> Choice:
    """The fastest runtime and plan that the configuration, the machine and the bundle allow.

    Args:
        manifest: The bundle's.
        config: How to train.
        rooms: The largest pass of training and of validation.
        notice: Hears when the machine has too little free memory.

    Raises:
        IncompatibleError: The bundle does not have the form that was asked for.
        ResourceError: No plan fits into the memory budget.
        UsageError: No runtime executes the plan.
    """
    if is_accelerated(config):
        return Choice(config.runtime, find_runtime(config.runtime), accelerated_plan(manifest, config), None)
    folder = f"{LAYERS}/{INT8}/" if config.plan == "int8" else f"{LAYERS}/"
    layered = any(graph.role.startswith(folder) for graph in manifest.graphs)
    if not layered and (config.plan not in ("auto", "whole") or config.memory_budget or config.runtime == "openvino"):
        raise IncompatibleError(
            f"the bundle has no graphs under {folder}; prepare it again, or leave --runtime and --plan at auto and "
            "give no --memory-budget"
        )
    plan: PlanName = config.plan if layered else "whole"
    work = reduce(_larger, rooms, Work(0, 0))
    planned = []
    for name in [config.runtime] if config.runtime != "auto" else _able(plan):
        runtime = find_runtime(name)
        footprint = _check(name, runtime.abilities(), plan)
        if footprint is None:
            return Choice(name, runtime, WHOLE_STEP, None)
        planned.append(_Planned(name, runtime, Planner(manifest, footprint, work)))
    return _fitting(planned, config, notice)


@dataclass(frozen=True)
class _Planned:
    name: str
    runtime: Runtime
    planner: Planner

    def choice(self, prediction: Prediction) -> Choice:
        return Choice(self.name, self.runtime, prediction.plan, prediction.peak_memory_bytes)

    def smallest(self, plan: PlanName) -> Choice:
        return self.choice(self.planner.smallest(plan))


def _able(plan: PlanName) -> list[str]:
    """The runtimes that `auto` may take for a plan, the fastest first."""
    able = []
    for name in preferred_runtimes():
        abilities = find_runtime(name).abilities()
        if abilities.whole if plan == "whole" else _footprint(abilities, plan):
            able.append(name)
    if not able:
        raise UsageError(f"no runtime that is installed here executes --plan {plan}; see `edgetune doctor`")
    return able


def _check(name: str, abilities: Abilities, plan: PlanName) -> Footprint | None:
    """The footprint with which a runtime executes a plan; none for the whole step."""
    footprint = None if plan == "whole" else _footprint(abilities, plan)
    if footprint is None and not (abilities.whole and plan in ("auto", "whole")):
        raise UsageError(f"--runtime {name} does not execute --plan {plan}; use --runtime auto")
    return footprint


def _footprint(abilities: Abilities, plan: PlanName) -> Footprint | None:
    return abilities.int8 if plan == "int8" else abilities.exact


def _fitting(planned: Sequence[_Planned], config: TrainConfig, notice: Callable[[str], None]) -> Choice:
    """Of the fastest runtime that has a plan which fits, the fastest such plan."""
    budget = None if config.memory_budget is None else parse_bytes(config.memory_budget)
    free = free_memory_bytes()
    limit = budget or (None if free is None else int(_SHARE * free))
    for each in planned:
        if prediction := each.planner.choose(config.plan, limit):
            return each.choice(prediction)
    smallest = min((each.smallest(config.plan) for each in planned), key=_peak)
    if budget is None:
        notice(
            f"this machine has {bytes_text(free or 0)} of memory free; the smallest plan is expected to need "
            f"{bytes_text(_peak(smallest))}; it is tried"
        )
        return smallest
    streamed = min((each.smallest("stream") for each in planned), key=_peak)
    hint = f", or --plan stream and {_budget(streamed)}" if _peak(streamed) < _peak(smallest) else ""
    raise ResourceError(
        f"a memory budget of {config.memory_budget} is too small: the smallest plan for this bundle and these rows "
        f"needs --memory-budget {_budget(smallest)}; give that{hint}, or have fewer or shorter rows in a batch "
        "(--batch-size, --truncate)"
    )


def _peak(choice: Choice) -> int:
    return choice.predicted_peak_bytes or 0


def _budget(choice: Choice) -> str:
    return f"{math.ceil(_peak(choice) / 1e6)}MB"


def _larger(work: Work, room: Room) -> Work:
    return Work(max(work.positions, room.positions), max(work.scores, room.scores))
