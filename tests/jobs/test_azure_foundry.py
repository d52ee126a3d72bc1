"""Fine-tuning jobs for Azure AI Foundry, and what it does not serve any more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgetune.cli.failures import exit_code_of
from edgetune.config import FoundryConfig
from edgetune.errors import IncompatibleError, UsageError
from edgetune.jobs.azure_foundry import JOB, foundry_job
from edgetune.jobs.phi_models import RETIRED, SERVED

CONFIG = FoundryConfig()


def test_hyperparameters_are_texts_and_the_rate_has_no_exponent() -> None:
    job = foundry_job(replace(CONFIG, learning_rate=2e-5), with_valid=True).files[JOB]
    expected = {"num_train_epochs": "3", "per_device_train_batch_size": "4", "learning_rate": "0.00002"}
    assert job["hyperparameters"] == expected
    assert "compute" not in job and "resources" not in job
    own = foundry_job(replace(CONFIG, instance_type="Standard_NC96ads_A100_v4"), with_valid=True).files[JOB]
    assert own["resources"] == {"instance_types": ["Standard_NC96ads_A100_v4"]}


@pytest.mark.parametrize("model", RETIRED)
def test_a_retired_model_says_what_replaces_it(model: str) -> None:
    with pytest.raises(IncompatibleError, match=f"30 August 2025; give --model {RETIRED[model]}"):
        foundry_job(replace(CONFIG, model=model), with_valid=True)
    assert RETIRED[model] in SERVED
    assert exit_code_of(IncompatibleError) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "Phi-9"}, "--model Phi-9: Azure AI Foundry fine-tunes Phi-4-mini-instruct"),
        ({"compute": "a", "instance_type": "b"}, "exclude each other"),
        ({"epochs": 1.5}, "epochs is 1.5, expected a whole number"),
        ({"model_version": 0}, "model_version is 0"),
    ],
)
def test_what_azure_would_refuse_is_refused_at_once(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        foundry_job(replace(CONFIG, **changed), with_valid=True)


def test_rows_to_measure_on_are_needed() -> None:
    with pytest.raises(UsageError, match="no --valid"):
        foundry_job(CONFIG, with_valid=False)
