"""Azure Machine Learning: a command job that trains with edgetune's own torch runtime, or Azure's own pipeline.

The forms are those of azure-ai-ml 1.35.2 and of the registry's component `chat_completion_pipeline` 0.0.82. Azure
checks enumerations and types of the component only when the job runs.
"""

from __future__ import annotations

from typing import Any

from edgetune.config import AzureMlConfig, check_config
from edgetune.formats.bundle import Bundle
from edgetune.jobs.folder import DOCKERFILE, ENVIRONMENT, TRAIN, VALID, Job, refuse
from edgetune.jobs.names import azure_name_problems

JOB = "job.json"
_SCHEMA = "https://azuremlschemas.azureedge.net/latest/{}.schema.json"
_COMPONENT = "azureml://registries/azureml/components/chat_completion_pipeline/labels/latest"
_MODEL = "azureml://registries/azureml/models/{}/labels/latest"
_DOCKERFILE = """# PyTorch's wheels bring CUDA; the driver is the machine's.
FROM python:3.11
COPY edgetune-*.whl /wheels/
RUN pip install "$(ls /wheels/edgetune-*.whl)[deepspeed]"
"""
_STAGES = {"zero2": "2", "zero3": "3"}
"""What the component's `deepspeed_stage` takes."""
_PER_PROCESS = ("fsdp2", "ddp", "zero1", "zero2", "zero3", "zero3-offload")


def azure_ml_job(bundle: Bundle, config: AzureMlConfig, *, with_valid: bool) -> Job:
    """The job of a bundle.

    Args:
        bundle: What is trained; its folder is uploaded with the job.
        config: Compute and schedule.
        with_valid: Whether there are rows to measure on.

    Raises:
        UsageError: Naming all that Azure would refuse.
    """
    check_config(config)
    return _pipeline(bundle, config, with_valid) if config.pipeline else _command(bundle, config, with_valid)


def _command(bundle: Bundle, config: AzureMlConfig, with_valid: bool) -> Job:
    processes = config.gpus * config.nodes
    problems = azure_name_problems(config.name, config.compute)
    if config.sharding == "none" and processes > 1:
        problems.append(f"--sharding none is for one process, and --gpus and --nodes ask for {processes}")
    if config.batch_size < processes:
        problems.append(
            f"--batch-size {config.batch_size} has fewer rows than there are processes, {processes}; give at least that"
        )
    refuse(problems)
    words = [
        "python -m edgetune train ${{inputs.bundle}} --data ${{inputs.train}}",
        *(["--valid ${{inputs.valid}}"] if with_valid else []),
        f"--runtime torch --sharding {config.sharding} --epochs {config.epochs:g} --batch-size {config.batch_size}",
        f"--learning-rate {config.learning_rate:g} --output ${{{{outputs.adapter}}}}/adapter",
    ]
    job: dict[str, Any] = {
        "$schema": _SCHEMA.format("commandJob"),
        "type": "command",
        "display_name": config.name,
        "experiment_name": config.name,
        "command": " ".join(words),
        "inputs": {
            "bundle": {"type": "uri_folder", "path": str(bundle.path.absolute())},
            "train": {"type": "uri_file", "path": f"./{TRAIN}"},
            **({"valid": {"type": "uri_file", "path": f"./{VALID}"}} if with_valid else {}),
        },
        "outputs": {"adapter": {"type": "uri_folder"}},
        "environment": {"build": {"path": f"./{ENVIRONMENT}", "dockerfile_path": DOCKERFILE}},
        "compute": f"azureml:{config.compute}",
        # One process for each GPU, which find each other by the environment as under torchrun.
        "distribution": {"type": "pytorch", "process_count_per_instance": config.gpus},
        "resources": {"instance_count": config.nodes, "shm_size": "16g"},
    }
    readme = _README.format(
        name=config.name,
        what=f"`edgetune train --runtime torch --sharding {config.sharding}` in {processes} processes.\n\n"
        f"Its image is built of `{ENVIRONMENT}/`, which needs edgetune's wheel. In a checkout of edgetune:\n\n"
        f"    pip wheel --no-deps --wheel-dir JOB/{ENVIRONMENT} .",
        fetch="--output-name adapter --download-path fetched",
        then="`fetched/named-outputs/adapter/adapter` is an adapter of this bundle: nothing needs to be imported.\n\n"
        "    edgetune eval bundle --data valid.jsonl --adapter fetched/named-outputs/adapter/adapter",
    )
    return Job({JOB: job}, readme, _DOCKERFILE)


def _pipeline(bundle: Bundle, config: AzureMlConfig, with_valid: bool) -> Job:
    """Azure's own component, which the mission's sample runs; its adapter is imported."""
    problems = azure_name_problems(config.name, config.compute)
    if config.sharding not in ("auto", *_STAGES):
        problems.append(
            f"--sharding {config.sharding}: the component's deepspeed_stage takes 2 and 3; give zero2 or zero3, or "
            "leave --pipeline out"
        )
    if config.epochs != int(config.epochs):
        problems.append(f"--epochs {config.epochs:g}: the component's num_train_epochs takes whole numbers")
    lora = bundle.manifest.lora
    if lora.alpha != int(lora.alpha):
        problems.append(f"the bundle's alpha is {lora.alpha:g}, and the component's lora_alpha takes whole numbers")
    if lora.rank_pattern or lora.alpha_pattern or lora.rank_stabilised or lora.dora:
        problems.append(
            f"the bundle has {lora.in_words()}, and the component trains one rank and alpha, without rsLoRA and DoRA; "
            "leave --pipeline out"
        )
    refuse(problems)
    computes = {
        f"compute_{step}": config.compute for step in ("model_import", "preprocess", "finetune", "model_evaluation")
    }
    inputs: dict[str, Any] = {
        "mlflow_model_path": {"type": "mlflow_model", "path": _MODEL.format(config.model)},
        "train_file_path": {"type": "uri_file", "path": f"./{TRAIN}"},
        **({"validation_file_path": {"type": "uri_file", "path": f"./{VALID}"}} if with_valid else {}),
        "task_name": "ChatCompletion",
        "apply_lora": "true",
        # Otherwise what comes out is a merged model, and no adapter.
        "merge_lora_weights": "false",
        "lora_r": lora.rank,
        "lora_alpha": int(lora.alpha),
        "apply_deepspeed": "true",
        "deepspeed_stage": _STAGES.get(config.sharding, "2"),
        "number_of_gpu_to_use_finetuning": config.gpus,
        "num_nodes_finetune": config.nodes,
        "num_train_epochs": int(config.epochs),
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        **computes,
    }
    job = {
        "$schema": _SCHEMA.format("pipelineJob"),
        "type": "pipeline",
        "display_name": config.name,
        "experiment_name": config.name,
        "settings": {"default_compute": f"azureml:{config.compute}"},
        "outputs": {"checkpoint": {"type": "uri_folder"}},
        "jobs": {
            "fine_tune": {
                "type": "pipeline",
                "component": _COMPONENT,
                "inputs": inputs,
                "outputs": {"pytorch_model_folder": "${{parent.outputs.checkpoint}}"},
            }
        },
    }
    readme = _README.format(
        name=config.name,
        what=f"Azure's `chat_completion_pipeline` on `{config.model}` of its registry.",
        fetch="--output-name checkpoint --download-path fetched",
        then="The adapter lies in `peft_adapter_weights/` of the output; its base must be the bundle's checkpoint:\n\n"
        "    edgetune import fetched/named-outputs/checkpoint --bundle bundle --output adapter",
    )
    return Job({JOB: job}, readme)


_README = """# {name}: a job for Azure Machine Learning

It runs {what}

Submit it, with Azure's command line and its extension `ml`:

    az ml job create --file job.json --resource-group GROUP --workspace-name WORKSPACE

Fetch the result, when it is done, by the name that the first command printed:

    az ml job download --name NAME {fetch} --resource-group GROUP --workspace-name WORKSPACE

{then}
"""
