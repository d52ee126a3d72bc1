"""Whole steps of static shape on an accelerator: which configuration means one, and what a device adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from edgetune.config import DeviceType, PlanName, RuntimeName, TrainConfig
from edgetune.devices.place import Place
from edgetune.devices.profile import Profile
from edgetune.errors import IncompatibleError, MissingDependencyError
from edgetune.runtimes import find_runtime
from edgetune.runtimes.execution import ACCELERATING

ACCELERATED = ", or ".join(
    f"--runtime {name}" + ("" if facts.alone else f" --plan {facts.plans[0]}") for name, facts in ACCELERATING.items()
)
"""How to ask for an accelerator."""


def is_accelerated(runtime: str, plan: PlanName) -> bool:
    """Whether a runtime executes a plan as a whole step of static shape."""
    facts = ACCELERATING.get(runtime)
    return facts is not None and (facts.alone or plan in facts.plans)


def apply_profile(config: TrainConfig, place: Place) -> tuple[TrainConfig, tuple[str, ...]]:
    """The configuration with what a device's profile says of its accelerator and the configuration does not.

    Args:
        config: How to train.
        place: Where; a device that is elsewhere has what its profile names.

    Returns:
        The configuration, and why the CPU computes instead of the accelerator, where it does.

    Raises:
        IncompatibleError: The accelerator is not here, and the configuration takes nothing else.
        MissingDependencyError: The package of the runtime that was asked for is not installed.
    """
    profile = place.profile
    if profile is None:
        return config, ()
    absent = []
    for asked in [_with_runtime(profile, config, name) for name in _accelerator_runtimes(profile, config)]:
        reason = "" if not place.here else _why_absent(profile, config, asked)
        if not reason:
            return asked, ()
        absent.append(reason)
    if absent:
        # Two runtimes may lack the same device.
        reasons = f"{profile.name}: {'; '.join(dict.fromkeys(absent))}"
        if config.require_npu or config.device_type != TrainConfig.device_type:
            raise IncompatibleError(f"{reasons}; leave out --require-npu and --device-type to train on the CPU")
        return config, (f"{reasons}; the CPU computes",)
    return config, ()


def _accelerator_runtimes(profile: Profile, config: TrainConfig) -> Sequence[str]:
    """The device's runtimes with which the configuration means its accelerator, the preferred first."""
    names = [name for name in profile.runtime.names if name in ACCELERATING]
    if config.runtime != "auto":
        names = [name for name in names if name == config.runtime]
    if config.runtime in ACCELERATING and ACCELERATING[config.runtime].alone:
        return names
    places = profile.placement
    place = places.forward_only if config.method == "forward-only" else places.whole_step
    # The other plans, and those that a budget chooses from, are layered, and run on the CPU.
    layered = config.precision != "auto" or config.trunk or config.memory_budget is not None
    whole = config.plan in ("auto", "whole") and not layered
    return names if whole and place == "accelerator" else []


def _with_runtime(profile: Profile, config: TrainConfig, runtime: str) -> TrainConfig:
    """The configuration that names a runtime, and its device as the profile does."""
    facts, options = ACCELERATING[runtime], profile.runtime.options
    plan = config.plan if facts.alone else facts.plans[0]
    config = replace(config, runtime=cast(RuntimeName, runtime), plan=plan)
    if facts.soc_model and config.soc_model is None and (chip := options.get("soc_model")) is not None:
        config = replace(config, soc_model=int(chip))
    if len(facts.device_types) > 1 and config.device_type == TrainConfig.device_type:
        config = replace(config, device_type=cast(DeviceType, options.get("device_type", "NPU")))
    return config


def _why_absent(profile: Profile, config: TrainConfig, asked: TrainConfig) -> str:
    """Why the accelerator cannot be taken here; empty where it can."""
    runtime = find_runtime(asked.runtime)
    try:
        runtime.abilities()
    except MissingDependencyError as error:
        if config.runtime == asked.runtime:
            raise
        return str(error)
    if runtime.has_device is not None and not runtime.has_device(asked.device_type):
        return f"OpenVINO finds no {asked.device_type} here ({profile.install.step})"
    return ""
