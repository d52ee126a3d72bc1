"""The session that a choice of runtime and plan means, by the method of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgetune.formats.bundle import Bundle
from edgetune.model.lora import Parameters
from edgetune.planning.choice import Choice
from edgetune.runtimes.contract import OptimizerConfig, Session
from edgetune.runtimes.forward_only import ForwardOnlySession, QueryConfig


@contextmanager
def open_trainer(
    bundle: Bundle, parameters: Parameters, choice: Choice, optimizer: OptimizerConfig, queries: QueryConfig | None
) -> Iterator[Session]:
    """Load what the choice runs, and start from `parameters`.

    Args:
        bundle: What is trained.
        parameters: First values of the LoRA parameters; the session has its own copies.
        choice: Runtime and plan.
        optimizer: Of the steps.
        queries: How the gradient is estimated; none where a backward pass computes it.
    """
    if queries is not None:
        if (open_forward := choice.runtime.open_forward) is None:
            raise ValueError(f"{choice.name} was chosen for forward-only training and has no forward pass")
        with open_forward(bundle, parameters, choice.plan) as forward:
            yield ForwardOnlySession(forward, parameters, optimizer, queries)
    else:
        with choice.runtime.open_session(bundle, parameters, optimizer, choice.plan) as session:
            yield session
