"""Workspaces for Kaito: held to its CRD, and to the rules of its webhook."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml

from edgetune.config import KaitoConfig
from edgetune.errors import UsageError
from edgetune.jobs.kaito import CONFIG_MAP, WORKSPACE, kaito_job
from support.shared_material import shared_material

CONFIG = KaitoConfig(input_claim="rows", output_claim="adapters")
PUSHED = KaitoConfig(input_url="https://example.com/train.jsonl", output_image="lamp:1", push_secret="registry")


@pytest.fixture(scope="module")
def problems() -> Callable[[dict[str, Any]], list[str]]:
    """What Kaito's CRD does not take of a workspace, where unknown keys are errors as well."""
    jsonschema = pytest.importorskip("jsonschema")
    crd = yaml.safe_load((shared_material() / "real/platforms/kaito.sh_workspaces.yaml").read_text())
    (version,) = (each for each in crd["spec"]["versions"] if each["name"] == "v1beta1" and each["served"])
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # which the API server knows itself
    return lambda workspace: [each.message for each in jsonschema.Draft202012Validator(schema).iter_errors(workspace)]


def strict(schema: Any) -> Any:
    """A schema that takes no property that it does not name."""
    schema = copy.deepcopy(schema)
    stack = [schema]
    while stack:
        here = stack.pop()
        if isinstance(here, dict):
            if "properties" in here and not here.get("x-kubernetes-preserve-unknown-fields"):
                here.setdefault("additionalProperties", False)
            stack += here.values()
        elif isinstance(here, list):
            stack += here
    return schema


@pytest.mark.parametrize("config", [CONFIG, PUSHED], ids=["claims", "image"])
def test_the_crd_takes_the_workspace(config: KaitoConfig, problems: Callable[[dict[str, Any]], list[str]]) -> None:
    workspace = dict(kaito_job(config).files[WORKSPACE])
    assert problems(workspace) == []
    assert problems({**workspace, "tunning": {}})
    assert problems({**workspace, "tuning": {**workspace["tuning"], "method": 4}})


def test_all_projections_are_trained_and_only_qlora_quantises() -> None:
    for method, quantised in (("qlora", True), ("lora", False)):
        files = kaito_job(replace(CONFIG, method=method)).files
        config = json.loads(files[CONFIG_MAP]["data"]["training_config.yaml"])["training_config"]
        assert config == yaml.safe_load(files[CONFIG_MAP]["data"]["training_config.yaml"])["training_config"]
        assert config["LoraConfig"]["target_modules"] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        assert ("QuantizationConfig" in config) is quantised
        assert files[WORKSPACE]["tuning"]["config"] == files[CONFIG_MAP]["metadata"]["name"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "Lamp"}, "--name 'Lamp': Kubernetes takes lower-case"),
        ({"name": "a" * 64}, "63 at most"),
        ({"input_claim": "my_rows"}, "--input-claim 'my_rows'"),
        ({"input_claim": None}, "exactly one place that rows come from: .*; none is given"),
        ({"input_image": "a"}, "--input-claim and --input-image are given"),
        ({"output_claim": None}, "exactly one place that the adapter goes to"),
        ({"output_image": "a"}, "--output-image needs --push-secret"),
        ({"push_secret": "a"}, "--push-secret means nothing without --output-image"),
        ({"preset": "phi-3-small"}, "preset is 'phi-3-small', expected one of phi-3-mini-4k-instruct"),
        ({"method": "dora"}, "method is 'dora', expected one of lora, qlora"),
        ({"rank": 0}, "rank is 0, expected 1 at least"),
        ({"input_claim": None, "input_url": "ftp://example.com/a.jsonl"}, "Kaito takes http and https"),
        ({"input_claim": None, "input_url": "http://10.1.2.3/a.jsonl"}, "Kaito takes no private address"),
        ({"input_claim": None, "input_url": "http://localhost/a.jsonl"}, "Kaito takes no private address"),
        ({"input_claim": None, "input_url": "http://[::1"}, "is no address"),
        ({"input_claim": None, "input_url": "https://example.com/rows"}, "must have json in it"),
    ],
)
def test_what_kaito_would_refuse_is_refused_at_once(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kaito_job(replace(CONFIG, **changed))
