"""Which of several processes this one is, as `torchrun` says in the environment of those that it starts.

What is no such number there is a UsageError.
"""

from __future__ import annotations

import os

from edgetune.errors import UsageError

LEADER = 0
"""The process that runs the command; the others do what it says."""


def process_count() -> int:
    """How many processes train together; 1 where nothing started several."""
    return _number("WORLD_SIZE", 1, least=1)


def process_number() -> int:
    """Which of them this one is, from 0."""
    return _number("RANK", LEADER)


def process_on_machine() -> int:
    """Which of those on this machine it is, from 0: the number of its GPU."""
    return _number("LOCAL_RANK", 0)


def was_started_by_torchrun() -> bool:
    """Whether the processes can find each other."""
    return "WORLD_SIZE" in os.environ


def _number(name: str, otherwise: int, least: int = 0) -> int:
    text = os.environ.get(name, str(otherwise))
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise UsageError(
            f"the environment's {name} is {text!r:.40}, expected a number from {least} on, as torchrun sets it; "
            "unset it, or start the command with torchrun"
        )
    return int(text)
