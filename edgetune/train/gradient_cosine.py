"""How well forward-only training estimates a gradient: its cosine with the exact one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.errors import UsageError
from edgetune.formats.bundle import Bundle
from edgetune.model.lora import Parameters
from edgetune.planning.choice import Choice
from edgetune.runtimes.contract import ForwardRuntime, OptimizerConfig
from edgetune.runtimes.forward_only import ForwardOnlySession, QueryConfig

_NO_CHANGE = OptimizerConfig(weight_decay=0.0, max_grad_norm=0.0)


@runtime_checkable
class Differentiated(Protocol):
    """A session that tells its gradients."""

    def gradients(self) -> Parameters:
        """The last step's gradients, before clipping."""
        ...


@dataclass(frozen=True)
class GradientCosine:
    """Of an estimated and the exact gradient of one step."""

    measured: float
    expected: float
    """Root mean square over all perturbations."""
    parameters: int
    """Those that are trained: the dimension of the gradient."""

    def __str__(self) -> str:
        """In one line; a single estimate is off by about one by the root of the dimension."""
        spread = 1 / math.sqrt(self.parameters)
        return (
            f"gradient cosine of a forward-only step with the exact gradient: {self.measured:.4f} "
            f"(expected {self.expected:.4f} ± {spread:.4f} for {self.parameters:,} parameters)"
        )


def expected_cosine(queries: int, parameters: int) -> float:
    """Of an estimate by random directions: √(n / (n + d)); the comparison with the other queries costs one of them."""
    return math.sqrt((queries - 1) / (queries - 1 + parameters))


def measure_gradient_cosine(
    bundle: Bundle,
    parameters: Parameters,
    batches: Sequence[Batch],
    config: QueryConfig,
    forward_only: Choice,
    exact: Choice,
) -> GradientCosine:
    """Estimate the gradient of a step by one choice of runtime and plan, and differentiate it by another.

    Args:
        bundle: What is trained.
        parameters: Where the gradients are taken; they are left alone.
        batches: The micro-batches of the step.
        config: How the gradient is estimated.
        forward_only: Executes the estimate.
        exact: Executes a step with a backward pass.

    Raises:
        UsageError: The runtime does not tell its gradients.
    """
    runtime = cast(ForwardRuntime, forward_only.runtime)
    with runtime.open_forward(bundle, parameters, forward_only.plan) as forward:
        estimate = ForwardOnlySession(forward, parameters, _NO_CHANGE, config).gradient(batches)
    with exact.runtime.open_session(bundle, parameters, _NO_CHANGE, exact.plan) as session:
        if not isinstance(session, Differentiated):
            raise UsageError(f"the {exact.name} runtime does not tell gradients; use --runtime onnxruntime")
        session.step(batches, 0.0)
        gradients = session.gradients()
    found, wanted = (_flat(each, list(estimate)) for each in (estimate, gradients))
    cosine = float(found @ wanted / (np.linalg.norm(found) * np.linalg.norm(wanted)))
    return GradientCosine(cosine, expected_cosine(config.queries, found.size), found.size)


def _flat(parameters: Parameters, names: Sequence[str]) -> NDArray[np.float64]:
    return np.concatenate([parameters[name].ravel() for name in names]).astype(np.float64)
