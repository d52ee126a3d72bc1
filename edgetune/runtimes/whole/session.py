"""Training on the portable graphs, the optimizer on stock ONNX Runtime.

Parameters, gradients and optimizer state stay in buffers that the graphs read and write through I/O binding; none is
copied, only gradients of further passes are added up. The optimizer writes to a second set of buffers, and the
two sets change places when the step is good: a step that is not finite leaves everything as it was. Who computes the
gradients is exchangeable: the CPU here, or an accelerator (`edgetune.runtimes.whole`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.formats.bundle import Bundle
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import OptimizerConfig, SessionState, StepResult
from edgetune.runtimes.onnx_session import open_graph

_STATES = ("", ".exp_avg", ".exp_avg_sq")
"""Suffixes of what the optimizer updates: a parameter and its two moments."""
_STEPS = "steps"
"""Of a session's state: how many were done."""

Buffers = dict[str, ort.OrtValue]


class TrainingGraphs(Protocol):
    """Loss and gradients of a batch."""

    def gradients(
        self, batch: Batch, share: float, parameters: Buffers, sums: Mapping[str, NDArray[np.float32]]
    ) -> float:
        """Loss of a batch; the gradient of share · loss is written into `sums`, which has `P.grad` for every P."""
        ...

    def loss(self, batch: Batch, parameters: Buffers) -> float:
        """Loss of a batch."""
        ...


class CpuGraphs:
    """The graphs `step` and `loss` on stock ONNX Runtime.

    Args:
        bundle: Has the graphs; each is loaded when it is first needed.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def gradients(
        self, batch: Batch, share: float, parameters: Buffers, sums: Mapping[str, NDArray[np.float32]]
    ) -> float:
        """See `TrainingGraphs.gradients`."""
        feed = {**_inputs(batch), "loss_scale": _vector(share), **parameters}
        # An OrtValue on the CPU shares the array's memory.
        outputs = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in sums.items()}
        return _run(self._step, feed, outputs, "loss")

    def loss(self, batch: Batch, parameters: Buffers) -> float:
        """See `TrainingGraphs.loss`."""
        return _run(self._loss, {**_inputs(batch), **parameters}, {}, "loss")

    @cached_property
    def _step(self) -> ort.InferenceSession:
        return open_graph(self._bundle.file("step"))

    @cached_property
    def _loss(self) -> ort.InferenceSession:
        return open_graph(self._bundle.file("loss"))


class PortableSession:
    """A model in training on the portable graphs.

    Args:
        bundle: Has the graph `adamw`.
        parameters: First values of the LoRA parameters.
        optimizer: What AdamW takes.
        graphs: Compute loss and gradients.
    """

    def __init__(
        self, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, graphs: TrainingGraphs
    ) -> None:
        self._graphs = graphs
        self._names = list(parameters)
        self._adamw = open_graph(bundle.file("adamw"))
        self._steps_done = 0
        self._hyperparameters = {
            "weight_decay": _vector(optimizer.weight_decay),
            "max_grad_norm": _vector(optimizer.max_grad_norm),
        }
        self._state, self._next_state = (
            {
                name + suffix: _owned(array if not suffix else np.zeros_like(array))
                for name, array in parameters.items()
                for suffix in _STATES
            }
            for _ in range(2)
        )
        # The accumulated gradient, and where a pass puts its own.
        self._sums, self._pass_sums = (
            {f"{name}.grad": np.zeros_like(array) for name, array in parameters.items()} for _ in range(2)
        )
        self._gradients = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._sums.items()}

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `edgetune.runtimes.contract.Session.step`."""
        loss = self._accumulate(batches)
        progress = {"learning_rate": _vector(learning_rate), "step": _vector(self._steps_done + 1)}
        outputs = {f"{name}.next": value for name, value in self._next_state.items()}
        norm = _run(
            self._adamw, {**progress, **self._hyperparameters, **self._state, **self._gradients}, outputs, "grad_norm"
        )
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            self._state, self._next_state = self._next_state, self._state
            self._steps_done += 1
        return StepResult(loss, norm, applied)

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.contract.Session.evaluate`."""
        return self._graphs.loss(batch, self._parameters())

    def adapter(self) -> Parameters:
        """See `edgetune.runtimes.contract.Session.adapter`."""
        return {name: value.numpy().copy() for name, value in self._parameters().items()}

    def state(self) -> SessionState:
        """See `edgetune.runtimes.contract.Session.state`."""
        arrays: dict[str, NDArray[Any]] = {name: value.numpy() for name, value in self._state.items()}
        return {**arrays, _STEPS: np.array(self._steps_done, np.int64)}

    def restore(self, state: SessionState) -> None:
        """See `edgetune.runtimes.contract.Session.restore`."""
        for name, value in self._state.items():
            value.update_inplace(np.ascontiguousarray(state[name], np.float32))
        self._steps_done = int(state[_STEPS])

    def set_parameter(self, name: str, values: NDArray[np.float32]) -> None:
        """Give a LoRA parameter other values; they are copied."""
        self._state[name].update_inplace(np.ascontiguousarray(values))

    def gradients(self) -> Parameters:
        """The last step's gradients, before clipping, until the next step."""
        return {name: self._sums[f"{name}.grad"] for name in self._names}

    def _parameters(self) -> Buffers:
        return {name: self._state[name] for name in self._names}

    def _accumulate(self, batches: Sequence[Batch]) -> float:
        """Fill the gradient of the mean loss over all trained tokens of the passes; returns that loss."""
        total = sum(batch.trained_tokens for batch in batches)
        loss = 0.0
        for index, batch in enumerate(batches):
            share = batch.trained_tokens / total
            sums = self._pass_sums if index else self._sums
            loss += share * self._graphs.gradients(batch, share, self._parameters(), sums)
            if index:
                for name, array in self._sums.items():
                    array += self._pass_sums[name]
        return loss


class PortableForward:
    """The portable graph `loss` alone; see `edgetune.runtimes.contract.Forward`.

    Args:
        parameters: First values of the LoRA parameters.
        graphs: Compute the loss.
    """

    def __init__(self, parameters: Parameters, graphs: TrainingGraphs) -> None:
        self._graphs = graphs
        self._parameters = {name: _owned(array) for name, array in parameters.items()}

    def set_parameter(self, name: str, values: NDArray[np.float32]) -> None:
        """See `edgetune.runtimes.contract.Forward.set_parameter`."""
        self._parameters[name].update_inplace(np.ascontiguousarray(values))

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.contract.Forward.evaluate`."""
        return self._graphs.loss(batch, self._parameters)


def _inputs(batch: Batch) -> Buffers:
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in batch.tensors().items()}


def _run(
    session: ort.InferenceSession, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue], scalar: str
) -> float:
    """Run with every tensor bound in place; the output called `scalar` (1,) is returned as a number."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    result = _vector(0.0)
    binding.bind_ortvalue_output(scalar, result)
    session.run_with_iobinding(binding)
    return float(result.numpy()[0])


def _vector(number: float) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.array([number], dtype=np.float32))


def _owned(array: NDArray[np.float32]) -> ort.OrtValue:
    """A buffer that starts as a copy of `array`."""
    return ort.OrtValue.ortvalue_from_numpy(np.array(array, dtype=np.float32, order="C", copy=True))
