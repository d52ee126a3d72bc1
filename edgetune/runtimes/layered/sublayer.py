"""One sublayer of every layer: its graphs, run piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import VerificationError
from edgetune.formats.bundle import Bundle
from edgetune.formats.layered_graphs import kept_outputs, pieces_of
from edgetune.formats.roles import SCALES, sublayer_role
from edgetune.model.lora import GAIN
from edgetune.model.pieces import LAYER_PREFIX, Slice, attention_slices, mlp_slices
from edgetune.runtimes.layered.backend import Arrays, Backend, LayeredGraph
from edgetune.runtimes.layered.gains import Gains
from edgetune.runtimes.layered.parameters import Array
from edgetune.runtimes.layered.weights import LinearWeights, weight_and_layout
from edgetune.runtimes.layered.workspace import Workspace

AnyArray = NDArray[Any]
AGAIN = "again"
"""Where a layer that is computed again keeps its activations until its backward pass."""
_NORM, _PROJECTED = "norm.weight", ".projected"
_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class _PieceGraph:
    """A graph, and what it takes of a layer's parameters: for each piece its inputs' slices."""

    run: Callable[[Arrays, Arrays, Hashable], None]
    outputs: tuple[str, ...]
    linear: list[dict[str, Slice]]
    trained: list[dict[str, Slice]]
    of_layers: dict[tuple[int, int], tuple[dict[str, Slice], dict[str, Array]]] = field(default_factory=dict)
    """Of each layer and piece that ran: its frozen slices by their whole names, and views of its LoRA parameters."""


def _piece_graph(graph: LayeredGraph, pieces: Sequence[Mapping[str, Slice]]) -> _PieceGraph:
    linear, trained = [], []
    for slices in pieces:
        taken = {name: slices[weight] for name in graph.inputs if (weight := weight_and_layout(name)[0]) in slices}
        trained.append({name: slice_ for name, slice_ in taken.items() if ".lora_" in name})
        given = (_NORM, *trained[-1])
        linear.append({n: slice_ for n, slice_ in taken.items() if n not in given and not n.endswith(SCALES)})
    return _PieceGraph(graph.run, graph.outputs, linear, trained)


class SublayerRunner:
    """Forward and backward pass of one sublayer; the graphs of the backward pass are loaded when it is first run.

    Args:
        bundle: Holds the graphs.
        name: `attention` or `mlp`.
        role: Of the graph of its forward pass.
        pieces: The graphs' inputs, piece by piece.
        backend: Runs the graphs.
        linear: Gives frozen weights.
        parameters: Give what graphs take of the adapter, by its name.
        workspace: Gives arrays for what lies between graphs.

    Raises:
        VerificationError: The manifest says other outputs than the graph has, or sizes that none has.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        role: str,
        pieces: Sequence[dict[str, Slice]],
        backend: Backend,
        linear: LinearWeights,
        parameters: Gains,
        workspace: Workspace,
    ) -> None:
        self.name = name
        self._pieces = pieces
        self._channels = backend.channels
        self._linear, self._lora, self._workspace = linear, parameters, workspace
        self._bundle, self._backend = bundle, backend
        self._role = role
        self._norms: dict[int, Array] = {}
        self._shapes = bundle.manifest.lora.differentiated()
        self._no_update: dict[Slice, Array] = {}
        self._forward = self._load("")
        self._kept = kept_outputs(bundle.manifest, self._role)
        if {spec.name for spec in self._kept} != set(self._forward.outputs) - {"output"}:
            raise VerificationError(
                f"{bundle.file(self._role)} gives {', '.join(self._forward.outputs):.200}, and the bundle's manifest "
                "names others; make the bundle anew"
            )

    def _load(self, suffix: str) -> _PieceGraph:
        return _piece_graph(self._backend.load(self._bundle.file(self._role + suffix)), self._pieces)

    @cached_property
    def _again(self) -> _PieceGraph:
        return self._load("_grad")

    @cached_property
    def _from_kept(self) -> _PieceGraph:
        return self._load("_grad_kept")

    @cached_property
    def _projected(self) -> _PieceGraph | None:
        """The graph that gives A·Wᵀ; none where no slot of the sublayer has a gain."""
        gains = any(name.endswith(GAIN) for name in self._forward.trained[0])
        return self._load("_projected") if gains else None

    def project(self, layer: int, sums: Mapping[str, Array]) -> None:
        """Add A·Wᵀ (rank, out) of each slot of a layer to the array with its gain's name."""
        if (graph := self._projected) is None:
            return
        for index, slices in enumerate(self._pieces):
            gains = {name: slices[name.removesuffix(_PROJECTED) + GAIN].of_layer(layer) for name in graph.outputs}
            totals = {name: sums[gain.parameter][:, slice(*(gain.rows or (None,)))] for name, gain in gains.items()}
            own = {name: np.empty(total.shape, _FLOAT) for name, total in totals.items()}
            self._run(graph, layer, index, {}, own)
            for name, total in totals.items():
                total += own[name]

    def forward(self, layer: int, tables: Arrays, hidden: AnyArray, output: AnyArray, kept_under: str | None) -> None:
        """Write output = hidden + f(norm(hidden)), and, under that name, what the backward pass can take."""
        other = self._workspace.like("sum", output) if len(self._pieces) > 1 else output
        residual = hidden
        for index in range(len(self._pieces)):
            # The last piece writes to `output`.
            target = output if (len(self._pieces) - index) % 2 else other
            states = {**tables, "hidden": hidden, "residual": residual}
            kept = self._kept_arrays(kept_under, index, hidden)
            # Nothing holds a piece's weights while the next one's are made.
            self._run(self._forward, layer, index, states, {"output": target, **kept})
            residual = target

    def backward(
        self,
        layer: int,
        tables: Arrays,
        hidden: AnyArray,
        d_output: AnyArray,
        d_hidden: AnyArray,
        kept_under: str | None,
        gradient_of: Callable[[str], Array],
    ) -> None:
        """Write the gradient of `hidden`, and add those of trained parameters to what `gradient_of` gives.

        What the forward pass kept under that name is taken; without one it is computed again.
        """
        graph = self._again if kept_under is None else self._from_kept
        other = self._workspace.like("sum", d_hidden) if len(self._pieces) > 1 else d_hidden
        # A piece adds its share to what the pieces before it gave; the first adds to the residual's own gradient.
        carry = d_output
        for index, slices in enumerate(self._pieces):
            target = d_hidden if (len(self._pieces) - index) % 2 else other
            states = {**tables, "hidden": hidden, "output.grad": d_output, "carry": carry}
            if kept_under is not None:
                states |= self._kept_arrays(kept_under, index, hidden)
            # Views of the optimizer's flat gradient: what is added to them is added there.
            taken = {name: slices[name.removesuffix(".grad")] for name in graph.outputs if name != "hidden.grad"}
            own = {
                name: self._gradient_array(name, self._adapter(slice_, layer).shape) for name, slice_ in taken.items()
            }
            self._run(graph, layer, index, states, {"hidden.grad": target, **own})
            for name, slice_ in taken.items():
                # The graph gives those of a layer that is not trained as well; nobody needs them.
                if self._is_trained(slice_, layer):
                    total = _view(gradient_of, slice_, layer)
                    total += own[name]
            carry = target

    def _gradient_array(self, name: str, shape: tuple[int, ...]) -> Array:
        """Where a piece writes: with resident weights every layer and piece, being alike, to one place that stays."""
        if self._linear.resident:
            return self._workspace.array(f"{self.name}.{name}", shape, _FLOAT)
        return np.empty(shape, _FLOAT)

    def _run(self, graph: _PieceGraph, layer: int, index: int, states: Arrays, outputs: Arrays) -> None:
        # With streamed weights too little stays to be worth a request for each layer.
        bound_as = (layer, index) if self._linear.resident else None
        graph.run({**states, **self._parameters(graph, layer, index)}, outputs, bound_as)

    def _parameters(self, graph: _PieceGraph, layer: int, index: int) -> dict[str, AnyArray]:
        """Frozen and trained parameters of a piece, by the graph's names."""
        if (layer, index) not in graph.of_layers:
            graph.of_layers[layer, index] = (
                {name: slice_.of_layer(layer) for name, slice_ in graph.linear[index].items()},
                {name: self._adapter(slice_, layer) for name, slice_ in graph.trained[index].items()},
            )
        linear, views = graph.of_layers[layer, index]
        # Columns of a matrix have to be copied.
        trained = {name: np.ascontiguousarray(view) for name, view in views.items()}
        return {**self._linear.take(linear), **trained, _NORM: self._norm(layer)}

    def _is_trained(self, slice_: Slice, layer: int) -> bool:
        return slice_.of_layer(layer).parameter in self._lora

    def _adapter(self, slice_: Slice, layer: int) -> Array:
        """A slice of a LoRA parameter; of a layer that is not trained what changes nothing, one array for all."""
        if self._is_trained(slice_, layer):
            return _view(self._lora.parameter, slice_, layer)
        if slice_ not in self._no_update:
            name = slice_.of_layer(layer).parameter
            whole = self._shapes[name]
            spans = [span or (0, size) for span, size in zip((slice_.rows, slice_.columns), whole, strict=False)]
            shape = [stop - start for start, stop in spans]
            self._no_update[slice_] = (np.ones if name.endswith(GAIN) else np.zeros)(shape, _FLOAT)
        return self._no_update[slice_]

    def _norm(self, layer: int) -> Array:
        """Kept: it is small, and where it lies in the file are other pages."""
        if layer not in self._norms:
            weight = LAYER_PREFIX.format(layer) + self._pieces[0][_NORM].parameter
            self._norms[layer] = self._channels.put(self._linear.frozen.plain(weight), 0).copy()
        return self._norms[layer]

    def _kept_arrays(self, kept_under: str | None, index: int, hidden: AnyArray) -> dict[str, AnyArray]:
        """Where a piece's activations are kept; where they are not, all pieces use the first's of `AGAIN`."""
        batch, sequence = hidden.shape[:2]
        sizes = {"batch": batch, "sequence": sequence}
        return {
            spec.name: self._workspace.array(
                f"{self.name}.{spec.name}.{kept_under or AGAIN}.{index if kept_under is not None else 0}",
                tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape),
            )
            for spec in self._kept
        }


def sublayer_runners(
    bundle: Bundle,
    wide: bool,
    parameters: Gains,
    workspace: Workspace,
    backend: Backend,
    linear: LinearWeights,
) -> tuple[SublayerRunner, SublayerRunner]:
    """Those of attention and of the feed-forward network; see `SublayerRunner`.

    Args:
        bundle: Holds the graphs.
        wide: Whether pieces are wide.
        parameters: Give what graphs take of the adapter, by its name.
        workspace: Gives arrays for what lies between graphs.
        backend: Runs the graphs.
        linear: Gives frozen weights in the backend's layout.
    """
    architecture, pieces = bundle.manifest.architecture, pieces_of(bundle.manifest, wide=wide)

    def runner(name: str, slices: Iterator[dict[str, Slice]]) -> SublayerRunner:
        role = sublayer_role(backend.sublayers, name, wide=wide)
        return SublayerRunner(bundle, name, role, list(slices), backend, linear, parameters, workspace)

    return (
        runner("attention", attention_slices(architecture, pieces.attention)),
        runner("mlp", mlp_slices(architecture, pieces.mlp)),
    )


def _view(of: Callable[[str], NDArray[np.float32]], slice_: Slice, layer: int) -> NDArray[np.float32]:
    array = of(slice_.of_layer(layer).parameter)
    rows, columns = (slice(*(part or (None,))) for part in (slice_.rows, slice_.columns))
    return array[rows, columns] if array.ndim > 1 else array[rows]
