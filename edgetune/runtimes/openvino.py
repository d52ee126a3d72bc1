"""OpenVINO: the layered form on its CPU device, in bfloat16 where the processor has that."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgetune.bundle import Bundle
from edgetune.errors import MissingDependencyError, UsageError
from edgetune.execution import WHOLE_STEP, ExecutionPlan
from edgetune.footprint import Footprint
from edgetune.runtimes import Abilities, Forward, OptimizerConfig, Parameters, Session
from edgetune.runtimes.layered.channels import Channels, groups_of

if TYPE_CHECKING:
    from edgetune.runtimes.layered.openvino import OpenVinoBackend

DEVICE = "CPU"
CACHE = ".cache"
"""Folder in a bundle for compiled models. It is not part of the bundle, and can be deleted at any time."""
_MOST_CACHED = 64 << 20
"""Bytes of compiled models that are kept, the youngest ones."""
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
    forward=0.25,
    backward=40_000_000,
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
    exact, int8 = (_BF16, _INT8) if short else (_FP32, None)
    return Abilities(whole=False, exact=exact, int8=int8, preferred=short, forward=True)


def version() -> str:
    """See `edgetune.runtimes.Runtime.version`."""
    return f"openvino {metadata.version('openvino')}"


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan = WHOLE_STEP
) -> Iterator[Session]:
    """Load what the plan runs; see `edgetune.runtimes.Runtime`.

    Raises:
        MissingDependencyError: The package `openvino` is not installed.
        UsageError: The plan is the whole step.
    """
    backend = _backend(bundle, plan)
    from edgetune.runtimes.layered.session import LayeredSession

    yield LayeredSession(bundle, parameters, optimizer, plan, backend)


@contextmanager
def open_forward(bundle: Bundle, parameters: Parameters, plan: ExecutionPlan) -> Iterator[Forward]:
    """Load what the plan's forward pass runs; see `edgetune.runtimes.Runtime`.

    Raises:
        MissingDependencyError: The package `openvino` is not installed.
        UsageError: The plan is the whole step.
    """
    backend = _backend(bundle, plan)
    from edgetune.runtimes.layered.parameters import FlatParameters
    from edgetune.runtimes.layered.session import LayeredForward, in_order_of

    yield LayeredForward(bundle, FlatParameters(in_order_of(backend, parameters)), plan, backend)


def _backend(bundle: Bundle, plan: ExecutionPlan) -> OpenVinoBackend:
    if plan.form == "whole":
        raise UsageError("the openvino runtime does not execute --plan whole; use --runtime onnxruntime")
    core()
    from edgetune.runtimes.layered.openvino import OpenVinoBackend

    # What is unpacked once and for all is put right.
    order = Channels(None if plan.resident else groups_of(bundle.manifest))
    return OpenVinoBackend(DEVICE, _cache_of(bundle.path), plan, order)


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


def _cache_of(bundle: Path) -> Path | None:
    """Where compiled models of this version and processor are kept; none where nothing can be written."""
    processor = re.sub(r"[^A-Za-z0-9.]+", "-", str(_property("FULL_DEVICE_NAME"))).strip("-")
    folder = bundle / CACHE / f"openvino-{metadata.version('openvino')}-{processor}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_old(folder)
    except OSError:
        return None
    return folder


def _drop_old(folder: Path) -> None:
    files = sorted(((path, path.stat()) for path in folder.iterdir()), key=lambda each: -each[1].st_mtime)
    total = 0
    for path, status in files:
        total += status.st_size
        if total > _MOST_CACHED:
            with suppress(OSError):
                path.unlink()
