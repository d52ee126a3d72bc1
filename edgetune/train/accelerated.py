"""Whole steps of static shape on an accelerator: what of a configuration they take, and the plan that it means."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import cast, get_args

from edgetune.config import DeviceType, PlanName, RuntimeName, TrainConfig
from edgetune.data.buckets import parse_buckets
from edgetune.device import Profile
from edgetune.errors import IncompatibleError, MissingDependencyError, UsageError
from edgetune.execution import INT8_STEP, WHOLE_STEP, Accelerator, ExecutionPlan, Products
from edgetune.manifest import BundleManifest
from edgetune.runtimes import find_runtime, openvino

_ALWAYS: RuntimeName = "qnn"
_WITH_WHOLE: RuntimeName = "openvino"
"""The runtime that compiles nothing but whole steps for static shapes, and the one that does with `--plan whole`."""
_DEVICES = [kind for kind in get_args(DeviceType) if kind != "auto"]
_PLANS = ("auto", "whole", "int8")


def is_accelerated(runtime: str, plan: PlanName) -> bool:
    """Whether a runtime executes a plan as a whole step of static shape."""
    return runtime == _ALWAYS or (runtime == _WITH_WHOLE and plan == "whole")


def check_accelerated(config: TrainConfig) -> None:
    """Refuse what is wrong whatever the bundle.

    Raises:
        UsageError: An option that the step does not take, or that it alone takes.
        MissingDependencyError: The runtime's package is not installed.
    """
    if not is_accelerated(config.runtime, config.plan):
        given = {
            "--require-npu": config.require_npu,
            "--buckets": config.buckets is not None,
            "--device-type": config.device_type != TrainConfig.device_type,
        }
        if options := [name for name, is_given in given.items() if is_given]:
            raise UsageError(
                f"{' and '.join(options)} need a runtime that compiles the whole step; use --runtime {_ALWAYS}, or "
                f"--runtime {_WITH_WHOLE} --plan whole"
            )
        return
    if config.buckets is not None:
        parse_buckets(config.buckets)
    if config.runtime == _ALWAYS and config.device_type not in ("auto", "NPU"):
        raise UsageError(f"--runtime {_ALWAYS} trains on an NPU, not on --device-type {config.device_type}")
    if config.plan not in _PLANS:
        raise UsageError(f"--runtime {config.runtime} does not execute --plan {config.plan}, only {', '.join(_PLANS)}")
    find_runtime(config.runtime).abilities()


def as_on(profile: Profile, config: TrainConfig, notice: Callable[[str], None]) -> TrainConfig:
    """The configuration with what a device's profile says of its accelerator and the configuration does not.

    Args:
        profile: Of the device, which is this machine.
        config: How to train.
        notice: Hears when the accelerator is not found.

    Raises:
        UsageError: The profile names a kind of device that OpenVINO does not have, or a chip without a number.
    """
    options, places = profile.runtime.options, profile.placement
    if config.soc_model is None and (chip := options.get("soc_model")) is not None:
        if not chip.isdecimal():
            raise UsageError(f"{profile.name}: runtime.options.soc_model is {chip!r}, expected a number such as 69")
        config = replace(config, soc_model=int(chip))
    runtime = profile.runtime.names[0] if config.runtime == "auto" else config.runtime
    place = places.forward_only if config.method == "forward-only" else places.whole_step
    if runtime != _WITH_WHOLE or place != "accelerator" or config.plan != "auto" or config.memory_budget is not None:
        return config
    # What `auto` means elsewhere, the layered form, runs on the CPU.
    kind = options.get("device_type", "NPU")
    if kind not in _DEVICES:
        raise UsageError(f"{profile.name}: runtime.options.device_type is {kind!r}, expected {', '.join(_DEVICES)}")
    with suppress(MissingDependencyError):
        if openvino.has_device(kind):
            return replace(config, runtime=_WITH_WHOLE, plan="whole", device_type=cast(DeviceType, kind))
        notice(f"{profile.name}: OpenVINO finds no {kind} here ({profile.install.step}); the CPU computes")
    return config


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
