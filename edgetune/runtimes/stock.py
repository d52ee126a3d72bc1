"""Stock ONNX Runtime on the CPU: the whole step as one graph, or layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnxruntime as ort

from edgetune.bundle import Bundle
from edgetune.execution import WHOLE_STEP, ExecutionPlan
from edgetune.runtimes import OptimizerConfig, Parameters, Session
from edgetune.runtimes.layered.onnxruntime import OrtBackend
from edgetune.runtimes.layered.session import LayeredSession
from edgetune.runtimes.portable import PortableSession


def version() -> str:
    """See `edgetune.runtimes.Runtime.version`."""
    return f"onnxruntime {ort.__version__}"


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan = WHOLE_STEP
) -> Iterator[Session]:
    """Load what the plan runs; see `edgetune.runtimes.Runtime`."""
    if plan.form == "whole":
        yield PortableSession(bundle, parameters, optimizer)
    else:
        yield LayeredSession(bundle, parameters, optimizer, plan, OrtBackend(bundle))
