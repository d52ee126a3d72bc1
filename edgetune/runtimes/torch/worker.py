"""One process's share of the work: the same calls come to the workers of all processes, in the same order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgetune.config import Sharding
from edgetune.formats.bundle import Bundle
from edgetune.machine.threads import thread_count
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import OptimizerConfig, SessionState, StepResult
from edgetune.runtimes.torch.engines import MOMENTS, Arrays, open_engine
from edgetune.runtimes.torch.network import Source
from edgetune.runtimes.torch.processes import Processes

STEPS = "steps"
"""Of a saved state: updates that were done."""
Tensors = Mapping[str, NDArray[np.generic]]


class Worker:
    """A network, whole or a share of it, and its optimizer.

    Args:
        processes: Those that train together.
        bundle: What is trained, verified.
        parameters: The adapter that it begins with.
        optimizer: Weight decay and clipping.
        sharding: What is divided between the processes.

    Raises:
        MissingDependencyError: The engine's package is not installed.
    """

    def __init__(
        self,
        processes: Processes,
        bundle: Bundle,
        parameters: Parameters,
        optimizer: OptimizerConfig,
        sharding: Sharding,
    ) -> None:
        if count := thread_count():
            torch.set_num_threads(count)
        device = processes.device
        # bfloat16 has float32's range: nothing needs to be scaled.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        source = Source(bundle, parameters, device, dtype)
        self._processes, self._device, self._steps = processes, device, 0
        self._engine = open_engine(sharding, source, optimizer, processes)

    def step(self, shares: Sequence[tuple[Tensors, float]], learning_rate: float) -> StepResult:
        """One optimizer step.

        Args:
            shares: The batches of this process, and by what each one's summed loss is multiplied: the number of
                processes, whose mean is taken, divided by the trained tokens of the step; 0 for a batch that another
                one counts.
            learning_rate: For AdamW.
        """
        spent = torch.zeros((), device=self._device)
        for index, (tensors, weight) in enumerate(shares):
            loss = self._engine.network(self._on_device(tensors)) * weight
            self._engine.backward(loss, last=index == len(shares) - 1)
            spent += loss.detach()
        loss_value = float(self._processes.total(spent)) / self._processes.count
        norm = self._engine.norm()
        applied = math.isfinite(loss_value) and math.isfinite(norm)
        if applied:
            self._engine.update(learning_rate, norm)
            self._steps += 1
        return StepResult(loss_value, norm, applied)

    @torch.no_grad()
    def evaluate(self, tensors: Tensors) -> float:
        """Summed loss of a batch; all processes compute the same."""
        return float(self._engine.network(self._on_device(tensors)))

    def arrays(self, kind: str) -> Arrays:
        """See `Engine.arrays`."""
        return self._engine.arrays(kind)

    def state(self) -> dict[str, NDArray[Any]]:
        """Parameters, moments and the number of updates."""
        found: dict[str, NDArray[Any]] = {STEPS: np.array(self._steps)}
        for kind in ("p", *MOMENTS):
            found |= {f"{kind}/{name}": array for name, array in self.arrays(kind).items()}
        return found

    def restore(self, state: SessionState) -> None:
        """Go on where `state` was."""
        self._steps = int(state[STEPS])
        for kind in ("p", *MOMENTS):
            values = {
                name.removeprefix(f"{kind}/"): array for name, array in state.items() if name.startswith(f"{kind}/")
            }
            self._engine.set_arrays(kind, values, self._steps)

    def _on_device(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array).to(self._device) for name, array in tensors.items()}
