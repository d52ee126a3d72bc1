"""Runs in TensorBoard's and MLflow's files, read back by these libraries themselves."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.config import TrackingTool
from edgetune.errors import MissingDependencyError, PausedRunError, UsageError
from edgetune.reporting.tracking import tracked
from edgetune.training.observer import StartInfo, StepMetrics
from support.golden import BUNDLE, TRAIN, VALID
from support.recorder import metrics

KEYS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "peak_memory_bytes")
START = StartInfo("onnxruntime", "a plan", 4, None, 4, 3, 1, 5, 1, 0, 2, 1200, 300, 4096, 2e-4)
TOOLS: tuple[TrackingTool, ...] = ("tensorboard", "mlflow")
FAILING = {"tensorboard": "tensorboard.summary.Writer", "mlflow": "mlflow.MlflowClient"}


def needs(tool: str) -> None:
    pytest.importorskip(tool, reason=f'no {tool}; pip install "edgetune[{tool}]"')


def train(output: Path, *more: str | Path) -> Result:
    arguments = ["train", BUNDLE, "--data", TRAIN, "--valid", VALID, "--output", output, "--runtime", "onnxruntime"]
    command = [*arguments, "--steps", "4", "--eval-steps", "2", *more]
    return CliRunner().invoke(main, [str(argument) for argument in command])


def expected(folder: Path, key: str) -> list[tuple[int, float]]:
    """What the record says."""
    lines = metrics(folder)
    if key != "validation_loss":
        return [(line["step"], line[key]) for line in lines]
    first = (0, lines[0]["initial_validation_loss"])
    return [first, *((line["step"], line[key]) for line in lines if key in line)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Addresses that something tries to reach."""
    found: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda socket, address: found.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: found.append(address) or [])
    return found


def test_tensorboard_reads_what_the_record_says(tmp_path: Path, asked: list[object]) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.util import tensor_util

    for name in ("one", "two"):
        done = train(tmp_path / name, "--log-to", "tensorboard")
        assert done.exit_code == 0, done.stderr
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs"))
    events.Reload()
    runs = sorted(events.Runs())
    assert [re.sub(r"-\d{8}-\d{6}$", "", run) for run in runs] == ["one", "two"]
    for run, name in zip(runs, ("one", "two"), strict=True):
        for key in (*KEYS, "validation_loss"):
            told = events.Tensors(run, key)
            found = [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in told]
            assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected(tmp_path / name, key)]
    assert asked == []


def test_mlflow_reads_what_the_record_says(tmp_path: Path, asked: list[object]) -> None:
    needs("mlflow")
    import mlflow

    folder = tmp_path / "kept here"
    for name in ("one", "two"):
        done = train(tmp_path / name, "--log-to", "mlflow", "--log-folder", folder, "--learning-rate", "1e-3")
        assert done.exit_code == 0, done.stderr
        assert "INFO" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "kept here"}
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("edgetune")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"one", "two"}
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        parameters = run.data.params
        assert (parameters["learning_rate"], parameters["runtime"]) == ("0.001", "onnxruntime")
        assert {"plan", "rows", "batch_size", "seed"} <= parameters.keys()
        assert not {"force", "resume", "init_adapter", "pause_file"} & parameters.keys()
        for key in (*KEYS, "validation_loss"):
            history = client.get_metric_history(run.info.run_id, key)
            assert sorted((each.step, each.value) for each in history) == expected(tmp_path / name, key)
    assert asked == []
    assert str(tmp_path) not in str([run.to_dictionary()["data"] for run in runs.values()])


def test_the_telemetry_of_mlflow_is_off(tmp_path: Path) -> None:
    needs("mlflow")
    with tracked("mlflow", tmp_path, "run", {}, print):
        from mlflow.telemetry.client import get_telemetry_client
        from mlflow.telemetry.utils import is_telemetry_disabled

        assert is_telemetry_disabled()
        assert get_telemetry_client() is None
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert list(tmp_path.iterdir()) == [], "a run that never began leaves nothing"


def test_a_run_that_stops_is_marked_and_whole(tmp_path: Path) -> None:
    needs("mlflow")
    import mlflow

    ends = {"KILLED": PausedRunError("paused"), "FAILED": ValueError("broken")}
    for name, error in ends.items():
        with pytest.raises(type(error)), tracked("mlflow", tmp_path, name, {}, print) as observer:
            observer.on_start(START)
            observer.on_step(StepMetrics(1, 2.5, 1e-4, float("inf"), 64, 100.0, None, 1.0))
            raise error
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("edgetune")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {name: name for name in ends}
    for run in runs:
        assert run.data.metrics == {"loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 100.0}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_package_that_is_not_there_is_named_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: TrackingTool
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == tool]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, tool, None)
    done = train(tmp_path / "adapter", "--log-to", tool)
    assert done.exit_code == 1
    fix = f'error: {tool}, for --log-to {tool}, is not installed; pip install "edgetune[{tool}]"\n'
    assert done.stderr == fix
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_mlflow_needs_is_named_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    monkeypatch.setitem(sys.modules, "alembic", None)
    told = pytest.raises(MissingDependencyError, match="alembic, for --log-to mlflow, is not installed")
    with told, tracked("mlflow", tmp_path, "run", {}, print):
        raise AssertionError


class Breaks:
    """Stands for whatever a tool makes, and can do nothing."""

    def __init__(self, *_: object) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_fails_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: TrackingTool
) -> None:
    needs(tool)
    monkeypatch.setattr(FAILING[tool], Breaks)
    done = train(tmp_path / "adapter", "--log-to", tool)
    assert done.exit_code == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "gets nothing more of this run" in line]
    assert len(told) == 1 and "No space left on device" in told[0]
    assert len(metrics(tmp_path / "adapter")) == 4


def test_a_database_that_cannot_be_opened_is_told_at_once(tmp_path: Path) -> None:
    needs("mlflow")
    (tmp_path / "mlflow.db").mkdir()
    said: list[str] = []
    begin = time.monotonic()
    with tracked("mlflow", tmp_path, "run", {}, said.append) as observer:
        observer.on_start(START)
        observer.on_validation(0, 1.0)
    assert time.monotonic() - begin < 20  # MLflow itself would try for minutes
    assert len(said) == 1 and "unable to open database file" in said[0]


def test_a_folder_that_mlflow_cannot_use_is_refused(tmp_path: Path) -> None:
    needs("mlflow")
    with pytest.raises(UsageError, match="behind % and \\? in a path"):
        tracked("mlflow", tmp_path / "50%?", "run", {}, print).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_tool_is_refused(tmp_path: Path) -> None:
    done = train(tmp_path / "adapter", "--log-folder", tmp_path)
    assert done.exit_code == 2
    assert "means nothing without --log-to" in done.stderr
    assert list(tmp_path.iterdir()) == []
