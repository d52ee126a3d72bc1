"""Which runtimes may execute a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from edgetune.config import Method, PlanName, TrainConfig
from edgetune.devices.profile import Profile
from edgetune.errors import IncompatibleError, UsageError
from edgetune.runtimes import RUNTIMES, find_runtime, preferred_runtimes
from edgetune.runtimes.contract import Abilities
from edgetune.runtimes.footprint import Footprint

STOCK = "onnxruntime"
"""The runtime whose memory does not depend on the processor."""


def candidates(
    config: TrainConfig, plan: PlanName, profile: Profile | None, notice: Callable[[str], None], *, elsewhere: bool
) -> list[str]:
    """The runtimes that may be taken, the preferred first.

    Args:
        config: How to train.
        plan: What is left of the configuration's plan for this bundle.
        profile: The device's, where one was given.
        notice: Hears what of the device's runtimes edgetune does not have.
        elsewhere: The device is not this machine.

    Raises:
        IncompatibleError: The device does not have the runtime.
        UsageError: No runtime that is installed here executes the plan.
    """
    if profile is None:
        able: list[str] = list(_able(plan, config.method)) if config.runtime == "auto" else [config.runtime]
        if not able:
            raise UsageError(
                f"no runtime that is installed here executes --plan {plan} with --method {config.method}; see "
                "`edgetune doctor`"
            )
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
    able = [STOCK] if elsewhere and STOCK in profile.runtime.names else []
    able = able if elsewhere else list(_able(plan, config.method, profile.runtime.names))
    if not able:
        raise IncompatibleError(f"{profile.name} runs {listed}; none of them is here: {profile.install.step}")
    return able


def footprint_of(name: str, plan: PlanName, method: Method) -> Footprint | None:
    """The footprint with which a runtime executes a plan; none for the whole step.

    Raises:
        MissingDependencyError: The runtime's package is not installed.
        UsageError: The runtime does not execute it.
    """
    abilities = find_runtime(name).abilities()
    if not _has(abilities, method):
        raise UsageError(f"--runtime {name} has no --method {method}; use --runtime auto")
    footprint = None if plan == "whole" else _footprint(abilities, plan)
    if footprint is None and not (abilities.whole and plan in ("auto", "whole")):
        raise UsageError(f"--runtime {name} does not execute --plan {plan}; use --runtime auto")
    return footprint


def _able(plan: PlanName, method: Method, among: Collection[str] | None = None) -> Iterator[str]:
    """The runtimes, among those or all, that `auto` may take for a plan, the fastest first."""
    for name in preferred_runtimes(among):
        abilities = find_runtime(name).abilities()
        if _has(abilities, method) and (abilities.whole if plan == "whole" else _footprint(abilities, plan)):
            yield name


def _has(abilities: Abilities, method: Method) -> bool:
    return abilities.forward or method == "backpropagation"


def _footprint(abilities: Abilities, plan: PlanName) -> Footprint | None:
    return abilities.int8 if plan == "int8" else abilities.exact
