"""AdamW over all LoRA parameters as one flat vector, updated in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.model.adamw import clip_factor
from edgetune.model.dynamic_code import BLOCK
from edgetune.model.lora import LORA_B
from edgetune.runtimes.contract import OptimizerConfig, SessionState
from edgetune.runtimes.layered.moments import STRETCH, CodedMoment, ExactMoment, Moment
from edgetune.runtimes.layered.parameters import Array, FlatParameters
from edgetune.runtimes.onnx_session import open_graph


class FlatAdamW(FlatParameters):
    """The parameters, their gradients and moments.

    Args:
        graph: The bundle's `adamw_flat` graph.
        parameters: First values; they are copied.
        config: Decay and clipping.
        eight_bit: Keep the moments in 8 bits between steps. No block of them has numbers of two parameters, whose
            gradients may differ in size.
    """

    def __init__(
        self, graph: Path, parameters: Mapping[str, Array], config: OptimizerConfig, *, eight_bit: bool = False
    ) -> None:
        super().__init__(parameters, multiple=BLOCK if eight_bit else 1)
        self._session = open_graph(graph)
        self._config = config
        self._steps_done = 0
        self._stretches = self._of_rates(config.lora_plus_ratio)
        self._gradient = np.zeros(self._size, dtype=np.float32)
        signs = {"exp_avg": True, "exp_avg_sq": False}
        self._moments: dict[str, Moment] = {
            name: CodedMoment(self._size, signed=signed) if eight_bit else ExactMoment(self._size)
            for name, signed in signs.items()
        }

    def gradient(self, name: str) -> Array:
        """Where a parameter's gradient goes."""
        return self._view(self._gradient, name)

    def forget_gradients(self) -> None:
        """Set every gradient to zero."""
        self._gradient.fill(0)

    def state(self) -> SessionState:
        """Parameters and moments as flat vectors (parameters of all slots,), and how many steps were done.

        Moments in 8 bits are codes and scales.
        """
        return {**self._arrays(), "steps": np.array(self._steps_done, np.int64)}

    def restore(self, state: SessionState) -> None:
        """Take over what another one's `state` gave."""
        for name, array in self._arrays().items():
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
        starts = range(0, self._gradient.size, STRETCH)
        norm = math.sqrt(sum(float(np.dot(g, g)) for g in (self._gradient[i : i + STRETCH] for i in starts)))
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
        starts = [start for start, _ in self._places.values()]
        for name, start, stop in zip(self._places, starts, [*starts[1:], self._size], strict=True):
            ratio = ratio_of_b if LORA_B in name else 1.0
            # Neighbours of the same rate are one.
            begin = rates.pop()[0] if rates and rates[-1][2] == ratio else start
            rates.append((begin, stop, ratio))
        return [
            (slice(at, min(at + STRETCH, stop)), ratio)
            for start, stop, ratio in rates
            for at in range(start, stop, STRETCH)
        ]

    def _update(self, stretch: slice, vectors: Mapping[str, Array]) -> None:
        binding = self._session.io_binding()
        for name, array in vectors.items():
            _bind(binding.bind_input, name, array)
        _bind(binding.bind_input, "gradient", self._gradient[stretch])
        with ExitStack() as opened:
            updated = {name: opened.enter_context(moment.opened(stretch)) for name, moment in self._moments.items()}
            for name, array in {"parameter": self._parameter[stretch], **updated}.items():
                # In place: every operator works element by element, and reads an old value before it writes the new.
                _bind(binding.bind_input, name, array)
                _bind(binding.bind_output, f"{name}.next", array)
            self._session.run_with_iobinding(binding)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """All that steps change, by its name in a state."""
        moments = {name + suffix: array for name, of in self._moments.items() for suffix, array in of.state().items()}
        return {"parameter": self._parameter, **moments}


def _bind(bind: object, name: str, array: Array) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)  # type: ignore[operator]
