"""The worker with ONNX Runtime Training: what it says while it is set up, and that nothing of it is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune import side_environment
from edgetune.errors import EdgetuneError, MissingDependencyError
from edgetune.runtimes import find_runtime, install
from edgetune.runtimes.execution import WholePlan
from edgetune.runtimes.ort_training import runtime as ort_training
from support.prepared_bundles import Prepared
from support.random_rows import rows_of
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of


def test_the_one_who_asks_hears_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(side_environment, "_build", lambda folder, base: None)
    heard: list[str] = []
    install(find_runtime("ort-training"), heard.append)
    assert len(heard) == 1
    assert heard[0].startswith(f"Creating the side environment with ONNX Runtime Training in {tmp_path}")


def test_other_runtimes_install_nothing() -> None:
    install(find_runtime("onnxruntime"), pytest.fail)


def test_a_session_installs_nothing_and_says_nothing(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = prepared("multi-head", "fp32")
    monkeypatch.setenv("EDGETUNE_CACHE", str(tmp_path / "cache"))
    capfd.readouterr()
    with (
        pytest.raises(MissingDependencyError, match="the side environment with ONNX Runtime Training is not there"),
        ort_training.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()),
    ):
        pass
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "cache").exists()


def test_no_process_and_no_pipe_is_left(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "fp32")
    with ort_training.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session:
        assert session.step([batch_of(bundle, rows_of(0, [9]))], LEARNING_RATE).applied
    worker = session._worker
    assert worker.returncode is not None
    assert worker.stdin is not None and worker.stdout is not None
    assert worker.stdin.closed and worker.stdout.closed


def test_what_a_dead_worker_did_not_take_does_not_hide_why_it_died(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "fp32")
    with (
        pytest.raises(EdgetuneError, match="worker ended"),
        ort_training.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session,
    ):
        session._worker.terminate()
        session._worker.wait()
        session.step([batch_of(bundle, rows_of(0, [9]))], LEARNING_RATE)
