"""The session that a choice of runtime and plan means, by the method of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from edgetune.config import TrainConfig
from edgetune.formats.bundle import Bundle
from edgetune.model.lora import Parameters
from edgetune.planning.choice import Choice
from edgetune.runtimes.contract import ForwardRuntime, OptimizerConfig, Session
from edgetune.runtimes.forward_only import ForwardOnlySession, QueryConfig


@contextmanager
def open_trainer(bundle: Bundle, parameters: Parameters, config: TrainConfig, choice: Choice) -> Iterator[Session]:
    """Load what the choice runs, and start from `parameters`.

    Args:
        bundle: What is trained.
        parameters: First values of the LoRA parameters; the session has its own copies.
        config: How to train.
        choice: Runtime and plan.
    """
    optimizer = OptimizerConfig(config.weight_decay, config.max_grad_norm)
    if choice.plan.forward_only:
        with cast(ForwardRuntime, choice.runtime).open_forward(bundle, parameters, choice.plan) as forward:
            queries = QueryConfig(config.queries, config.perturbation_size, config.seed)
            yield ForwardOnlySession(forward, parameters, optimizer, queries)
    else:
        with choice.runtime.open_session(bundle, parameters, optimizer, choice.plan) as session:
            yield session
