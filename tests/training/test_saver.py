"""How often a state is saved, and what is said where it cannot be."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from edgetune.training import saver as module
from edgetune.training.saved_run import Progress, RunIdentity, SavedRun, SavedState
from edgetune.training.saver import SHARE, Saver

IDENTITY = RunIdentity("b", "r", "", {}, "i", "onnxruntime", "1", "whole step", 4, 2, None)


def state() -> SavedState:
    return SavedState(IDENTITY, 9, Progress(3, 1.0, [], 1.0, "", None, None, 0), {}, b"", {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


def test_saving_takes_a_share_of_the_time(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SavedRun(tmp_path / "adapter")
    real = slow.save

    def save(given: SavedState) -> int:
        clock[0] += 0.5
        return real(given)

    monkeypatch.setattr(slow, "save", save)
    saver, spent, done = Saver(slow, None, 10_000_000, print), 0.0, 0
    for step in range(1, 2001):
        clock[0] += 1.0
        if saver.is_due(step):
            before = clock[0]
            assert saver.save(state, step)
            spent, done = spent + clock[0] - before, done + 1
    assert done > 50
    assert 0.8 * SHARE < spent / clock[0] <= SHARE


def test_steps_can_be_said(tmp_path: Path) -> None:
    saver = Saver(SavedRun(tmp_path / "adapter"), 5, 1, print)
    assert [step for step in range(1, 13) if saver.is_due(step)] == [5, 10]
    never = Saver(SavedRun(tmp_path / "adapter"), 0, 1, print)
    assert not any(never.is_due(step) for step in range(1, 13))
    assert not never.save(state, 3)
    assert (saver.rhythm, never.rhythm) == ("every 5 steps", "never")


def test_a_full_disk_is_said_and_the_older_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    saved = SavedRun(tmp_path / "adapter")
    saver = Saver(saved, 1, 1, said.append)
    assert saver.save(state, 3)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgetune.training.saved_run.write_tensors", full)
    assert not saver.save(state, 4)
    reason = "the state after step 4 cannot be saved (No space left on device)"
    assert said == [f"{reason}: that of step 3 stays, and the training goes on"]
    assert saved.steps() == 3 and saver.last_steps == 3
