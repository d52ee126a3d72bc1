"""The training step in PyTorch, in one process or in several that `torchrun` started."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from edgetune.data.batches import Batch
from edgetune.errors import MissingDependencyError, UsageError
from edgetune.formats.bundle import Bundle
from edgetune.machine.torchrun import LEADER, process_number
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import Abilities, OptimizerConfig, Runtime, SessionState, StepResult
from edgetune.runtimes.execution import ExecutionPlan, WholePlan

if TYPE_CHECKING:
    from edgetune.runtimes.torch.processes import Processes
    from edgetune.runtimes.torch.worker import Worker

_INSTALL = 'PyTorch is not installed; pip install "edgetune[torch]", on a host'


def abilities() -> Abilities:
    """See `edgetune.runtimes.contract.Runtime`.

    Raises:
        MissingDependencyError: PyTorch is not installed.
    """
    if find_spec("torch") is None:
        raise MissingDependencyError(_INSTALL)
    return Abilities(whole=True, exact=None, int8=None, preferred=False)


def version() -> str:
    """See `edgetune.runtimes.contract.Runtime`."""
    try:
        return f"torch {version_of('torch')}"
    except PackageNotFoundError:
        return "torch"


def is_led() -> bool:
    """Whether another process leads this one, as `torchrun` says in the environment."""
    return process_number() != LEADER


def follow() -> None:
    """Do what the leading process says until it is done.

    Ctrl-C is the leader's affair: it ends the step, saves and says `close`.
    """
    from edgetune.runtimes.torch.processes import connected, obey
    from edgetune.runtimes.torch.worker import Worker

    processes = connected()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    obey(processes, Worker)


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan
) -> Iterator[TorchSession]:
    """Lead the processes; see `edgetune.runtimes.contract.Runtime`.

    Raises:
        MissingDependencyError: The package of the engine is not installed.
        UsageError: The plan is not the whole step, or one process is to do what several were started for.
    """
    if not isinstance(plan, WholePlan):
        raise UsageError("the torch runtime takes no plan but `whole`; use --runtime onnxruntime for the others")
    from edgetune.runtimes.torch.processes import Message, connected
    from edgetune.runtimes.torch.worker import Worker

    processes = connected()
    sharding = plan.sharding
    if sharding == "auto":
        sharding = "none" if processes.count == 1 else "ddp"
    if sharding == "none" and processes.count > 1:
        raise UsageError(
            f"--sharding none is for one process, and {processes.count} were started; give ddp, fsdp2 or zero3, or "
            "start one"
        )
    message = processes.broadcast(Message("open", (str(bundle.path), dict(parameters), optimizer, sharding)))
    worker = Worker(processes, *message.arguments)
    try:
        yield TorchSession(processes, worker)
    finally:
        with suppress(RuntimeError):  # where one of them has ended, so that nobody hears it
            processes.broadcast(Message("close"))


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
        from edgetune.runtimes.torch.processes import Message

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
        from edgetune.runtimes.torch.processes import Message

        self._processes.broadcast(Message(call, arguments))
        return getattr(self._worker, call)(*arguments)


RUNTIME = Runtime(abilities, version, open_session)
