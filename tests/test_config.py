"""Values that a configuration cannot have are refused, whoever made it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.config import (
    ExportConfig,
    GenerateConfig,
    PrepareConfig,
    SplitConfig,
    TrainConfig,
    check_config,
)
from edgetune.errors import UsageError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(steps=1, epochs=1), "exclude each other"),
        (TrainConfig(steps=0), "steps is 0"),
        (TrainConfig(epochs=0.0), "epochs is 0.0"),
        (TrainConfig(epochs=float("inf")), "epochs is inf"),
        (TrainConfig(batch_size=0), "batch_size is 0"),
        (TrainConfig(gradient_accumulation_steps=-1), "gradient_accumulation_steps is -1"),
        (TrainConfig(queries=0), "^queries is 0, expected 2 to 1,000,000$"),
        (TrainConfig(learning_rate=0.0), "learning_rate is 0.0"),
        (TrainConfig(learning_rate=float("nan")), "learning_rate is nan"),
        (TrainConfig(warmup_steps=-1), "warmup_steps is -1"),
        (TrainConfig(weight_decay=-0.1), "weight_decay is -0.1"),
        (TrainConfig(max_grad_norm=float("inf")), "max_grad_norm is inf"),
        (TrainConfig(seed=-1), "seed is -1"),
        (TrainConfig(queries=10**20), "queries is 1"),
        (TrainConfig(learning_rate=1e300), r"learning_rate is 1e\+300, expected 1e-30 to 1,000, or auto$"),
        (TrainConfig(perturbation_size=1e-300), "perturbation_size is 1e-300"),
    ],
)
def test_impossible_options_are_refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_config(config)


def test_all_impossible_options_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)batch_size.*learning_rate"):
        check_config(TrainConfig(batch_size=0, learning_rate=-1.0, init_adapter=Path("x")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(plan="bogus"), "plan is 'bogus', expected one of auto, whole, keep, recompute, stream"),
        (TrainConfig(plan="int8"), "plan is 'int8', expected one of auto, .*; write precision='int8'"),
        (TrainConfig(packing="no"), "packing is 'no', expected True or False"),
        (TrainConfig(steps=True), "steps is True, expected a whole number"),
        (TrainConfig(batch_size=2.5), "batch_size is 2.5, expected a whole number"),
        (TrainConfig(learning_rate="1e-3"), "learning_rate is '1e-3', expected a number, or auto$"),
        (TrainConfig(memory_budget=10**9), "memory_budget is 1000000000, expected a text"),
        (TrainConfig(init_adapter="adapter"), "init_adapter is 'adapter', expected a Path"),
        (TrainConfig(runtime="cuda"), "runtime is 'cuda', expected one of auto"),
        (TrainConfig(seed=10**400), "seed is 1000"),
        (PrepareConfig(rank=0), "rank is 0, expected 1 at least"),
        (PrepareConfig(alpha=float("nan")), "alpha is nan"),
        (PrepareConfig(max_length=1), "max_length is 1, expected 2 at least"),
        (SplitConfig(calibration_rows=-1), "calibration_rows is -1, expected 1 at least"),
        (ExportConfig(least_kept=2), "least_kept is 2, expected 0 to 1"),
        (GenerateConfig(max_new_tokens=0), "max_new_tokens is 0, expected 1 at least"),
    ],
)  # type: ignore[arg-type]
def test_what_python_may_write_and_no_run_can_mean_is_refused(config: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_config(config)


def test_a_number_may_be_large_where_nothing_bounds_it() -> None:
    check_config(GenerateConfig(max_new_tokens=10**400))


@pytest.mark.parametrize("kind", [TrainConfig, PrepareConfig, SplitConfig, ExportConfig, GenerateConfig])
def test_the_defaults_can_be_meant(kind: type) -> None:
    check_config(kind())
