"""A bundle's graphs on an accelerator, compiled for every shape that occurs, with loss scaling."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.formats.bundle import Bundle
from edgetune.formats.roles import LOSS, STEP
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import OptimizerConfig, SessionState
from edgetune.runtimes.placement import Placement
from edgetune.runtimes.whole.first_batch import LARGEST_HALF, FirstBatch
from edgetune.runtimes.whole.loss_scale import LossScale
from edgetune.runtimes.whole.session import Buffers, PortableForward, PortableSession

Arrays = Mapping[str, NDArray[Any]]
_LOSS_SCALE = "loss_scale"
"""Of a session's state."""
_MOST_GRAPHS = 8
"""Compiled graphs that are held at a time, each with the frozen weights; the one that was not used for longest goes."""


class CompiledGraph(Protocol):
    """A graph whose shapes are fixed."""

    @property
    def placement(self) -> Placement:
        """Where its nodes run."""
        ...

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Compute the named outputs.

        Raises:
            EdgetuneError: The accelerator failed; nothing else is tried in its place.
        """
        ...


class Compiler(Protocol):
    """Compiles the graphs of one bundle for one accelerator."""

    def compile(self, role: str, batch: int, length: int) -> CompiledGraph:
        """Compile a graph for B sequences of T positions.

        Raises:
            IncompatibleError: The accelerator does not take it, or not all of it where all was asked for.
        """
        ...


class AcceleratorGraphs:
    """See `edgetune.runtimes.whole.session.TrainingGraphs`.

    Args:
        compiler: Of the accelerator.
        step: Role of the graph that gives loss and gradients.
        loss: Role of the graph that gives the loss.
        first: Compares the first batch with float32, where the accelerator computes in less.
    """

    def __init__(
        self, compiler: Compiler, step: str = STEP, loss: str = LOSS, first: FirstBatch | None = None
    ) -> None:
        self._compiler, self._first = compiler, first
        self._step, self._loss = step, loss
        self._graphs: OrderedDict[tuple[str, int, int], CompiledGraph] = OrderedDict()
        self.scale = LossScale()
        self.placements: dict[tuple[str, int, int], Placement] = {}
        """Of every graph that was compiled."""

    def gradients(
        self, batch: Batch, share: float, parameters: Buffers, sums: Mapping[str, NDArray[Any]]
    ) -> float:
        """Loss of a batch; the gradient of share · loss is written into `sums`.

        Raises:
            IncompatibleError: The session's first batch is too far from float32.
        """
        graph = self._graph(self._step, batch)
        feed = {**batch.tensors(), **_arrays(parameters)}
        while True:
            scale = self.scale.of(batch.trained_tokens)
            loss, *found = graph.run({**feed, "loss_scale": np.array([scale], np.float32)}, ["loss", *sums])
            if all(_fits(array) for array in found):
                self.scale.fitted()
                break
            if not np.isfinite(loss).all():
                break  # no scale helps
            if not self.scale.overflowed():
                # The caller sees what is not finite and drops the step; a saturated number would pass for a gradient:
                # an accelerator that saturates instead of overflowing gives float16's largest.
                found = [np.where(np.abs(array) < LARGEST_HALF, array, np.inf) for array in found]
                break
        for out, array in zip(sums.values(), found, strict=True):
            np.multiply(array, np.float32(share / scale), out=out)
        result = float(loss.reshape(-1)[0])
        if self._first is not None:
            self._first.gradients(graph.placement.provider, batch, share, parameters, result, sums)
        return result

    def loss(self, batch: Batch, parameters: Buffers) -> float:
        """Loss of a batch.

        Raises:
            IncompatibleError: The session's first loss is too far from float32.
        """
        graph = self._graph(self._loss, batch)
        (loss,) = graph.run({**batch.tensors(), **_arrays(parameters)}, ["loss"])
        result = float(loss.reshape(-1)[0])
        if self._first is not None:
            self._first.loss(graph.placement.provider, batch, parameters, result)
        return result

    def _graph(self, role: str, batch: Batch) -> CompiledGraph:
        key = (role, *batch.input_ids.shape)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        else:
            if len(self._graphs) == _MOST_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._compiler.compile(*key)
            self.placements[key] = self._graphs[key].placement
        return self._graphs[key]


def _arrays(values: Mapping[str, ort.OrtValue]) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in values.items()}


def _fits(array: NDArray[Any]) -> bool:
    return bool((np.abs(array) < LARGEST_HALF).all())


class _Placing:
    """Tells where graphs run."""

    _placed: AcceleratorGraphs

    def placements(self) -> list[Placement]:
        """Where the graphs run that were compiled so far."""
        return list(self._placed.placements.values())


class AcceleratorSession(_Placing, PortableSession):
    """A model in training whose loss and gradients an accelerator computes.

    AdamW, its moments and the parameters stay in float32 on the CPU. The parameters are inputs of the compiled graph,
    so that a step changes values only.
    """

    def __init__(
        self, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, graphs: AcceleratorGraphs
    ) -> None:
        super().__init__(bundle, parameters, optimizer, graphs)
        self._placed = graphs

    def state(self) -> SessionState:
        """See `edgetune.runtimes.contract.Session.state`; the loss scale is a part of it."""
        return {**super().state(), _LOSS_SCALE: np.array(self._placed.scale.state, np.int64)}

    def restore(self, state: SessionState) -> None:
        """See `edgetune.runtimes.contract.Session.restore`."""
        super().restore(state)
        self._placed.scale.restore(state[_LOSS_SCALE].tolist())


class AcceleratorForward(_Placing, PortableForward):
    """A model whose loss an accelerator computes; the parameters are inputs of the compiled graph."""

    def __init__(self, parameters: Parameters, graphs: AcceleratorGraphs) -> None:
        super().__init__(parameters, graphs)
        self._placed = graphs
