"""Processes that train together: one leads, which runs the command, and the others do what it says.

`torchrun` starts them with their numbers in the environment. The leader alone reads rows, writes files and prints; it
sends each of the others its share of every step, so that all of them enter the same collective operations.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from edgetune.machine.torchrun import LEADER, process_count, process_on_machine, was_started_by_torchrun

_PATIENCE = timedelta(days=30)
"""How long a process waits for the leader, which may pause; one that has ended is noticed at once."""


@dataclass(frozen=True)
class Message:
    """What the leader wants of a process."""

    call: str
    """A method of the worker."""
    arguments: tuple[Any, ...] = ()


class Processes:
    """This process among those that train together.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = process_count()

    def scatter(self, messages: Sequence[Message]) -> Message:
        """Of the leader: send each process its message. Returns its own."""
        return self._scattered(list(messages))

    def broadcast(self, message: Message) -> Message:
        """Of the leader: send all processes the same."""
        return self._scattered([message] * self.count)

    def receive(self) -> Message:
        """Of the others: the next message of the leader."""
        return self._scattered(None)

    def _scattered(self, messages: list[Message] | None) -> Message:
        if self.count == 1:
            assert messages is not None
            return messages[0]
        received: list[Any] = [None]
        distributed.scatter_object_list(received, messages, src=LEADER)
        message = received[0]
        assert isinstance(message, Message)
        return message

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, in its place."""
        if self.count > 1:
            distributed.all_reduce(value)
        return value


def connected() -> Processes:
    """This process and those beside it, which stay connected until it ends: DeepSpeed keeps groups of its own.

    One process alone is a group as well, because engines that divide a model want one.
    """
    device = this_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]
        alone: Mapping[str, Any] = {"store": store, "rank": LEADER, "world_size": 1}
        distributed.init_process_group(backend, timeout=_PATIENCE, **({} if was_started_by_torchrun() else alone))
        atexit.register(distributed.destroy_process_group)
    return Processes(device)


def this_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", process_on_machine())
    return torch.device("cpu")
