"""Twenty steps of the golden bundle by every engine in two and in three processes are those of the device's runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgetune.config import Sharding, TrainConfig
from edgetune.training import train
from support.golden import GOLDEN
from support.torch_processes import train_golden

SHARED: list[Sharding] = ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3-offload"]
EVEN = "6"
"""Rows of a step that divide by two and by three; the golden ten rows end with a step of four."""
UNEVEN = "3"


@pytest.fixture(scope="session", params=[UNEVEN, EVEN], ids=["uneven rows", "even rows"])
def on_a_device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Rows of a step, and the adapter that `onnxruntime` trained with them."""
    output = tmp_path_factory.mktemp("device") / "adapter"
    config = TrainConfig(
        "onnxruntime",
        plan="whole",
        steps=20,
        batch_size=int(request.param),
        learning_rate=0.005,
        schedule="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        shuffle=False,
        init_adapter=GOLDEN / "initial_adapter",
    )
    train(GOLDEN / "bundle", GOLDEN / "train.jsonl", output, config)
    return request.param, output


@pytest.mark.parametrize(
    ("sharding", "processes"), [("none", 1), *((sharding, count) for sharding in SHARED for count in (2, 3))]
)
def test_an_engine_trains_as_the_device_does(
    on_a_device: tuple[str, Path], tmp_path: Path, table: list[str], sharding: Sharding, processes: int
) -> None:
    rows, expected = on_a_device
    done = train_golden(tmp_path / "adapter", processes, "--sharding", sharding, batch_size=rows)
    losses = [json.loads(line)["loss"] for line in (expected / "metrics.jsonl").read_text().splitlines()]
    furthest = max(abs(mine - theirs) for mine, theirs in zip(done.losses, losses, strict=True))
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (done.adapter, expected))
    apart = max(float(np.abs(found[name] - value).max()) for name, value in wanted.items())
    table.append(
        f"{sharding:14} {processes} processes, {rows} rows a step: "
        f"losses within {furthest:.1e}, adapter within {apart:.1e}"
    )
    assert done.errors.count("step 20/20") == 1
    assert furthest < 2e-5
    assert apart < 1e-4


@pytest.mark.parametrize("sharding", ["fsdp2", "zero2", "zero3"])
def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, sharding: Sharding) -> None:
    """Moments are gathered and divided again: the run ends as one that was not cut off."""
    whole = train_golden(tmp_path / "whole", 2, "--sharding", sharding, steps="6")
    train_golden(tmp_path / "halves", 2, "--sharding", sharding, "--keep-state", steps="3")
    halves = train_golden(tmp_path / "halves", 2, "--sharding", sharding, "--resume", steps="6")
    assert halves.losses == pytest.approx(whole.losses, abs=1e-6)
    found, wanted = (load_file(each.adapter / "adapter_model.safetensors") for each in (halves, whole))
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
