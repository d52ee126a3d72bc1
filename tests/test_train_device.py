"""`train --device`: what a profile says of its accelerator holds, and what is not found is said."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_device import VALID
from test_train_loop import Recorder

from edgetune.cli import main
from edgetune.config import TrainConfig
from edgetune.device import load_profile
from edgetune.errors import UsageError
from edgetune.train import TrainResult, train
from edgetune.train.accelerated import as_on

GOLDEN = Path(__file__).parent.parent / "artifacts" / "golden"
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


def profile_on(folder: Path, kind: str, **placement: str) -> str:
    """A profile whose accelerator is a device of OpenVINO."""
    text = VALID.replace('names = ["qnn", "onnxruntime"]', 'names = ["openvino", "onnxruntime"]')
    text = text.replace('{ backend_type = "htp" }', f'{{ device_type = "{kind}" }}')
    for place, where in placement.items():
        text = text.replace(f'{place} = "accelerator"', f'{place} = "{where}"')
    path = folder / "my-board.toml"
    path.write_text(text)
    return str(path)


def run(output: Path, **config: Any) -> tuple[TrainResult, Recorder]:
    recorder = Recorder()
    given = TrainConfig(steps=1, batch_size=1, **config)
    return train(GOLDEN / "bundle", GOLDEN / "train.jsonl", None, output, given, recorder), recorder


@needs_openvino
def test_the_whole_step_runs_on_the_device_that_the_profile_names(tmp_path: Path) -> None:
    result, _ = run(tmp_path / "adapter", device=profile_on(tmp_path, "CPU"))
    assert (result.runtime, result.plan) == ("openvino", "whole step in static shapes")
    assert {graph["provider"] for graph in result.placement} == {"OpenVINO CPU"}
    # Its forward pass alone may run on the CPU only, so that nothing has to be of static shape.
    result, _ = run(
        tmp_path / "other", device=profile_on(tmp_path, "CPU"), method="forward-only", queries=2, learning_rate=1e-3
    )
    assert "static" not in result.plan


@needs_openvino
def test_an_accelerator_that_is_not_found_is_said(tmp_path: Path) -> None:
    result, seen = run(tmp_path / "adapter", device=profile_on(tmp_path, "NPU"))
    assert "static" not in result.plan
    assert any("OpenVINO finds no NPU here (pip install it); the CPU computes" in notice for notice in seen.notices)


def test_a_chip_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_text(VALID.replace('backend_type = "htp"', 'soc_model = "8 Elite"'))
    with pytest.raises(UsageError, match="soc_model is '8 Elite', expected a number such as 69"):
        as_on(load_profile(str(path)), TrainConfig(), pytest.fail)


@needs_openvino
@pytest.mark.parametrize("config", [{"plan": "stream"}, {"runtime": "onnxruntime"}, {"memory_budget": "2GB"}])
def test_what_is_asked_for_comes_first(config: dict[str, Any], tmp_path: Path) -> None:
    given = TrainConfig(**config)
    assert as_on(load_profile(profile_on(tmp_path, "CPU")), given, pytest.fail) == given


def test_the_chip_is_the_profiles_unless_another_is_asked_for() -> None:
    profile = load_profile("android-snapdragon-8-elite")
    assert as_on(profile, TrainConfig(), pytest.fail).soc_model == 69
    assert as_on(profile, TrainConfig(soc_model=43), pytest.fail).soc_model == 43
    assert as_on(load_profile("generic-x86"), TrainConfig(), pytest.fail) == TrainConfig()


def test_a_device_that_openvino_does_not_have_is_refused(tmp_path: Path) -> None:
    for kind in ("auto", "TPU"):
        path = profile_on(tmp_path, kind)
        with pytest.raises(UsageError, match=f"device_type is '{kind}', expected CPU, GPU, NPU"):
            as_on(load_profile(path), TrainConfig(), pytest.fail)
    arguments = ["train", GOLDEN / "bundle", "--data", GOLDEN / "train.jsonl", "--output", tmp_path / "adapter"]
    done = CliRunner().invoke(main, [str(each) for each in (*arguments, "--device", path)])
    assert done.exit_code == 2
    assert not (tmp_path / "adapter").exists()
