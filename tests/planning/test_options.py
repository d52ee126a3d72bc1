"""Options that mean nothing without another, or exclude each other, are refused and never ignored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.config import TrainConfig
from edgetune.errors import UsageError
from edgetune.planning.options import resolve
from support.golden import GOLDEN
from support.run_requests import ELSEWHERE


def check(config: TrainConfig) -> None:
    resolve(config, ELSEWHERE)


def plan(*options: object) -> Result:
    return CliRunner().invoke(main, ["plan", str(GOLDEN / "bundle"), *map(str, options)])


@pytest.mark.parametrize(
    ("option", "home", "message"),
    [
        ({"require_npu": True}, {"runtime": "qnn"}, "--require-npu means nothing without a runtime that compiles"),
        ({"buckets": "1x8"}, {"runtime": "openvino", "plan": "whole"}, "--buckets 1x8 means nothing without"),
        ({"device_type": "NPU"}, {"runtime": "qnn"}, "--device-type NPU means nothing without"),
        ({"soc_model": 69}, {"runtime": "qnn"}, "--soc-model 69 means nothing without --runtime qnn"),
        (
            {"lower_layers_cache": "1MB"},
            {"layers": "1"},
            "--lower-layers-cache 1MB means nothing without --layers or --trunk",
        ),
        ({"vitisai_config": Path("v.json")}, {"trunk": True}, "--vitisai-config v.json means nothing without"),
        ({"queries": 4}, {"method": "forward-only"}, "--queries 4 means nothing without --method forward-only"),
        ({"perturbation_size": 0.1}, {"method": "forward-only"}, "--perturbation-size 0.1 means nothing without"),
    ],
)
def test_an_option_is_refused_away_from_home(option: dict[str, Any], home: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(TrainConfig(**option))
    check(TrainConfig(**option, **home))


def test_an_emulated_fpga_takes_no_configuration_of_vitis() -> None:
    config = TrainConfig("fpga-hls", trunk=True, vitisai_config=Path("v.json"))
    with pytest.raises(UsageError, match="on another runtime than fpga-hls"):
        check(config)


def test_openvino_needs_to_be_told_which_npu_is_required() -> None:
    whole = TrainConfig("openvino", plan="whole", require_npu=True)
    with pytest.raises(UsageError, match="--require-npu means nothing on OpenVINO's CPU; give --device-type NPU"):
        check(whole)
    check(replace(whole, device_type="NPU"))


def test_all_that_does_not_go_together_is_said_at_once() -> None:
    with pytest.raises(UsageError, match=r"(?s)--soc-model 69.*--lower-layers-cache 1MB.*takes no --memory-budget"):
        check(TrainConfig(plan="whole", soc_model=69, lower_layers_cache="1MB", memory_budget="1GB"))


@pytest.mark.parametrize(
    "options",
    [
        {"plan": "whole"},
        {"runtime": "ort-training"},
        {"runtime": "qnn"},
        {"runtime": "openvino-ep"},
        {"runtime": "openvino", "plan": "whole"},
        {"method": "forward-only"},
    ],
    ids=str,
)
def test_states_in_8_bits_are_of_the_layered_form(options: dict[str, Any]) -> None:
    """Elsewhere they are in 32 bits, or there are none."""
    with pytest.raises(UsageError, match=r"--optimizer-states 8bit .*or --optimizer-states out|8bit .*leave it out"):
        check(TrainConfig(**options, optimizer_states="8bit"))
    if "method" in options:
        with pytest.raises(UsageError, match=r"--optimizer-states 32bit is for AdamW's moments, and .* has none"):
            check(TrainConfig(**options, optimizer_states="32bit"))
    else:
        check(TrainConfig(**options, optimizer_states="32bit"))


@pytest.mark.parametrize("device", [(), ("--device", "raspberry-pi-5")], ids=["here", "elsewhere"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "forward-only", "--plan", "keep"), "--plan keep says what a backward pass needs"),
        (("--plan", "whole", "--memory-budget", "10MB"), "takes no --memory-budget"),
        (("--queries", "4"), "--queries 4 means nothing without --method forward-only"),
    ],
)
def test_plan_refuses_what_train_refuses(options: tuple[str, ...], message: str, device: tuple[str, ...]) -> None:
    refused = plan(*options, *device)
    assert refused.exit_code == 2 and message in refused.output


@pytest.mark.parametrize(
    "option", [("--buckets", "1x8"), ("--device-type", "NPU"), ("--soc-model", "69"), ("--require-npu",)]
)
def test_inspect_takes_options_of_placement_with_it_alone(option: tuple[str, ...]) -> None:
    refused = CliRunner().invoke(main, ["inspect", str(GOLDEN / "bundle"), *option])
    assert refused.exit_code == 2 and f"{option[0]} belong to --placement" in refused.output


def test_rows_longer_than_the_bundles_are_no_plan() -> None:
    refused = plan("--length", 5000, "--device", "raspberry-pi-5")
    assert refused.exit_code == 2
    assert "--length is 5,000, the bundle's rows have at most" in refused.output
