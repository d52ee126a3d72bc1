"""Several processes as one session: the one that leads, and what the others do."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgetune.config import Sharding
from edgetune.data.batches import Batch
from edgetune.errors import UsageError
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import OptimizerConfig, SessionState, StepResult
from edgetune.runtimes.torch.processes import Message, Processes, connected
from edgetune.runtimes.torch.worker import Worker


@contextmanager
def lead(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, sharding: Sharding
) -> Iterator[TorchSession]:
    """A session over all processes, of which this one leads.

    Args:
        bundle: What is trained; the others open and verify the folder of this name.
        parameters: The adapter that it begins with.
        optimizer: Weight decay and clipping.
        sharding: What is divided between the processes.

    Raises:
        MissingDependencyError: The package of the engine is not installed.
        UsageError: One process is to do what several were started for.
    """
    processes = connected()
    if sharding == "auto":
        sharding = "none" if processes.count == 1 else "ddp"
    if sharding == "none" and processes.count > 1:
        raise UsageError(
            f"--sharding none is for one process, and {processes.count} were started; give ddp, fsdp2 or zero3, or "
            "start one"
        )
    processes.broadcast(Message("open", (str(bundle.path), dict(parameters), optimizer, sharding)))
    worker = Worker(processes, bundle, parameters, optimizer, sharding)
    try:
        yield TorchSession(processes, worker)
    finally:
        with suppress(RuntimeError):  # where one of them has ended, so that nobody hears it
            processes.broadcast(Message("close"))


def follow() -> None:
    """Do what the leading process says until it is done.

    Ctrl-C is the leader's affair: it ends the step, saves and says `close`.
    """
    processes = connected()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    folder, *others = processes.receive().arguments
    worker = Worker(processes, load_bundle(Path(folder)), *others)
    while (message := processes.receive()).call != "close":
        getattr(worker, message.call)(*message.arguments)


class TorchSession:
    """A model in training, in all processes.

    Args:
        processes: Those that train together; this one leads.
        worker: Its own share.
    """

    def __init__(self, processes: Processes, worker: Worker) -> None:
        self._processes, self._worker = processes, worker

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `edgetune.runtimes.contract.Session.step`."""
        count = self._processes.count
        total = sum(batch.trained_tokens for batch in batches)
        messages = []
        for number in range(count):
            mine = range(number, math.ceil(len(batches) / count) * count, count)
            # A process without a batch goes along with another's, which counts nothing: collectives must match.
            shares = [(batches[at % len(batches)].tensors(), count * (at < len(batches)) / total) for at in mine]
            messages.append(Message("step", (shares, learning_rate)))
        return self._worker.step(*self._processes.scatter(messages).arguments)

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.contract.Session.evaluate`."""
        total: float = self._all("evaluate", batch.tensors())
        return total / batch.trained_tokens

    def adapter(self) -> Parameters:
        """See `edgetune.runtimes.contract.Session.adapter`."""
        parameters: Parameters = self._all("arrays", "p")
        return parameters

    def state(self) -> SessionState:
        """See `edgetune.runtimes.contract.Session.state`."""
        state: SessionState = self._all("state")
        return state

    def restore(self, state: SessionState) -> None:
        """See `edgetune.runtimes.contract.Session.restore`."""
        self._all("restore", dict(state))

    def _all(self, call: str, *arguments: Any) -> Any:
        """What this process's worker answers when all of them are asked."""
        self._processes.broadcast(Message(call, arguments))
        return getattr(self._worker, call)(*arguments)
