"""Kaito: a tuning Workspace on Kubernetes, and the ConfigMap with its settings, as Kaito 0.12 takes them.

The workspace's schema is the CRD's; the rules beyond it are those of Kaito's admission webhook, which speaks only on
the cluster. JSON is YAML to kubectl.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

from edgetune.config import MODULES_OF_TARGETS, KaitoConfig, check_config
from edgetune.jobs.folder import TRAIN, Job, refuse
from edgetune.jobs.names import kubernetes_name_problems

WORKSPACE, CONFIG_MAP = "workspace.json", "configmap.json"
_RESULTS = "/mnt/results"


def kaito_job(config: KaitoConfig) -> Job:
    """The job.

    Args:
        config: Preset, place of the rows and of the result, and schedule.

    Raises:
        UsageError: Naming all that Kaito's webhook would refuse.
    """
    check_config(config)
    refuse(_problems(config))
    tuning: dict[str, Any] = {
        "preset": {"name": config.preset},
        "method": config.method,
        "config": f"{config.name}-tuning",
        "input": _input(config),
        "output": _output(config),
    }
    workspace = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": config.name},
        "resource": {
            "instanceType": config.instance_type,
            "labelSelector": {"matchLabels": {"app": config.name}},
        },
        "tuning": tuning,
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{config.name}-tuning"},
        "data": {"training_config.yaml": json.dumps({"training_config": _training(config)}, indent=2)},
    }
    fetch = (
        f"    skopeo copy docker://{config.output_image} oci:fetched"
        if config.output_image is not None
        else f"    kubectl cp POD:{_RESULTS} fetched     # a pod that mounts the claim {config.output_claim}"
    )
    where = {
        "input_claim": f"copy `{TRAIN}` into the claim `{config.input_claim}`",
        "input_url": f"serve `{TRAIN}` at `{config.input_url}`",
        "input_image": f"put `{TRAIN}` under `/data` of the image `{config.input_image}`",
    }
    first = next(text for option, text in where.items() if getattr(config, option) is not None)
    readme = _README.format(name=config.name, preset=config.preset, first=first, fetch=fetch)
    return Job({WORKSPACE: workspace, CONFIG_MAP: config_map}, readme)


def _training(config: KaitoConfig) -> dict[str, Any]:
    quantised = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    return {
        "ModelConfig": {"torch_dtype": "bfloat16", "local_files_only": True, "device_map": "auto"},
        **({"QuantizationConfig": quantised} if config.method == "qlora" else {}),
        "LoraConfig": {
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": 0.0,
            # Kaito's own names are those of Llama, of which Phi-3 has two of four.
            "target_modules": list(MODULES_OF_TARGETS["all-linear"]),
        },
        "TrainingArguments": {
            "output_dir": _RESULTS,
            "save_strategy": "no",
            "num_train_epochs": config.epochs,
            "per_device_train_batch_size": config.batch_size,
            "learning_rate": config.learning_rate,
        },
        "DataCollator": {"mlm": False},
        "DatasetConfig": {"shuffle_dataset": True, "train_test_split": 1},
    }


def _input(config: KaitoConfig) -> dict[str, Any]:
    if config.input_url is not None:
        return {"urls": [config.input_url]}
    if config.input_image is not None:
        return {"image": config.input_image}
    return {"volumeSource": {"persistentVolumeClaim": {"claimName": config.input_claim}}}


def _output(config: KaitoConfig) -> dict[str, Any]:
    if config.output_image is not None:
        return {"image": config.output_image, "imagePushSecret": config.push_secret}
    return {"volumeSource": {"persistentVolumeClaim": {"claimName": config.output_claim}}}


def _problems(config: KaitoConfig) -> list[str]:
    problems = kubernetes_name_problems(
        {
            "--name": config.name,
            "--input-claim": config.input_claim,
            "--output-claim": config.output_claim,
            "--push-secret": config.push_secret,
        }
    )
    inputs = {"--input-claim": config.input_claim, "--input-url": config.input_url, "--input-image": config.input_image}
    outputs = {"--output-image": config.output_image, "--output-claim": config.output_claim}
    for what, given in (("rows come from", inputs), ("the adapter goes to", outputs)):
        names = [option for option, value in given.items() if value is not None]
        if len(names) != 1:
            found = f"{' and '.join(names)} are given" if names else "none is given"
            problems.append(f"Kaito takes exactly one place that {what}: {', '.join(given)}; {found}")
    if config.output_image is not None and config.push_secret is None:
        problems.append("--output-image needs --push-secret, the secret with which the image is pushed")
    if config.output_image is None and config.push_secret is not None:
        problems.append("--push-secret means nothing without --output-image")
    if config.input_url is not None:
        problems += _url_problems(config.input_url)
    return problems


def _url_problems(url: str) -> list[str]:
    """What of an address Kaito would refuse: it reads from no private network, and knows JSON by the name."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        return [f"--input-url {url!r:.80}: is no address ({error})"]
    problems = []
    if parts.scheme not in ("http", "https") or not host:
        problems.append(f"--input-url {url!r:.80}: Kaito takes http and https")
    elif host == "localhost" or _is_private(host):
        problems.append(f"--input-url {url!r:.80}: Kaito takes no private address")
    if "json" not in parts.path.rpartition("/")[2]:
        problems.append(f"--input-url {url!r:.80}: the file's name must have json in it, by which Kaito knows its form")
    return problems


def _is_private(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


_README = """# {name}: tuning {preset} with Kaito

First {first}. Then:

    kubectl apply -f configmap.json -f workspace.json
    kubectl get workspace {name} --watch

When it is done, fetch the adapter and import it. Kaito trains prompts as well as answers, so that its losses are not
those of `edgetune train`:

{fetch}
    edgetune import fetched --bundle bundle --output adapter
"""
