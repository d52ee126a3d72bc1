"""Whole steps of static shape on an accelerator: what of a configuration they take, and the plan that it means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from edgetune.config import DeviceType, PlanName, RuntimeName, TrainConfig
from edgetune.devices.profile import Profile
from edgetune.errors import IncompatibleError, MissingDependencyError
from edgetune.formats.manifest import BundleManifest
from edgetune.formats.roles import INT8_STEP
from edgetune.runtimes import find_runtime
from edgetune.runtimes.contract import ChoosingRuntime
from edgetune.runtimes.execution import ACCELERATING, WHOLE_STEP, Accelerator, ExecutionPlan, Products

ACCELERATED = ", or ".join(
    f"--runtime {name}" + ("" if facts.alone else f" --plan {facts.plans[0]}") for name, facts in ACCELERATING.items()
)
"""How to ask for an accelerator."""


def is_accelerated(runtime: str, plan: PlanName) -> bool:
    """Whether a runtime executes a plan as a whole step of static shape."""
    facts = ACCELERATING.get(runtime)
    return facts is not None and (facts.alone or plan in facts.plans)


def on_accelerator(runtime: str, plan: ExecutionPlan) -> bool:
    """Whether something else than the CPU executes a plan, which is what OpenVINO takes where nothing is named."""
    accelerator = plan.accelerator
    return accelerator is not None and ACCELERATING[runtime].device(accelerator.device_type) != "CPU"


def apply_profile(
    profile: Profile, config: TrainConfig, notice: Callable[[str], None], *, elsewhere: bool = False
) -> TrainConfig:
    """The configuration with what a device's profile says of its accelerator and the configuration does not.

    Args:
        profile: Of the device.
        config: How to train.
        notice: Hears why the CPU computes instead of the accelerator.
        elsewhere: The device is not this machine: what is installed here does not count, and it has what its profile
            names.

    Raises:
        IncompatibleError: The accelerator is not here, and the configuration takes nothing else.
        MissingDependencyError: The package of the runtime that was asked for is not installed.
    """
    absent = []
    for asked in [_with_runtime(profile, config, name) for name in _accelerator_runtimes(profile, config)]:
        reason = "" if elsewhere else _why_absent(profile, config, asked)
        if not reason:
            return asked
        absent.append(reason)
    if absent:
        # Two runtimes may lack the same device.
        reasons = f"{profile.name}: {'; '.join(dict.fromkeys(absent))}"
        if config.require_npu or config.device_type != TrainConfig.device_type:
            raise IncompatibleError(f"{reasons}; leave out --require-npu and --device-type to train on the CPU")
        notice(f"{reasons}; the CPU computes")
    return config


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
    whole = config.plan in ("auto", "whole") and config.memory_budget is None
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
    try:
        find_runtime(asked.runtime).abilities()
    except MissingDependencyError as error:
        if config.runtime == asked.runtime:
            raise
        return str(error)
    several = len(ACCELERATING[asked.runtime].device_types) > 1
    if several and not cast(ChoosingRuntime, find_runtime(asked.runtime)).has_device(asked.device_type):
        return f"OpenVINO finds no {asked.device_type} here ({profile.install.step})"
    return ""


def accelerated_plan(manifest: BundleManifest, config: TrainConfig) -> ExecutionPlan:
    """The plan of a configuration on a runtime with which it `is_accelerated`.

    Raises:
        IncompatibleError: The bundle lacks the graph.
    """
    int8 = config.plan == "int8"
    if int8 and not any(graph.role == INT8_STEP for graph in manifest.graphs):
        raise IncompatibleError(
            f"the bundle has no graph {INT8_STEP!r}; prepare it again with --npu blocks, or leave --plan at auto"
        )
    accelerator = Accelerator(config.device_type, config.soc_model, config.require_npu)
    products: Products = "int8" if int8 else WHOLE_STEP.products
    forward_only = config.method == "forward-only"
    return replace(WHOLE_STEP, products=products, accelerator=accelerator, forward_only=forward_only)
