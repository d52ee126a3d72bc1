"""States of a run on disk: wholly there or not there, whatever happens while one is written."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.errors import VerificationError
from edgetune.text.pulse import silent
from edgetune.training import saved_run
from edgetune.training.saved_run import Progress, RunIdentity, SavedRun, SavedState

IDENTITY = RunIdentity("b", "r", "", {"steps": 3}, "i", "onnxruntime", "1", "whole step", 4, 2, None)


def state_of(steps: int) -> SavedState:
    generator = np.random.default_rng(steps)
    session = {
        "a": generator.normal(size=(3, 5)).astype(np.float32),
        "averages": generator.normal(size=(2, 2)),
        "steps": np.array(steps, np.int64),
        "file": np.frombuffer(b"bytes of another library", np.uint8),
    }
    best = {"a": generator.normal(size=(3, 5)).astype(np.float32)}
    progress = Progress(steps, 0.1 + steps, [3.0, 2.5], 12.5, "", 2, 2.5, 1)
    return SavedState(IDENTITY, 30, progress, session, b'{"step": 1}\n' * steps, best)


def same(one: SavedState | None, other: SavedState) -> bool:
    if one is None or replace(one, session={}, best={}) != replace(other, session={}, best={}):
        return False
    pairs = [(one.session, other.session), (one.best, other.best)]
    return all(
        left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
        for left, right in pairs
    )


@pytest.fixture
def saved(tmp_path: Path) -> SavedRun:
    return SavedRun(tmp_path / "adapter")


def test_what_is_saved_comes_back(saved: SavedRun) -> None:
    assert (saved.steps(), saved.load(silent)) == (None, None)
    for steps in (3, 7, 12):
        saved.save(state_of(steps))
    found = saved.load(silent)
    assert same(found, state_of(12)) and saved.steps() == 12
    assert found is not None
    assert [array.dtype for array in found.session.values()] == [np.float32, np.float64, np.int64, np.uint8]
    assert len(list(saved.folder.iterdir())) == 2, "two generations"
    saved.remove()
    assert not saved.folder.exists()


def test_an_older_state_stands_by(saved: SavedRun) -> None:
    saved.save(state_of(3))
    saved.save(state_of(7))
    newest = max(saved.folder.iterdir())
    said: list[str] = []
    whole = newest.read_bytes()
    generator = random.Random(0)
    places = [*range(0, 40), *(generator.randrange(len(whole)) for _ in range(300))]
    for place in places:
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        said.clear()
        assert same(saved.load(said.append), state_of(3)), f"a flipped bit of byte {place} was not seen"
        assert len(said) == 1 and said[0].startswith(f"{newest}: "), said
        assert said[0].endswith("; the run goes on from the state of step 3 instead")
    for length in places:
        newest.write_bytes(whole[:length])
        assert same(saved.load(silent), state_of(3)), f"a cut after {length} bytes was not seen"
    for path in saved.folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(VerificationError, match="start over with --force"):
        saved.load(silent)


class PowerCutError(BaseException):
    """Nothing of the process goes on, no `except` and no `finally` that matters."""


def operations(monkeypatch: pytest.MonkeyPatch, cut: int, kind: type[BaseException]) -> list[str]:
    """Let the operation of that number, from 0, and all later ones fail; returns what was called."""
    calls: list[str] = []

    def watched(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) > cut:
                raise kind(28, "No space left on device")
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, call)

    for module, name in (
        (saved_run.Path, "mkdir"),
        (saved_run.Path, "open"),
        (saved_run, "write_tensors"),
        (saved_run.os, "fsync"),
        (saved_run.os, "replace"),
        (saved_run, "sync_folder"),
        (saved_run.Path, "unlink"),
    ):
        watched(module, name)
    return calls


@pytest.mark.parametrize("kind", [PowerCutError, OSError])
def test_a_cut_at_every_operation_leaves_the_old_state_or_the_new_one(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    old, new, cuts = state_of(7), state_of(12), 0
    for cut in range(100):
        saved = SavedRun(tmp_path / f"adapter{cut}")
        saved.save(state_of(3))
        saved.save(old)
        with pytest.MonkeyPatch.context() as patch:
            calls = operations(patch, cut, kind)
            try:
                saved.save(new)
            except kind:
                cuts += 1
        found = saved.load(silent)
        assert same(found, old) or same(found, new), f"after {calls}"
        if len(calls) <= cut:
            break
        # What was cut off is in nobody's way.
        saved.save(state_of(13))
        assert same(saved.load(silent), state_of(13))
    assert cuts >= 7, "every operation was cut"


def test_a_file_that_was_cut_while_it_was_written_is_no_state(
    saved: SavedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.save(state_of(3))

    def half(file: Any, *_: Any) -> None:
        file.write(b"half of a state")
        raise PowerCutError

    monkeypatch.setattr(saved_run, "write_tensors", half)
    monkeypatch.setattr(saved_run.Path, "unlink", lambda *_, **__: None)
    with pytest.raises(PowerCutError):
        saved.save(state_of(7))
    assert len(list(saved.folder.iterdir())) == 2
    assert saved.steps() == 3 and same(saved.load(silent), state_of(3))
