"""AdamW over all LoRA parameters as one flat vector, updated in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgetune.model.adamw import clip_factor
from edgetune.model.lora import LORA_B
from edgetune.runtimes.contract import OptimizerConfig, SessionState
from edgetune.runtimes.layered.parameters import Array, FlatParameters
from edgetune.runtimes.onnx_session import open_graph

_STRETCH = 1 << 20
"""Elements updated at a time: what lies between the graph's operators stays in the cache."""


class FlatAdamW(FlatParameters):
    """The parameters, their gradients and moments.

    Args:
        graph: The bundle's `adamw_flat` graph.
        parameters: First values; they are copied.
        config: Decay and clipping.
    """

    def __init__(self, graph: Path, parameters: Mapping[str, Array], config: OptimizerConfig) -> None:
        super().__init__(parameters)
        self._session = open_graph(graph)
        self._config = config
        self._steps_done = 0
        self._stretches = self._of_rates(config.lora_plus_ratio)
        self._gradient, self._exp_avg, self._exp_avg_sq = (np.zeros(self._size, dtype=np.float32) for _ in range(3))

    def gradient(self, name: str) -> Array:
        """Where a parameter's gradient goes."""
        return self._view(self._gradient, name)

    def forget_gradients(self) -> None:
        """Set every gradient to zero."""
        self._gradient.fill(0)

    def state(self) -> SessionState:
        """Parameters and moments as flat vectors (parameters of all slots,), and how many steps were done."""
        return {**self._updated(), "steps": np.array(self._steps_done, np.int64)}

    def restore(self, state: SessionState) -> None:
        """Take over what another one's `state` gave."""
        for name, array in self._updated().items():
            array[...] = state[name]
        self._steps_done = int(state["steps"])

    def step(self, learning_rate: float, loss: float) -> tuple[float, bool]:
        """Clip and update.

        Args:
            learning_rate: Of this step.
            loss: When it is not finite, nothing is changed.

        Returns:
            The gradient's global 2-norm before clipping; whether the step was applied.
        """
        starts = range(0, self._gradient.size, _STRETCH)
        norm = math.sqrt(sum(float(np.dot(g, g)) for g in (self._gradient[i : i + _STRETCH] for i in starts)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return norm, False
        self._steps_done += 1
        scalars = {
            "weight_decay": self._config.weight_decay,
            "step": self._steps_done,
            "clip": clip_factor(norm, self._config.max_grad_norm),
        }
        vectors = {name: np.array([value], dtype=np.float32) for name, value in scalars.items()}
        for stretch, ratio in self._stretches:
            self._update(stretch, {**vectors, "learning_rate": np.array([ratio * learning_rate], np.float32)})
        return norm, True

    def _of_rates(self, ratio_of_b: float) -> list[tuple[slice, float]]:
        """Stretches of the flat vector that are updated at a time, and by what their learning rate is multiplied."""
        rates: list[tuple[int, int, float]] = []
        for name, (start, shape) in self._places.items():
            stop, ratio = start + math.prod(shape), ratio_of_b if LORA_B in name else 1.0
            # Neighbours of the same rate are one.
            begin = rates.pop()[0] if rates and rates[-1][2] == ratio else start
            rates.append((begin, stop, ratio))
        return [
            (slice(at, min(at + _STRETCH, stop)), ratio)
            for start, stop, ratio in rates
            for at in range(start, stop, _STRETCH)
        ]

    def _update(self, stretch: slice, vectors: Mapping[str, Array]) -> None:
        binding = self._session.io_binding()
        for name, array in vectors.items():
            _bind(binding.bind_input, name, array)
        _bind(binding.bind_input, "gradient", self._gradient[stretch])
        for name, array in self._updated().items():
            # In place: every operator works element by element, and reads an old value before it writes the new.
            _bind(binding.bind_input, name, array[stretch])
            _bind(binding.bind_output, f"{name}.next", array[stretch])
        self._session.run_with_iobinding(binding)

    def _updated(self) -> dict[str, Array]:
        """What a step changes, by its name in the graph."""
        return {"parameter": self._parameter, "exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}


def _bind(bind: object, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)  # type: ignore[operator]
