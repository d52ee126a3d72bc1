"""OpenVINO: the layered form on its CPU device, in bfloat16 where the processor has that; or the whole step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING

from edgetune.errors import IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.formats.roles import LOSS, STEP, roles_in_half
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import Abilities, Forward, OptimizerConfig, Runtime, Session
from edgetune.runtimes.execution import Accelerator, ExecutionPlan, LayeredPlan, WholePlan
from edgetune.runtimes.footprint import Footprint
from edgetune.runtimes.layered.channels import Channels, groups_of
from edgetune.runtimes.openvino_core import DEVICE, MOST_SHAPES, core, has_bfloat16, require_package
from edgetune.runtimes.placement import Placement
from edgetune.runtimes.verified_cache import CACHE, MOST_BYTES, VerifiedFolder

if TYPE_CHECKING:
    from edgetune.runtimes.layered.openvino.backend import OpenVinoBackend
    from edgetune.runtimes.whole.compiled import AcceleratorGraphs
    from edgetune.runtimes.whole.openvino_compiler import OpenVinoCompiler

_BF16 = Footprint(
    precision="bf16",
    storage_bytes=2,
    base_bytes=127_000_000,
    attention_state_bytes=0.0,
    attention_score_bytes=7.6,
    kept_score_bytes=6.1,
    mlp_state_bytes=30.7,
    hidden_state_bytes=18.2,
    graph_weight_bytes=1.5,
    logit_bytes=11.5,
    together=True,
    apart_share=0.0,
    shapes_held=MOST_SHAPES,
    shape_bytes=36_200_000,
    cache_bytes=MOST_BYTES,
    weight_bytes=2.0,
    forward_share=0.34,
    backward_bytes=31_300_000,
    dequantise_products=90.0,
)
_FP32 = replace(
    _BF16,
    precision="fp32",
    storage_bytes=4,
    attention_score_bytes=15.2,
    kept_score_bytes=12.2,
    mlp_state_bytes=61.4,
    hidden_state_bytes=36.4,
    graph_weight_bytes=3.0,
    logit_bytes=15.0,
    weight_bytes=4.0,
    dequantise_products=30.0,
)
"""Twice the other's: not measured."""
_INT8 = replace(
    _BF16,
    precision="int8",
    base_bytes=128_400_000,
    attention_score_bytes=7.9,
    kept_score_bytes=5.9,
    mlp_state_bytes=30.6,
    hidden_state_bytes=18.6,
    graph_weight_bytes=1.3,
    logit_bytes=10.7,
    shape_bytes=48_900_000,
    weight_bytes=1.0,
    backward_bytes=28_500_000,
)


def abilities() -> Abilities:
    """See `edgetune.runtimes.contract.Runtime`.

    Raises:
        MissingDependencyError: The package `openvino` is not installed.
    """
    require_package()
    short = has_bfloat16()
    # Without bfloat16 there is nothing in which it is ahead of stock ONNX Runtime.
    exact, int8 = (_BF16, _INT8) if short else (_FP32, None)
    return Abilities(whole=False, exact=exact, int8=int8, preferred=short)


def version() -> str:
    """See `edgetune.runtimes.contract.Runtime`."""
    return f"openvino {metadata.version('openvino')}"


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan
) -> Iterator[Session]:
    """Load what the plan runs; see `edgetune.runtimes.contract.Runtime`.

    Raises:
        IncompatibleError: The device for the whole step is not there.
        MissingDependencyError: The package `openvino` is not installed.
    """
    if isinstance(plan, WholePlan):
        from edgetune.runtimes.whole.compiled import AcceleratorSession

        yield AcceleratorSession(bundle, parameters, optimizer, _graphs(bundle, plan))
        return
    from edgetune.runtimes.layered.session import LayeredSession

    with (
        _backend(bundle, plan) as backend,
        closing(LayeredSession(bundle, parameters, optimizer, plan, backend)) as session,
    ):
        yield session


@contextmanager
def open_forward(bundle: Bundle, parameters: Parameters, plan: ExecutionPlan) -> Iterator[Forward]:
    """Load what the plan's forward pass runs; see `edgetune.runtimes.contract.Runtime`.

    Raises:
        IncompatibleError: The device for the whole pass is not there.
        MissingDependencyError: The package `openvino` is not installed.
    """
    if isinstance(plan, WholePlan):
        from edgetune.runtimes.whole.compiled import AcceleratorForward

        yield AcceleratorForward(parameters, _graphs(bundle, plan))
        return
    from edgetune.runtimes.layered.parameters import FlatParameters
    from edgetune.runtimes.layered.session import LayeredForward, in_order_of

    with _backend(bundle, plan) as backend:
        ordered = FlatParameters(in_order_of(backend, parameters))
        with closing(LayeredForward(bundle, ordered, plan, backend)) as forward:
            yield forward


def place(bundle: Bundle, plan: WholePlan, batch: int, length: int) -> list[Placement]:
    """See `edgetune.runtimes.contract.Runtime`."""
    compiler = _compiler(bundle, plan)
    return [compiler.compile(role, batch, length).placement for role in _roles(bundle, plan)]


def has_device(kind: str) -> bool:
    """Whether OpenVINO finds a device of a kind, such as `NPU`.

    Raises:
        MissingDependencyError: The package `openvino` is not installed.
    """
    return any(name == kind or name.startswith(f"{kind}.") for name in core().available_devices)


def _graphs(bundle: Bundle, plan: WholePlan) -> AcceleratorGraphs:
    from edgetune.runtimes.whole.compiled import AcceleratorGraphs
    from edgetune.runtimes.whole.first_batch import HALF, FirstBatch

    compiler = _compiler(bundle, plan)
    first = FirstBatch(bundle, HALF) if _is_in_half(plan) else None
    return AcceleratorGraphs(compiler, *_roles(bundle, plan), first)


def _roles(bundle: Bundle, plan: WholePlan) -> tuple[str, str]:
    """The graphs with the loss and the gradients, and with the loss alone."""
    return roles_in_half(bundle.manifest) if _is_in_half(plan) else (STEP, LOSS)


def _is_in_half(plan: WholePlan) -> bool:
    """Whether the device computes in float16. Its CPU has float32's range, but for processors of Arm's."""
    device = _device(plan)
    return device != DEVICE or core().get_property(device, "INFERENCE_PRECISION_HINT").get_type_name() == "f16"


def _device(plan: WholePlan) -> str:
    asked = (plan.accelerator or Accelerator()).device_type
    return DEVICE if asked == "auto" else asked


def _compiler(bundle: Bundle, plan: WholePlan) -> OpenVinoCompiler:
    accelerator, device = plan.accelerator or Accelerator(), _device(plan)
    if not has_device(device):
        found = ", ".join(core().available_devices)
        raise IncompatibleError(
            f"OpenVINO finds no {device} here, only {found}; install its driver, or choose another --device-type"
        )
    if accelerator.require and device != "NPU":
        raise IncompatibleError(f"--require-npu asks for an NPU, and --device-type is {device}; give --device-type NPU")
    from edgetune.runtimes.whole.openvino_compiler import OpenVinoCompiler

    return OpenVinoCompiler(bundle, core(), device, metadata.version("openvino"))


@contextmanager
def _backend(bundle: Bundle, plan: LayeredPlan) -> Iterator[OpenVinoBackend]:
    shared = core()
    # Imports `openvino`, now that it keeps to itself.
    from edgetune.runtimes.layered.openvino.backend import OpenVinoBackend

    order = Channels(groups_of(bundle.manifest))
    # Where compiled models of this version and processor are kept.
    processor = re.sub(r"[^A-Za-z0-9.]+", "-", shared.get_property(DEVICE, "FULL_DEVICE_NAME")).strip("-")
    folder = bundle.path / CACHE / f"openvino-{metadata.version('openvino')}-{processor}"
    with VerifiedFolder(folder) as cache:
        yield OpenVinoBackend(shared, DEVICE, cache, plan, order)


RUNTIME = Runtime(abilities, version, open_session, open_forward, place, has_device)
