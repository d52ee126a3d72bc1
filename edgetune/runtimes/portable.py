"""The portable graphs on stock ONNX Runtime.

Parameters, gradients and optimizer state stay in buffers that the graphs read and write through I/O binding; none is
copied, only gradients of further micro-batches are added up. The optimizer writes to a second set of buffers, and the
two sets change places when the step is good: a step that is not finite leaves everything as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgetune.bundle import Bundle
from edgetune.data.batches import Batch
from edgetune.onnx_session import open_graph
from edgetune.runtimes import OptimizerConfig, Parameters, StepResult

_STATES = ("", ".exp_avg", ".exp_avg_sq")
"""Suffixes of what the optimizer updates: a parameter and its two moments."""

Buffers = dict[str, ort.OrtValue]


class PortableSession:
    """A model in training on the portable graphs."""

    def __init__(self, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig) -> None:
        self._bundle = bundle
        self._names = list(parameters)
        self._step = open_graph(bundle.file("step"))
        self._adamw = open_graph(bundle.file("adamw"))
        self._loss: ort.InferenceSession | None = None
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
        # The accumulated gradient, and where a micro-batch puts its own.
        self._sums, self._micro_sums = (
            {f"{name}.grad": np.zeros_like(array) for name, array in parameters.items()} for _ in range(2)
        )
        # An OrtValue on the CPU shares the array's memory.
        self._gradients, self._micro_gradients = (
            {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in sums.items()}
            for sums in (self._sums, self._micro_sums)
        )

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `edgetune.runtimes.Session.step`."""
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
        """See `edgetune.runtimes.Session.evaluate`."""
        if self._loss is None:
            self._loss = open_graph(self._bundle.file("loss"))
        feed = {**_inputs(batch), **self._parameters()}
        return _run(self._loss, feed, {}, "loss")

    def adapter(self) -> Parameters:
        """See `edgetune.runtimes.Session.adapter`."""
        return {name: value.numpy().copy() for name, value in self._parameters().items()}

    def gradients(self) -> Parameters:
        """The last step's gradients, before clipping, until the next step."""
        return {name: self._sums[f"{name}.grad"] for name in self._names}

    def _parameters(self) -> Buffers:
        return {name: self._state[name] for name in self._names}

    def _accumulate(self, batches: Sequence[Batch]) -> float:
        """Fill the gradient of the mean loss over all trained tokens of the micro-batches; returns that loss."""
        total = sum(batch.trained_tokens for batch in batches)
        loss = 0.0
        for index, batch in enumerate(batches):
            share = batch.trained_tokens / total
            feed = {**_inputs(batch), "loss_scale": _vector(share), **self._parameters()}
            loss += share * _run(self._step, feed, self._micro_gradients if index else self._gradients, "loss")
            if index:
                for name, array in self._sums.items():
                    array += self._micro_sums[name]
        return loss


class PortableForward:
    """The portable graph `loss` alone; see `edgetune.runtimes.Forward`."""

    def __init__(self, bundle: Bundle, parameters: Parameters) -> None:
        self._loss = open_graph(bundle.file("loss"))
        self._parameters = {name: _owned(array) for name, array in parameters.items()}

    def set_parameter(self, name: str, values: NDArray[np.float32]) -> None:
        """See `edgetune.runtimes.Forward.set_parameter`."""
        self._parameters[name].update_inplace(np.ascontiguousarray(values))

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.Forward.evaluate`."""
        return _run(self._loss, {**_inputs(batch), **self._parameters}, {}, "loss")


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
