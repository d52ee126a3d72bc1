"""Signals wait for the end of the step, and the command line says how to go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.training.early_end import held_back
from edgetune.training.saved_run import SavedRun
from support.golden import BUNDLE, TRAIN
from support.repository import ROOT

WEIGHTS = "adapter_model.safetensors"


def command(output: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["train", BUNDLE, "--data", TRAIN, "--output", output, "--runtime", "onnxruntime", "--steps", "400"]
    return subprocess.Popen(
        [sys.executable, "-m", "edgetune", *map(str, arguments), *more],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=output.parent,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr


def reach(process: subprocess.Popen[str], start: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(start):
            return
    raise AssertionError(f"ended without saying {start!r}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("undisturbed") / "adapter"
    assert finish(command(output))[0] == 0
    return (output / WEIGHTS).read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process that is sent SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_the_run_goes_on(
    tmp_path: Path, number: signal.Signals, undisturbed: bytes
) -> None:
    output = tmp_path / "adapter"
    process = command(output, "--save-steps", "1000")
    reach(process, "step 8/")
    process.send_signal(number)
    code, stderr = finish(process)
    assert code == 130, stderr
    assert f"error: interrupted by {number.name} after step " in stderr
    assert "the same command and --resume go on from there" in stderr
    assert not output.exists()
    assert finish(command(output, "--resume"))[0] == 0
    assert (output / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_run_that_is_killed_again_and_again_ends_the_same(tmp_path: Path, undisturbed: bytes) -> None:
    output, kills = tmp_path / "adapter", random.Random(0)
    code, steps = -signal.SIGKILL, []
    while code == -signal.SIGKILL:
        process = command(output, "--save-steps", "7", *(["--resume"] if steps else []))
        reach(process, "step ") if len(steps) < 6 else None
        if len(steps) < 6:
            time.sleep(kills.uniform(0, 0.5))
            process.kill()
        code, stderr = finish(process)
        steps.append(SavedRun(output).steps())
    assert code == 0, stderr
    assert len(steps) == 7
    assert (output / WEIGHTS).read_bytes() == undisturbed


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As at a terminal: tests may have been started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_ends_at_once() -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), held_back(said.append) as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.heard == "SIGINT"
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    time.sleep(0.1)
    assert len(said) == 1 and said[0].startswith("SIGINT: the run ends after this step")
