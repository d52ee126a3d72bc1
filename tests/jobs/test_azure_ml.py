"""Jobs for Azure Machine Learning: the inputs of its component by their own types, and what it would refuse later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from edgetune.config import AzureMlConfig
from edgetune.errors import UsageError
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.jobs.azure_ml import JOB, azure_ml_job
from support.golden import BUNDLE
from support.shared_material import shared_material

CONFIG = AzureMlConfig(gpus=4, nodes=2, sharding="zero3", batch_size=8, epochs=2.0)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(BUNDLE)


@pytest.fixture(scope="module")
def component() -> dict[str, Any]:
    """Azure's own description of it."""
    path = shared_material() / "real" / "platforms" / "chat_completion_pipeline.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def test_a_command_trains_the_bundle_with_a_process_for_each_gpu(bundle: Bundle) -> None:
    made = azure_ml_job(bundle, CONFIG, with_valid=True)
    job = made.files[JOB]
    assert job["environment"] == {"build": {"path": "./environment", "dockerfile_path": "Dockerfile"}}
    assert made.dockerfile is not None and "[deepspeed]" in made.dockerfile
    assert job["distribution"] == {"type": "pytorch", "process_count_per_instance": 4}
    assert job["resources"]["instance_count"] == 2
    for name in ("inputs.bundle", "inputs.train", "inputs.valid", "outputs.adapter"):
        assert f"${{{{{name}}}}}" in job["command"]
    assert "--runtime torch --sharding zero3 --epochs 2 --batch-size 8 --learning-rate 0.0002" in job["command"]
    assert "inputs.valid" not in azure_ml_job(bundle, CONFIG, with_valid=False).files[JOB]["command"]


def test_the_pipeline_has_inputs_of_the_components_types(bundle: Bundle, component: dict[str, Any]) -> None:
    job = azure_ml_job(bundle, replace(CONFIG, pipeline=True), with_valid=True).files[JOB]
    (step,) = job["jobs"].values()
    assert set(step["outputs"]) <= set(component["outputs"])
    for name, value in step["inputs"].items():
        known = component["inputs"][name]
        kinds = {"string": str, "integer": int, "number": (int, float)}
        if isinstance(value, dict):
            assert value["type"] == known["type"], name
            continue
        assert isinstance(value, kinds[known["type"]]), name
        assert value in known.get("enum", [value]), name
        assert value >= known.get("min", value), name
    assert (step["inputs"]["lora_r"], step["inputs"]["merge_lora_weights"]) == (bundle.manifest.lora.rank, "false")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "-x"}, "--name '-x': Azure Machine Learning takes letters"),
        ({"name": "a b"}, "--name 'a b': Azure"),
        ({"compute": "my cluster"}, "--compute 'my cluster': expected the name of a cluster"),
        ({"sharding": "none"}, "--sharding none is for one process, and --gpus and --nodes ask for 8"),
        ({"batch_size": 7}, "--batch-size 7 has fewer rows than there are processes, 8"),
        ({"gpus": 0}, "gpus is 0, expected 1 to 64"),
        ({"learning_rate": 2.0}, "learning_rate is 2.0, expected"),
        ({"pipeline": True, "sharding": "fsdp2"}, "deepspeed_stage takes 2 and 3"),
        ({"pipeline": True, "epochs": 1.5}, "num_train_epochs takes whole numbers"),
    ],
)
def test_what_azure_would_refuse_is_refused_at_once(bundle: Bundle, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        azure_ml_job(bundle, replace(CONFIG, **changed), with_valid=True)


@pytest.mark.parametrize(
    "lora", [{"alpha": 8.5}, {"rank_stabilised": True}, {"dora": True}, {"rank_pattern": {"o_proj": 2}}], ids=str
)
def test_the_pipeline_trains_one_rank_and_no_more(bundle: Bundle, lora: dict[str, Any]) -> None:
    other = replace(bundle, manifest=replace(bundle.manifest, lora=replace(bundle.manifest.lora, **lora)))
    with pytest.raises(UsageError, match="the component"):
        azure_ml_job(other, replace(CONFIG, pipeline=True), with_valid=True)
    assert azure_ml_job(other, CONFIG, with_valid=True)
