"""The runtime `openvino`: gradients against PyTorch + PEFT, its cache, and that it keeps to itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import oracle
import pytest
from prepared_bundles import Prepared
from test_prepare import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of, each_bundle, lengths_of, relative, rows_of
from tiny_phi3 import checkpoint

from edgetune.bundle import open_bundle
from edgetune.config import Base
from edgetune.errors import MissingDependencyError, UsageError
from edgetune.execution import WHOLE_STEP, ExecutionPlan
from edgetune.runtimes import find_runtime, openvino

installed = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
RECOMPUTE = ExecutionPlan("layered", kept_layers=0, resident=False, head_rows=16, head_tokens=100)
KEEP = ExecutionPlan("layered", kept_layers=2, resident=True, head_rows=1024)
BF16_COSINE, BF16_LOSS, FP32_ERROR = 0.997, 2e-3, 1e-3


@installed
@pytest.mark.parametrize("plan", [RECOMPUTE, KEEP], ids=["recompute", "keep"])
@each_bundle
def test_loss_and_gradients_are_pytorchs(prepared: Prepared, variant: str, base: Base, plan: ExecutionPlan) -> None:
    bundle = prepared(variant, base)
    parameters = adapter_of(bundle)
    rows = rows_of(1, lengths_of(variant, 1))
    model = oracle.peft_model(checkpoint(variant), bundle, parameters)
    loss = oracle.loss(model, rows)
    loss.backward()
    exact = openvino.abilities().exact
    assert exact is not None
    with openvino.open_session(bundle, parameters, OPTIMIZER, plan) as session:
        assert session.evaluate(batch_of(bundle, rows)) == pytest.approx(loss.item(), rel=BF16_LOSS)
        result = session.step([batch_of(bundle, rows)], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(loss.item(), rel=BF16_LOSS)
    for name, parameter in oracle.trainable(model).items():
        assert parameter.grad is not None
        expected = parameter.grad.numpy()
        if exact.products == "fp32":
            assert relative(found[name], expected) <= FP32_ERROR, name
        else:
            assert cosine(found[name], expected) >= BF16_COSINE, name
            assert np.linalg.norm(found[name]) == pytest.approx(np.linalg.norm(expected), rel=0.03), name


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@installed
def test_compiled_models_are_kept_beside_a_bundle_that_still_verifies(prepared: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(prepared("multi-head", "int4").path, folder, ignore=shutil.ignore_patterns(".cache"))
    bundle = open_bundle(folder)
    batch = batch_of(bundle, rows_of(0, [9, 12]))
    losses = []
    for _ in range(2):
        with openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, KEEP) as session:
            losses.append(session.step([batch], LEARNING_RATE).loss)
    (cache,) = (folder / ".cache").iterdir()
    assert openvino.version().replace(" ", "-") in cache.name
    assert list(cache.glob("*.blob"))
    assert losses[0] == losses[1]
    open_bundle(folder)


@installed
def test_old_compiled_models_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "_MOST_CACHED", 25)
    for age, name in enumerate(("new", "newer", "newest")):
        (tmp_path / name).write_bytes(bytes(10))
        import os

        os.utime(tmp_path / name, (age, age))
    openvino._drop_old(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"newer", "newest"}


@installed
def test_it_takes_no_whole_step(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "int4")
    with (
        pytest.raises(UsageError, match="neither --plan whole nor int8"),
        openvino.open_session(bundle, adapter_of(bundle), OPTIMIZER, WHOLE_STEP),
    ):
        pass


@installed
def test_the_import_starts_nothing_and_tells_nobody() -> None:
    """OpenVINO's converter reports its own import, in a process of its own; it is not imported."""
    program = """
import multiprocessing, socket, subprocess, sys
def refuse(*arguments, **options):
    raise SystemExit("something was started")
subprocess.Popen.__init__ = multiprocessing.Process.start = socket.socket.connect = refuse
from edgetune.runtimes import openvino
openvino.abilities()
assert "openvino_telemetry" not in sys.modules
assert "openvino.tools.ovc" not in sys.modules
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino.core.cache_clear()
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "edgetune\[openvino\]"'):
        find_runtime("openvino").abilities()
