"""What `torchrun` says in the environment."""

from __future__ import annotations

import pytest

from edgetune.errors import UsageError
from edgetune.machine.torchrun import process_count, process_number, process_on_machine, was_started_by_torchrun

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


def test_alone_a_process_is_the_first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert not was_started_by_torchrun()
    assert (process_count(), process_number(), process_on_machine()) == (1, 0, 0)


def test_torchrun_says_which_one_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("16", "11", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert was_started_by_torchrun()
    assert (process_count(), process_number(), process_on_machine()) == (16, 11, 3)


@pytest.mark.parametrize("text", ["x", "", "-1", "0", "1.5", "²"])
def test_what_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UsageError, match=r"WORLD_SIZE is '.*', expected a number from 1 on"):
        process_count()
