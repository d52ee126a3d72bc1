"""The device install of aarch64 wheels trains, measures and answers under emulation as x86-64 does."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.numpy import load_file

from edgetune.config import PlanName, TrainConfig
from edgetune.formats.bundle import load_bundle
from edgetune.ship import lay_out
from edgetune.ship.platforms import PLATFORMS
from edgetune.training import train
from support.arm_board import PINS, Board, pip_for_arm
from support.golden import ADAPTER, BUNDLE, GOLDEN, TRAIN, VALID

EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
CLOSE = 1e-4
"""Two processors may differ by this much in a loss, in nats."""
VERSIONS = ("3.11", "3.12", "3.13")


def flags() -> list[str]:
    flags = ["--data", str(TRAIN), "--init-adapter", str(ADAPTER), "--runtime", "onnxruntime"]
    for name, value in EXPECTED["options"].items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def losses(adapter: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (adapter / "metrics.jsonl").read_text().splitlines()]


def test_it_is_an_arm_processor_with_the_verified_wheels(board: Board, table: list[str]) -> None:
    code = (
        "import json, platform, onnxruntime; from importlib.metadata import distributions as d; print(json.dumps("
        "[platform.machine(), onnxruntime.__version__, {x.name: [x.version, x.read_text('WHEEL')] for x in d()}]))"
    )
    said = board.run("-c", code)
    assert said.code == 0, said
    machine, onnxruntime, installed = json.loads(said.out)
    assert machine == "aarch64"
    pins = [Requirement(line) for line in PINS.read_text().splitlines() if not line.startswith("#")]
    found = {canonicalize_name(name): value for name, value in installed.items()}
    assert found.keys() == {canonicalize_name(pin.name) for pin in pins} | {"edgetune"}
    assert all(pin.specifier.contains(found[canonicalize_name(pin.name)][0]) for pin in pins)
    native = [name for name, (_, wheel) in found.items() if "aarch64" in wheel]
    assert {"onnxruntime", "onnxruntime-genai", "numpy", "tokenizers", "safetensors"} <= set(native)
    assert not any("x86_64" in wheel for _, wheel in found.values())
    table.append(f"emulated Arm board: CPython {board.version}, onnxruntime {onnxruntime}, {len(native)} native wheels")


@pytest.mark.parametrize("plan", ["auto", "whole"])
def test_every_loss_is_that_of_x86(board: Board, tmp_path: Path, table: list[str], plan: PlanName) -> None:
    assert plan in get_args(PlanName)
    options = TrainConfig(**EXPECTED["options"], runtime="onnxruntime", plan=plan, init_adapter=ADAPTER)
    train(BUNDLE, TRAIN, tmp_path / "x86", options)
    said = board.run("-m", "edgetune", "train", BUNDLE, *flags(), "--plan", plan, "--output", tmp_path / "arm")
    assert said.code == 0, said
    x86, arm = losses(tmp_path / "x86"), losses(tmp_path / "arm")
    assert len(arm) == 20
    np.testing.assert_allclose(arm, x86, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(arm, EXPECTED["losses"], rtol=CLOSE)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("x86", "arm"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=CLOSE, err_msg=name)
    furthest = max(float(np.abs(found[name] - value).max()) for name, value in expected.items())
    table += ["", f"plan {plan}", f"{'step':>4}  {'x86-64':>10}  {'emulated Arm':>12}  {'difference':>10}"]
    table += [f"{n:4}  {a:10.6f}  {b:12.6f}  {b - a:10.1e}" for n, (a, b) in enumerate(zip(x86, arm, strict=True), 1)]
    loss = max(abs(a - b) for a, b in zip(x86, arm, strict=True))
    table.append(f"furthest apart in 20 steps: a loss by {loss:.1e}, a LoRA parameter after them by {furthest:.1e}")


def test_it_measures_and_answers_as_pytorch_does(board: Board) -> None:
    said = board.run("-m", "edgetune", "eval", BUNDLE, "--data", VALID, "--adapter", ADAPTER, "--json")
    assert said.code == 0, said
    assert json.loads(said.out)["loss"] == pytest.approx(EXPECTED["validation_loss"]["first"], rel=CLOSE)
    answer = EXPECTED["answers"][0]
    said = board.run("-m", "edgetune", "generate", BUNDLE, "--prompt", answer["prompt"])
    assert (said.code, said.out.strip()) == (0, answer["text"]), said


def test_a_shipped_folder_trains_there_with_onnxruntime_and_numpy_alone(board: Board, tmp_path: Path) -> None:
    """Step and optimizer of a shipped folder in several files of weights, once, bit for bit as they are in a bundle."""
    small = replace(PLATFORMS["linux-arm64"], shard=20_000)
    shipped = lay_out(load_bundle(BUNDLE), "linux-arm64", tmp_path / "t", platform=small)
    assert len(shipped.manifest.weights) > 3
    program = """
import sys, numpy as np, onnxruntime as ort
for role in ("step", "adamw"):
    found = []
    for folder in sys.argv[1:]:
        session = ort.InferenceSession(f"{folder}/{role}.onnx")
        draw, size = np.random.default_rng(0), {"batch": 2, "sequence": 9}
        feed = {}
        for value in session.get_inputs():
            shape = [size.get(n, n) for n in value.shape]
            whole = value.type == "tensor(int64)"
            feed[value.name] = draw.integers(0, 99, shape) if whole else draw.random(shape, np.float32)
        found.append([array.tobytes() for array in session.run(None, feed)])
    print(role, found[0] == found[1], len(found[0]))
"""
    said = board.run("-c", program, BUNDLE, tmp_path / "t" / "model")
    assert said.code == 0, said
    assert said.out.split() == ["step", "True", "17", "adamw", "True", "49"]


@pytest.mark.parametrize("python", VERSIONS)
def test_every_pinned_package_has_a_wheel_for_arm(python: str, tmp_path: Path, table: list[str]) -> None:
    """Asks the package index; nothing is installed."""
    report = tmp_path / "report.json"
    command = [*pip_for_arm("install", python), "--no-deps", "--ignore-installed", "--target", str(tmp_path / "none")]
    command += ["--dry-run", "--report", str(report), "--requirement", str(PINS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    packages = json.loads(report.read_text())["install"]
    wheels = [package["download_info"]["url"].rpartition("/")[2] for package in packages]
    pins = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    assert len(wheels) == len(pins)
    assert all(wheel.endswith(("-any.whl", "aarch64.whl")) for wheel in wheels)
    native = sum(wheel.endswith("aarch64.whl") for wheel in wheels)
    table.append(f"CPython {python}: all {len(wheels)} packages that a device needs have wheels, {native} for aarch64")


def test_the_versions_compared_are_the_same(board: Board) -> None:
    """Otherwise the table above would compare two releases, and not two processors."""
    said = board.run("-c", "import onnxruntime, numpy; print(onnxruntime.__version__, numpy.__version__)")
    assert said.out.split() == [version("onnxruntime"), version("numpy")]
