"""Whole steps of static shape on an accelerator: what of a configuration they take, and the plan that it means."""

from __future__ import annotations

from dataclasses import replace

from edgetune.config import PlanName, TrainConfig
from edgetune.data.buckets import parse_buckets
from edgetune.errors import IncompatibleError, UsageError
from edgetune.execution import INT8_STEP, WHOLE_STEP, Accelerator, ExecutionPlan, Products
from edgetune.manifest import BundleManifest
from edgetune.runtimes import find_runtime

_ALWAYS, _WITH_WHOLE = "qnn", "openvino"
"""The runtime that compiles nothing but whole steps for static shapes, and the one that does with `--plan whole`."""
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


def accelerated_plan(manifest: BundleManifest, config: TrainConfig) -> ExecutionPlan:
    """The plan of a configuration on a runtime with which it `is_accelerated`.

    Raises:
        IncompatibleError: The bundle lacks the graph.
    """
    int8 = config.plan == "int8"
    if int8 and not any(graph.role == INT8_STEP for graph in manifest.graphs):
        raise IncompatibleError(
            f"the bundle has no graph {INT8_STEP!r}; prepare it again with --npu qdq, or leave --plan at auto"
        )
    accelerator = Accelerator(config.device_type, config.soc_model, config.require_npu)
    products: Products = "int8" if int8 else WHOLE_STEP.products
    forward_only = config.method == "forward-only"
    return replace(WHOLE_STEP, products=products, accelerator=accelerator, forward_only=forward_only)
