"""Stock ONNX Runtime on the CPU: the whole step as one graph, or layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import onnxruntime as ort

from edgetune.formats.bundle import Bundle
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import Abilities, Forward, OptimizerConfig, Runtime, Session
from edgetune.runtimes.execution import ExecutionPlan, WholePlan
from edgetune.runtimes.footprint import Footprint
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend
from edgetune.runtimes.layered.parameters import FlatParameters
from edgetune.runtimes.layered.session import LayeredForward, LayeredSession
from edgetune.runtimes.whole.session import CpuGraphs, PortableForward, PortableSession

_FP32 = Footprint(
    precision="fp32",
    storage_bytes=4,
    base_bytes=95_000_000,
    attention_state_bytes=48.6,
    attention_score_bytes=11.6,
    kept_score_bytes=8.6,
    mlp_state_bytes=15.0,
    hidden_state_bytes=11.0,
    graph_weight_bytes=0.0,
    logit_bytes=8.4,
    together=False,
    apart_share=0.4,
    shapes_held=1,
    shape_bytes=0,
    cache_bytes=0,
    weight_bytes=4.0,
    forward_share=0.84,
    backward_bytes=14_000_000,
    dequantise_products=90.0,
)
_INT8 = replace(_FP32, precision="int8", weight_bytes=2.0, dequantise_products=400.0)


def abilities() -> Abilities:
    """See `edgetune.runtimes.contract.Runtime`."""
    return Abilities(whole=True, exact=_FP32, int8=_INT8, preferred=True)


def version() -> str:
    """See `edgetune.runtimes.contract.Runtime`."""
    return f"onnxruntime {ort.__version__}"


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan
) -> Iterator[Session]:
    """Load what the plan runs; see `edgetune.runtimes.contract.Runtime`."""
    if isinstance(plan, WholePlan):
        yield PortableSession(bundle, parameters, optimizer, CpuGraphs(bundle))
    else:
        backend = OrtBackend(bundle, plan.precision)
        with closing(LayeredSession(bundle, parameters, optimizer, plan, backend)) as session:
            yield session


@contextmanager
def open_forward(bundle: Bundle, parameters: Parameters, plan: ExecutionPlan) -> Iterator[Forward]:
    """Load what the plan's forward pass runs; see `edgetune.runtimes.contract.Runtime`."""
    if isinstance(plan, WholePlan):
        yield PortableForward(parameters, CpuGraphs(bundle))
    else:
        backend = OrtBackend(bundle, plan.precision)
        with closing(LayeredForward(bundle, FlatParameters(parameters), plan, backend)) as forward:
            yield forward


RUNTIME = Runtime(abilities, version, open_session, open_forward)
