"""Which runtime executes the steps, by which plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    folder = f"{LAYERS}/{INT8}/" if config.plan == "int8" else f"{LAYERS}/"
    layered = any(graph.role.startswith(folder) for graph in manifest.graphs)
    if not layered and (config.plan not in ("auto", "whole") or config.memory_budget or config.runtime == "openvino"):
        raise IncompatibleError(
            f"the bundle has no graphs under {folder}; prepare it again, or leave --runtime and --plan at auto and "
            "give no --memory-budget"
        )
    plan: PlanName = config.plan if layered else "whole"
    name = config.runtime if config.runtime != "auto" else _fastest(plan)
    runtime = find_runtime(name)
    abilities = runtime.abilities()
    footprint = _check(name, abilities, plan)
    if footprint is None:
        return Choice(name, runtime, WHOLE_STEP, None)
    planner = Planner(manifest, footprint, reduce(_larger, rooms, Work(0, 0)))
    prediction = _prediction(planner, config, notice)
    return Choice(name, runtime, prediction.plan, prediction.peak_memory_bytes)


def _fastest(plan: PlanName) -> str:
    for name in preferred_runtimes():
        abilities = find_runtime(name).abilities()
        if abilities.whole if plan == "whole" else _footprint(abilities, plan):
            return name
    raise UsageError(f"no runtime that is installed here executes --plan {plan}; see `edgetune doctor`")


def _check(name: str, abilities: Abilities, plan: PlanName) -> Footprint | None:
    """The footprint with which a runtime executes a plan; none for the whole step."""
    footprint = None if plan == "whole" else _footprint(abilities, plan)
    if footprint is None and not (abilities.whole and plan in ("auto", "whole")):
        raise UsageError(f"--runtime {name} does not execute --plan {plan}; use --runtime auto")
    return footprint


def _footprint(abilities: Abilities, plan: PlanName) -> Footprint | None:
    return abilities.int8 if plan == "int8" else abilities.exact


def _prediction(planner: Planner, config: TrainConfig, notice: Callable[[str], None]) -> Prediction:
    if config.memory_budget is not None:
        return planner.choose(config.plan, parse_bytes(config.memory_budget))
    free = free_memory_bytes()
    try:
        return planner.choose(config.plan, None if free is None else int(_SHARE * free))
    except ResourceError:
        prediction = planner.smallest(config.plan)
        notice(
            f"this machine has {bytes_text(free or 0)} of memory free; the smallest plan is expected to need "
            f"{bytes_text(prediction.peak_memory_bytes)}; it is tried"
        )
        return prediction


def _larger(work: Work, room: Room) -> Work:
    return Work(max(work.positions, room.positions), max(work.scores, room.scores))
