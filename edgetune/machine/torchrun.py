"""Which of several processes this one is, as `torchrun` says in the environment of those that it starts."""

from __future__ import annotations

import os

LEADER = 0
"""The process that runs the command; the others do what it says."""


def process_count() -> int:
    """How many processes train together; 1 where nothing started several."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_number() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", LEADER))


def process_on_machine() -> int:
    """Which of those on this machine it is, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def was_started_by_torchrun() -> bool:
    """Whether the processes can find each other."""
    return "WORLD_SIZE" in os.environ
