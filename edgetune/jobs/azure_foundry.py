"""Azure AI Foundry: a fine-tuning job of a model that it serves, without compute of one's own or on one's own.

The form is azure-ai-ml 1.35.2's `type: finetuning`; the names of hyperparameters are those of Azure's samples, since
neither its library nor its command line checks them.
"""

from __future__ import annotations

from typing import Any

from edgetune.config import FoundryConfig, check_config
from edgetune.jobs.folder import TRAIN, VALID, Job, refuse
from edgetune.jobs.names import azure_name_problems
from edgetune.jobs.phi_models import require_served

JOB = "job.json"
_MODEL = "azureml://registries/azureml/models/{}/versions/{}"


def foundry_job(config: FoundryConfig, *, with_valid: bool) -> Job:
    """The job.

    Args:
        config: Model, compute and schedule.
        with_valid: Whether there are rows to measure on.

    Raises:
        UsageError: Naming all that Azure would refuse.
        IncompatibleError: The model was retired.
    """
    check_config(config)
    require_served(config.model)
    problems = azure_name_problems(config.name, config.compute)
    if not with_valid:
        problems.append("no --valid: a fine-tuning job needs rows to measure on, of which its library says nothing")
    if config.compute is not None and config.instance_type is not None:
        problems.append(
            f"--compute {config.compute} and --instance-type {config.instance_type} exclude each other; give one"
        )
    refuse(problems)
    job: dict[str, Any] = {
        "type": "finetuning",
        "name": config.name,
        "experiment_name": config.name,
        "display_name": config.name,
        "task": "chat_completion",
        "model_provider": "custom",
        "model": {"type": "mlflow_model", "path": _MODEL.format(config.model, config.model_version)},
        "training_data": {"type": "uri_file", "path": f"./{TRAIN}"},
        "validation_data": {"type": "uri_file", "path": f"./{VALID}"},
        # The service takes texts.
        "hyperparameters": {
            "num_train_epochs": f"{config.epochs}",
            "per_device_train_batch_size": f"{config.batch_size}",
            "learning_rate": f"{config.learning_rate:.10f}".rstrip("0"),
        },
        "outputs": {"registered_model": {"type": "mlflow_model", "name": config.name}},
    }
    if config.compute is not None:
        job["compute"] = config.compute
    if config.instance_type is not None:
        job["resources"] = {"instance_types": [config.instance_type]}
    return Job({JOB: job}, _README.format(name=config.name, model=config.model))


_README = """# {name}: a fine-tuning job for Azure AI Foundry

It fine-tunes `{model}` and registers the result under the name `{name}`.

    az ml job create --file job.json --resource-group GROUP --workspace-name PROJECT

What Foundry registers of a serverless job is deployed there; whether its weights can be downloaded is not documented.
On compute of one's own the output can be fetched and imported, as from Azure Machine Learning:

    az ml job download --name {name} --all --download-path fetched --resource-group GROUP --workspace-name PROJECT
    edgetune import fetched --bundle bundle --output adapter
"""
