"""OpenVINO: the layered form on its CPU device, in bfloat16 where the processor has that; or the whole step."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgetune.bundle import Bundle
from edgetune.errors import IncompatibleError, MissingDependencyError
from edgetune.execution import WHOLE_STEP, Accelerator, ExecutionPlan
from edgetune.footprint import Footprint
from edgetune.placement import Placement
from edgetune.runtimes import Abilities, OptimizerConfig, Parameters, Session
from edgetune.runtimes.layered.channels import Channels, groups_of
from edgetune.runtimes.verified_cache import CACHE, VerifiedFolder

if TYPE_CHECKING:
    from edgetune.runtimes.accelerator.openvino import OpenVinoCompiler
    from edgetune.runtimes.layered.openvino import OpenVinoBackend

DEVICE = "CPU"
_BF16 = Footprint(
    products="bf16",
    storage=2,
    base=246_000_000,
    attention_states=0.0,
    attention_scores=8.1,
    mlp_states=0.0,
    hidden_states=62.6,
    graph_weights=0.0,
    logits=4.8,
    together=True,
    weight=2.0,
    dequantise=90.0,
)
_FP32 = replace(
    _BF16, products="fp32", storage=4, attention_scores=16.2, hidden_states=125.2, weight=4.0, dequantise=30.0
)
"""Twice the other's: not measured."""
_INT8 = replace(
    _BF16,
    products="int8",
    base=240_000_000,
    attention_states=3.8,
    attention_scores=7.9,
    hidden_states=59.0,
    logits=6.3,
    weight=1.0,
)


def abilities() -> Abilities:
    """See `edgetune.runtimes.Runtime.abilities`.

    Raises:
        MissingDependencyError: The package `openvino` is not installed.
    """
    short = "BF16" in _property("OPTIMIZATION_CAPABILITIES")
    # Without bfloat16 there is nothing in which it is ahead of stock ONNX Runtime.
    return Abilities(whole=False, exact=_BF16 if short else _FP32, int8=_INT8 if short else None, preferred=short)


def version() -> str:
    """See `edgetune.runtimes.Runtime.version`."""
    return f"openvino {metadata.version('openvino')}"


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan = WHOLE_STEP
) -> Iterator[Session]:
    """Load what the plan runs; see `edgetune.runtimes.Runtime`.

    Raises:
        IncompatibleError: The device for the whole step is not there.
        MissingDependencyError: The package `openvino` is not installed.
    """
    core()
    if plan.form == "whole":
        from edgetune.runtimes.accelerator.graphs import AcceleratorGraphs
        from edgetune.runtimes.accelerator.session import AcceleratorSession

        yield AcceleratorSession(bundle, parameters, optimizer, AcceleratorGraphs(_compiler(bundle, plan)))
        return
    from edgetune.runtimes.layered.session import LayeredSession

    with VerifiedFolder(_cache_of(bundle.path)) as cache:
        yield LayeredSession(bundle, parameters, optimizer, plan, _backend(bundle, plan, cache))


def place(bundle: Bundle, plan: ExecutionPlan, batch: int, length: int) -> list[Placement]:
    """See `edgetune.runtimes.PlacingRuntime.place`."""
    compiler = _compiler(bundle, plan)
    return [compiler.compile(role, batch, length).placement for role in ("step", "loss")]


def _compiler(bundle: Bundle, plan: ExecutionPlan) -> OpenVinoCompiler:
    accelerator = plan.accelerator or Accelerator()
    device = DEVICE if accelerator.device_type == "auto" else accelerator.device_type
    found = core().available_devices
    if not any(name == device or name.startswith(f"{device}.") for name in found):
        raise IncompatibleError(
            f"OpenVINO finds no {device} here, only {', '.join(found)}; install its driver, or choose another "
            "--device-type"
        )
    if accelerator.require and device != "NPU":
        raise IncompatibleError(f"--require-npu asks for an NPU, and --device-type is {device}; give --device-type NPU")
    from edgetune.runtimes.accelerator.openvino import OpenVinoCompiler

    return OpenVinoCompiler(bundle, core(), device, metadata.version("openvino"))


def _backend(bundle: Bundle, plan: ExecutionPlan, cache: Path | None) -> OpenVinoBackend:
    from edgetune.runtimes.layered.openvino import OpenVinoBackend

    # What is unpacked once and for all is put right.
    order = Channels(None if plan.resident else groups_of(bundle.manifest))
    return OpenVinoBackend(DEVICE, cache, plan, order)


@cache
def core() -> Any:
    """OpenVINO's core, imported so that it keeps to itself.

    Importing `openvino` imports its model converter, which tells Google Analytics that it was imported. Nothing here
    converts models, and `openvino` does without the converter.

    Raises:
        MissingDependencyError: The package is not installed.
    """
    if find_spec("openvino") is None:
        raise MissingDependencyError('openvino is not installed; pip install "edgetune[openvino]"')
    converter = "openvino.tools.ovc"
    absent = "openvino" not in sys.modules and converter not in sys.modules
    if absent:
        # This is how Python is told that a module cannot be imported.
        cast(dict[str, Any], sys.modules)[converter] = None
    try:
        import openvino
    finally:
        if absent:
            del sys.modules[converter]
    return openvino.Core()


def _property(name: str) -> Any:
    return core().get_property(DEVICE, name)


def _cache_of(bundle: Path) -> Path:
    """Where compiled models of this version and processor are kept."""
    processor = re.sub(r"[^A-Za-z0-9.]+", "-", str(_property("FULL_DEVICE_NAME"))).strip("-")
    return bundle / CACHE / f"openvino-{metadata.version('openvino')}-{processor}"
