"""A model in training in the layered form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.bundle import Bundle
from edgetune.data.batches import Batch
from edgetune.data.encode import IGNORED
from edgetune.execution import ExecutionPlan
from edgetune.frozen import LAYERS, FrozenWeights
from edgetune.runtimes import OptimizerConfig, Parameters, StepResult
from edgetune.runtimes.layered.backend import Arrays, Backend, LayeredGraph
from edgetune.runtimes.layered.head import Head
from edgetune.runtimes.layered.optimizer import FlatAdamW
from edgetune.runtimes.layered.weights import LinearWeights

_EMBEDDING = "model.embed_tokens.weight"
_SUBLAYERS = ("attention", "mlp")


class LayeredSession:
    """Runs a bundle's layered graphs on a backend; see `edgetune.runtimes.Session`."""

    def __init__(
        self, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan, backend: Backend
    ) -> None:
        folder = bundle.path / LAYERS
        self._backend = backend
        self._architecture = bundle.manifest.architecture
        self._layers = self._architecture.num_hidden_layers
        self._first_kept = self._layers - plan.kept_layers
        self._frozen = FrozenWeights(bundle.path)
        self._linear = LinearWeights(self._frozen, backend, plan.resident)
        self._optimizer = FlatAdamW(folder / "adamw_flat.onnx", parameters, optimizer)
        self._names = list(parameters)
        graphs = [f"{name}{suffix}" for name in _SUBLAYERS for suffix in ("", "_grad", "_grad_kept")]
        self._graphs = {name: backend.load(folder / f"{name}.onnx") for name in graphs}
        self._head = Head(folder, backend, self._frozen, self._linear, plan.head_rows)
        self._arrays = _Arrays(backend)

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """See `edgetune.runtimes.Session.step`."""
        total = sum(batch.trained_tokens for batch in batches)
        loss = sum(self._accumulate(batch, 1 / total, first=not index) for index, batch in enumerate(batches))
        norm, applied = self._optimizer.step(learning_rate, loss)
        return StepResult(loss, norm, applied)

    def evaluate(self, batch: Batch) -> float:
        """See `edgetune.runtimes.Session.evaluate`."""
        hidden = self._forward(batch, for_backward=False)
        rows, labels = _trained(batch)
        return float(self._head.losses(self._rows(hidden, rows), labels).mean())

    def adapter(self) -> Parameters:
        """See `edgetune.runtimes.Session.adapter`."""
        return {name: self._optimizer.parameter(name).copy() for name in self._names}

    def gradients(self) -> Parameters:
        """A copy of the last step's gradients, before clipping."""
        return {name: self._optimizer.gradient(name).copy() for name in self._names}

    def _accumulate(self, batch: Batch, scale: float, first: bool) -> float:
        """Add the gradient of scale · Σ losses to the optimizer's, or replace it; returns scale · Σ losses."""
        hidden = self._forward(batch, for_backward=True)
        rows, labels = _trained(batch)
        losses, d_rows = self._head.step(self._rows(hidden, rows), labels, scale)
        d_hidden = np.zeros((hidden.size // hidden.shape[-1], hidden.shape[-1]), dtype=np.float32)
        d_hidden[rows] = d_rows
        self._backward(batch, d_hidden.reshape(hidden.shape), first)
        return scale * float(losses.sum(dtype=np.float64))

    def _forward(self, batch: Batch, *, for_backward: bool) -> NDArray[Any]:
        """The last hidden state (batch, sequence, hidden_size), in storage."""
        tables = self._tables(batch)
        self._arrays.fit(batch.input_ids.shape)
        shape = (*batch.input_ids.shape, self._frozen.shape(_EMBEDDING)[1])
        hidden = self._arrays.of("hidden.0", shape)
        self._backend.store(self._frozen.plain(_EMBEDDING)[batch.input_ids], hidden)
        for place in range(2 * self._layers):
            layer, name = place // 2, _SUBLAYERS[place % 2]
            graph = self._graphs[name]
            keep = for_backward and layer >= self._first_kept
            label = place + 1 if for_backward else (place + 1) % 2
            output = self._arrays.of(f"hidden.{label}", shape)
            kept = self._kept(graph, layer if keep else "scratch", batch)
            graph.run({**tables, **self._weights(graph, layer), "hidden": hidden}, {"output": output, **kept})
            hidden = output
        return hidden

    def _backward(self, batch: Batch, d_output: NDArray[np.float32], first: bool) -> None:
        tables = self._tables(batch)
        shape = d_output.shape
        gradient = self._arrays.of("gradient.0", shape)
        self._backend.store(d_output, gradient)
        for place in reversed(range(2 * self._layers)):
            layer, name = place // 2, _SUBLAYERS[place % 2]
            kept: Arrays = {}
            graph = self._graphs[f"{name}_grad"]
            if layer >= self._first_kept:
                graph = self._graphs[f"{name}_grad_kept"]
                kept = self._kept(self._graphs[name], layer, batch)
            following = self._arrays.of(f"gradient.{place % 2 + 1}", shape)
            trained = [output for output in graph.outputs if output != "hidden.grad"]
            targets = {f"model.layers.{layer}.{output.removesuffix('.grad')}": output for output in trained}
            sums = {output: self._optimizer.gradient(parameter) for parameter, output in targets.items()}
            results = sums if first else {output: np.empty_like(array) for output, array in sums.items()}
            hidden = self._arrays.of(f"hidden.{place}", shape)
            inputs = {**tables, **self._weights(graph, layer), **kept, "hidden": hidden, "output.grad": gradient}
            graph.run(inputs, {"hidden.grad": following, **results})
            if not first:
                for output, array in sums.items():
                    array += results[output]
            gradient = following

    def _weights(self, graph: LayeredGraph, layer: int) -> dict[str, NDArray[Any]]:
        """Frozen and trained parameters of a layer's sublayer, by the graph's names."""
        found: dict[str, NDArray[Any]] = {}
        linear = {}
        for name in graph.inputs:
            full = f"model.layers.{layer}.{name}"
            if ".lora_" in name:
                found[name] = self._optimizer.parameter(full)
            elif name.endswith("layernorm.weight"):
                found[name] = self._frozen.plain(full)
            elif name.endswith(".weight"):
                linear[full] = name
        found.update({linear[full]: array for full, array in self._linear.take(linear).items()})
        return found

    def _kept(self, graph: LayeredGraph, place: object, batch: Batch) -> dict[str, NDArray[Any]]:
        """Where a layer's activations are kept."""
        a = self._architecture
        rows, columns = batch.input_ids.shape
        queries = a.num_attention_heads * a.head_dim
        shapes = {
            "qkv": (rows, columns, queries + 2 * a.num_key_value_heads * a.head_dim),
            "context": (rows, a.num_attention_heads, columns, a.head_dim),
            "gate_up": (rows, columns, 2 * a.intermediate_size),
        }
        return {name: self._arrays.of(f"{name}.{place}", shapes[name]) for name in graph.outputs if name != "output"}

    def _tables(self, batch: Batch) -> dict[str, NDArray[Any]]:
        tables = {"attn_bias": batch.attn_bias, "rope_cos": batch.rope_cos, "rope_sin": batch.rope_sin}
        # A graph is given the address of an array, not its strides.
        return {name: np.ascontiguousarray(table) for name, table in tables.items()}

    def _rows(self, hidden: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._backend.restore(hidden.reshape(-1, hidden.shape[-1])[rows])


class _Arrays:
    """Arrays of the batch's shape, made once and used again while the shape stays."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._shape: tuple[int, ...] = ()
        self._arrays: dict[str, NDArray[Any]] = {}

    def fit(self, shape: tuple[int, ...]) -> None:
        """Forget everything when the batch has another shape than before."""
        if shape != self._shape:
            self._arrays.clear()
            self._shape = shape

    def of(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = np.empty(shape, dtype=self._backend.storage)
        return self._arrays[name]


def _trained(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the trained positions among all, and their labels."""
    labels = batch.labels.reshape(-1)
    rows = np.flatnonzero(labels != IGNORED)
    return rows, labels[rows]
