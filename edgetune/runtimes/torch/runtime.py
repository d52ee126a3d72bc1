"""The training step in PyTorch, in one process or in several that `torchrun` started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec

from edgetune.errors import MissingDependencyError, UsageError
from edgetune.formats.bundle import Bundle
from edgetune.machine.torchrun import LEADER, process_number
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import Abilities, OptimizerConfig, Runtime, Session
from edgetune.runtimes.execution import ExecutionPlan, WholePlan

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
    return f"torch {metadata.version('torch')}"


def is_led() -> bool:
    """Whether another process leads this one, as `torchrun` says in the environment."""
    return process_number() != LEADER


def follow() -> None:
    """Do what the leading process says until it is done; see `edgetune.runtimes.torch.session.follow`."""
    from edgetune.runtimes.torch import session

    session.follow()


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan
) -> Iterator[Session]:
    """Lead the processes; see `edgetune.runtimes.contract.Runtime`.

    Raises:
        MissingDependencyError: The package of the engine is not installed.
        UsageError: The plan is not the whole step, or one process is to do what several were started for.
    """
    if not isinstance(plan, WholePlan):
        raise UsageError("the torch runtime takes no plan but `whole`; use --runtime onnxruntime for the others")
    from edgetune.runtimes.torch.session import lead

    with lead(bundle, parameters, optimizer, plan.sharding) as session:
        yield session


RUNTIME = Runtime(abilities, version, open_session)
