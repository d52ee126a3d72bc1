"""The runtime `openvino-ep`: OpenVINO's provider in ONNX Runtime takes the whole step as one node.

The plugin finds Intel's devices alone. On another x86-64 processor the command runs on an emulated one, QEMU's
Haswell: every instruction is Intel's, and the numbers are the plugin's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.config import TrainConfig
from edgetune.devices.place import Place
from edgetune.errors import IncompatibleError, MissingDependencyError, UsageError
from edgetune.formats.adapter import read_adapter
from edgetune.planning.options import resolve
from edgetune.runtimes import openvino_ep
from edgetune.runtimes.execution import Accelerator, LayeredPlan, WholePlan
from edgetune.runtimes.whole import plugin_runtime
from support.bundle_copy import opened_copy
from support.oracle import cosine
from support.prepared_bundles import Prepared
from support.repository import ROOT
from support.tiny_phi3 import VARIANTS
from support.tiny_step import OPTIMIZER, adapter_of

EMULATOR = "qemu-x86_64-static"
installed = pytest.mark.skipif(
    find_spec("onnxruntime_ep_openvino") is None, reason="onnxruntime-ep-openvino is not installed (x86-64 has wheels)"
)
ROWS = [{"prompt": f"lamp {number}", "completion": f" is {state}"} for number, state in enumerate(("on", "off") * 2)]
LOSS, DRIFT = 1e-4, 1e-3
"""Relative: of losses, and of what three steps make of the adapter, in float32."""
BF16_LOSS, BF16_DRIFT, BF16_COSINE = 2e-3, 1e-2, 0.95
"""The same in bfloat16. The first update is as long for a gradient near zero as for any other, and bfloat16 turns the
sign of one in a hundred: the parameters part, and the float32 loss at them differs by up to 1 %."""


@cache
def intel() -> Sequence[str]:
    """How to run Python on a processor of Intel's."""
    python = str(Path(sys.executable).resolve())
    if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        return (python,)
    beside = ROOT / ".venv-arm64" / "host" / "usr" / "bin" / EMULATOR  # where `make test-arm` unpacks it
    emulator = shutil.which(EMULATOR) or (str(beside) if beside.is_file() else None)
    if emulator is None:
        pytest.skip(f"neither a processor of Intel's nor {EMULATOR} is here")
    return (emulator, "-cpu", "Haswell", python)


def edgetune(*arguments: object) -> Any:
    """What a command prints as JSON."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [*intel(), "-m", "edgetune", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


@pytest.mark.own
@installed
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_step_is_one_node_and_follows_the_cpu(
    prepared: Prepared, variant: str, data: Path, tmp_path: Path
) -> None:
    bundle = opened_copy(prepared(variant, "int4"), tmp_path / "bundle")
    options = ("--data", data, "--raw-prompts", "--steps", 3, "--batch-size", 2, "--learning-rate", 1e-2, "--quiet")
    result = edgetune("train", bundle.path, *options, "--output", tmp_path / "ep", "--runtime", "openvino-ep")
    assert {placed["graph"] for placed in result["placement"]} == {"step"}, "float16 alone has norms of its own"
    for placed in result["placement"]:
        assert (placed["provider"], placed["accelerator_partitions"]) == (openvino_ep.PROVIDER, 1)
        assert placed["fallen_back"] == [] and placed["accelerated_nodes"] > 300 and not placed["cached"]
        assert placed["device"].startswith("CPU ")
    exact = "BF16" not in result["placement"][0]["device"]
    edgetune(
        "train", bundle.path, *options, "--output", tmp_path / "cpu", "--runtime", "onnxruntime", "--plan", "whole"
    )
    found, expected = (losses(tmp_path / name) for name in ("ep", "cpu"))
    assert expected[-1] < 0.95 * expected[0], "it has to learn for the comparison to mean something"
    assert found[0] == pytest.approx(expected[0], rel=LOSS if exact else BF16_LOSS)
    assert found == pytest.approx(expected, rel=LOSS if exact else BF16_DRIFT)
    manifest = bundle.manifest
    learnt, reference = (
        read_adapter(tmp_path / name, manifest.lora, manifest.base, manifest.tokenizer) for name in ("ep", "cpu")
    )
    for name, value in reference.items():
        if exact:
            assert np.linalg.norm(learnt[name] - value) <= DRIFT * np.linalg.norm(value), name
        else:
            assert cosine(learnt[name], value) >= BF16_COSINE, name


def losses(adapter: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (adapter / "metrics.jsonl").read_text().splitlines()]


@installed
def test_a_second_start_compiles_nothing_and_forward_passes_run_too(
    prepared: Prepared, data: Path, tmp_path: Path
) -> None:
    bundle = opened_copy(prepared("grouped-query", "int4"), tmp_path / "bundle").path
    placement = ("inspect", bundle, "--placement", "openvino-ep", "--buckets", "1x16")
    first, second = (edgetune(*placement) for _ in range(2))
    assert [(each["graph"], each["cached"]) for each in first] == [("step", False), ("loss", False)]
    assert [(each["graph"], each["cached"]) for each in second] == [("step", True), ("loss", True)]
    rows = ("--data", data, "--raw-prompts", "--buckets", "1x16")
    options = ("--output", tmp_path / "adapter", "--steps", 2, "--method", "forward-only", "--quiet")
    result = edgetune("train", bundle, *rows, *options, "--queries", 2, "--runtime", "openvino-ep")
    assert [(each["graph"], each["cached"]) for each in result["placement"]] == [("loss", True)]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_runtime, "find_spec", lambda name: None)
    for ask in (openvino_ep.RUNTIME.abilities, lambda: openvino_ep.has_device("CPU")):
        with pytest.raises(MissingDependencyError, match=r'not installed; pip install "edgetune\[openvino-ep\]"'):
            ask()


@installed
def test_without_a_device_of_intels_it_says_so(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.runtimes.whole.plugin.ort.get_ep_devices", list)
    assert not openvino_ep.has_device("CPU")
    bundle = prepared("multi-head", "int4")
    for kind in ("CPU", "NPU"):
        plan = WholePlan(accelerator=Accelerator(kind))  # type: ignore[arg-type]
        with pytest.raises(IncompatibleError, match=f"finds no {kind} of Intel's here"):
            openvino_ep.RUNTIME.place(bundle, plan, 1, 8)


def test_it_takes_no_layered_plan_and_its_cpu_is_no_npu(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "int4")
    plan = LayeredPlan(kept_layers=0, resident=False, head_rows=16)
    with (
        pytest.raises(UsageError, match="the openvino-ep runtime takes no plan but `whole`"),
        openvino_ep.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, plan),
    ):
        pass
    with pytest.raises(UsageError, match="--require-npu means nothing on OpenVINO's CPU; give --device-type NPU"):
        resolve(TrainConfig(runtime="openvino-ep", require_npu=True), Place())
