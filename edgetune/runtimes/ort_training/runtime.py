"""The training artifacts through the ONNX Runtime Training API, in the side environment."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, cast

import numpy as np

from edgetune.data.batches import Batch
from edgetune.errors import EdgetuneError, ResourceError, UsageError
from edgetune.formats.bundle import Bundle
from edgetune.machine.exhaustion import ADVICE, lack_of_process
from edgetune.machine.threads import thread_count
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import Abilities, OptimizerConfig, Runtime, SessionState, StepResult
from edgetune.runtimes.execution import ExecutionPlan, WholePlan
from edgetune.runtimes.ort_training import wire
from edgetune.side_environment import (
    ensure_side_environment,
    side_environment_version,
    worker_command,
)

_WORKER = Path(__file__).with_name("worker.py")


def abilities() -> Abilities:
    """See `edgetune.runtimes.contract.Runtime`."""
    return Abilities(whole=True, exact=None, int8=None, preferred=False)


def version() -> str:
    """See `edgetune.runtimes.contract.Runtime`."""
    return side_environment_version() or "onnxruntime-training-cpu"


def install(notice: Callable[[str], None]) -> None:
    """Make the side environment when it is not there; see `edgetune.runtimes.contract.Runtime`.

    Raises:
        MissingDependencyError: No wheel for this platform, no CPython 3.11, or pip could not install.
        UsageError: The cache folder cannot be written.
        ResourceError: The disk is full.
    """
    ensure_side_environment(notice)


@contextmanager
def open_session(
    bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan
) -> Iterator[OrtTrainingSession]:
    """Start the worker; see `edgetune.runtimes.contract.Runtime`.

    Raises:
        UsageError: The plan is not the whole step, which is all that the artifacts hold.
        MissingDependencyError: The side environment is not there; `install` makes it.
    """
    if not isinstance(plan, WholePlan):
        raise UsageError("the ort-training runtime takes no plan but `whole`; use --runtime onnxruntime for the others")
    arguments = [str(bundle.path.absolute()), str(optimizer.weight_decay), str(optimizer.max_grad_norm)]
    arguments.append(str(thread_count() or 0))
    command = worker_command(_WORKER, arguments)
    with (
        TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as worker,
    ):
        try:
            yield OrtTrainingSession(worker, errors, parameters)
        finally:
            worker.kill()
            # What the worker did not take any more cannot be sent.
            with suppress(BrokenPipeError):
                cast(IO[bytes], worker.stdin).close()


class OrtTrainingSession:
    """A model in training in a worker process."""

    def __init__(self, worker: subprocess.Popen[bytes], errors: IO[bytes], parameters: Parameters) -> None:
        self._worker, self._errors = worker, errors
        self._requests, self._answers = cast(IO[bytes], worker.stdin), cast(IO[bytes], worker.stdout)
        self._receive()
        self._ask("parameters", {}, parameters)

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `edgetune.runtimes.contract.Session.step`."""
        total = sum(batch.trained_tokens for batch in batches)
        shares = [batch.trained_tokens / total for batch in batches]
        arrays = {f"{i}/{name}": array for i, batch in enumerate(batches) for name, array in batch.tensors().items()}
        answer, _ = self._ask("step", {"shares": shares, "learning_rate": learning_rate}, arrays)
        return StepResult(answer["loss"], answer["grad_norm"], answer["applied"])

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.contract.Session.evaluate`."""
        answer, _ = self._ask("evaluate", {}, batch.tensors())
        return float(answer["loss"])

    def adapter(self) -> Parameters:
        """See `edgetune.runtimes.contract.Session.adapter`."""
        _, arrays = self._ask("adapter", {}, {})
        return cast(Parameters, arrays)

    def state(self) -> SessionState:
        """See `edgetune.runtimes.contract.Session.state`: ONNX Runtime's own file, as bytes."""
        _, arrays = self._ask("state", {}, {})
        return arrays

    def restore(self, state: SessionState) -> None:
        """See `edgetune.runtimes.contract.Session.restore`."""
        self._ask("restore", {}, state)

    def _ask(
        self, request: str, header: Mapping[str, object], arrays: Mapping[str, np.ndarray[Any, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            wire.send(self._requests, {"request": request, **header}, arrays)
        except BrokenPipeError:
            raise self._failure() from None
        return self._receive()

    def _receive(self) -> tuple[dict[str, Any], dict[str, Any]]:
        message = wire.receive(self._answers)
        if message is None:
            raise self._failure()
        return message

    def _failure(self) -> EdgetuneError:
        code = self._worker.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        reason = said.splitlines()[-1] if said else f"exit code {code}"
        ended = f"the ONNX Runtime Training worker ended: {reason}"
        if lack := lack_of_process(code, said):
            return ResourceError(f"{ended}\n{ADVICE[lack]}")
        return EdgetuneError(ended)


RUNTIME = Runtime(abilities, version, open_session, install=install)
