"""The first batch of an accelerator, against the CPU in float32.

An accelerator that overflows says nothing: its loss and gradients may be finite, and wrong. So the first loss and the
first gradients of a session are computed on the CPU as well, by ONNX Runtime on the same bundle's float32 graphs, and
what half precision cannot hold is found before a step is applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.errors import IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.formats.protobuf import bytes_field, fields, messages
from edgetune.formats.roles import LOSS, STEP, roles_in_half
from edgetune.runtimes.onnx_session import open_graph
from edgetune.runtimes.whole.session import Buffers, CpuGraphs

LARGEST_HALF = 65504.0
"""Of float16."""
_GROUP = 32
"""Tensors of a graph that are read at a time."""
_GRAPH, _NODE, _OUTPUT = 7, 1, 12
"""Field numbers of ONNX: ModelProto.graph, GraphProto.node and GraphProto.output."""
_NODE_OUTPUT, _NODE_OPERATOR, _VALUE_NAME = 2, 4, 1
"""NodeProto.output, NodeProto.op_type and ValueInfoProto.name."""
_COMPUTED = (b"Add", b"Div", b"MatMul", b"Mul", b"Gemm", b"ReduceSum", b"Sub")
"""Operators whose results can be larger than what goes in."""


@dataclass(frozen=True)
class Bounds:
    """How far an accelerator may be from float32."""

    loss: float
    """Relative difference of the losses."""
    cosine: float
    """Least cosine of the gradients, all parameters together."""


HALF, INT8 = Bounds(0.02, 0.99), Bounds(0.05, 0.95)
"""In float16, and with int8 weights."""


class FirstBatch:
    """Compares the first loss and the first gradients of a session.

    Args:
        bundle: Has the float32 graphs.
        bounds: How far the accelerator may be from them.
    """

    def __init__(self, bundle: Bundle, bounds: Bounds) -> None:
        self._bundle, self._bounds = bundle, bounds
        self._in_half = dict(zip((STEP, LOSS), roles_in_half(bundle.manifest), strict=True))
        self._compared: set[str] = set()

    def loss(self, device: str, batch: Batch, parameters: Buffers, found: float) -> None:
        """Compare a loss, if it is the first.

        Raises:
            IncompatibleError: It is too far from the CPU's.
        """
        if self._is_first(LOSS):
            # Loaded for this batch alone.
            expected = CpuGraphs(self._bundle).loss(batch, parameters)
            self._require(device, LOSS, batch, parameters, self._loss_differs(found, expected))

    def gradients(
        self,
        device: str,
        batch: Batch,
        share: float,
        parameters: Buffers,
        found: float,
        sums: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Compare a loss and the gradients of share · loss, if they are the first.

        Raises:
            IncompatibleError: They are too far from the CPU's.
        """
        if self._is_first(STEP):
            exact = {name: np.empty_like(array) for name, array in sums.items()}
            expected = CpuGraphs(self._bundle).gradients(batch, share, parameters, exact)
            differences = self._loss_differs(found, expected) or self._gradients_differ(sums, exact)
            self._require(device, STEP, batch, parameters, differences)

    def _is_first(self, role: str) -> bool:
        first = role not in self._compared
        self._compared.add(role)
        return first

    def _loss_differs(self, found: float, expected: float) -> str:
        # A loss that is no number in float32 either is the model's or the rows'.
        near = math.isclose(found, expected, rel_tol=self._bounds.loss, abs_tol=self._bounds.loss)
        return "" if near or not math.isfinite(expected) else f"a loss of {found:.4g} where float32 has {expected:.4g}"

    def _gradients_differ(
        self, found: Mapping[str, NDArray[np.float32]], expected: Mapping[str, NDArray[np.float32]]
    ) -> str:
        pairs = [(found[name].astype(np.float64), array.astype(np.float64)) for name, array in expected.items()]
        norms = [math.sqrt(sum(float(np.vdot(each, each)) for each in arrays)) for arrays in zip(*pairs, strict=True)]
        if not math.isfinite(norms[1]) or norms[1] == 0:
            return ""
        cosine = sum(float(np.vdot(*pair)) for pair in pairs) / (norms[0] * norms[1]) if norms[0] else 0.0
        if cosine >= self._bounds.cosine:
            return ""
        return f"gradients of norm {norms[0]:.4g} where float32 has {norms[1]:.4g}, with a cosine of {cosine:.3f}"

    def _require(self, device: str, role: str, batch: Batch, parameters: Buffers, difference: str) -> None:
        if not difference:
            return
        feed = {**batch.tensors(), **{name: value.numpy() for name, value in parameters.items()}}
        if role == STEP:
            feed["loss_scale"] = np.ones(1, np.float32)
        reason = ""
        # The float32 graph computes squares that the accelerator does not.
        if (beyond := first_beyond_half(self._bundle.file(self._in_half[role]), feed)) is not None:
            reason = f"; the tensor {beyond[0]!r} reaches {beyond[1]:,.0f}, and float16 {LARGEST_HALF:,.0f}"
        raise IncompatibleError(
            f"{device} computes {difference}, on the first batch{reason}; nothing was trained on it; "
            "train with --runtime onnxruntime or openvino"
        )


def first_beyond_half(graph: Path, feed: Mapping[str, NDArray[np.generic]]) -> tuple[str, float] | None:
    """The first tensor of a graph that leaves float16's range, computed in float32, and its largest magnitude.

    Args:
        graph: An ONNX file of a bundle, its weights beside it.
        feed: Its inputs.
    """
    data = graph.read_bytes()
    names = list(_results(data))
    # A message that is continued is merged with what came before: the graph gets further outputs.
    more = b"".join(bytes_field(_OUTPUT, bytes_field(_VALUE_NAME, name.encode())) for name in names)
    session = open_graph(data + bytes_field(_GRAPH, more), graph.parent)
    given = {value.name for value in session.get_inputs()}
    inputs = {name: array for name, array in feed.items() if name in given}
    for group in _groups(names):
        for name, array in zip(group, session.run(group, inputs), strict=True):
            largest = float(np.abs(array).max(initial=0.0))
            if not largest <= LARGEST_HALF:
                return name, largest
    return None


def _results(data: bytes) -> Iterator[str]:
    """Names of what the graph computes, in the order of its nodes, its outputs left out."""
    for graph in messages(data, _GRAPH):
        own = {next(messages(value, _VALUE_NAME)) for value in messages(graph, _OUTPUT)}
        for node in messages(graph, _NODE):
            parts: dict[int, bytes] = {}
            for field in fields(BytesIO(node), 0, len(node)):
                parts.setdefault(field.number, node[field.start : field.end])
            if parts[_NODE_OPERATOR] in _COMPUTED and parts[_NODE_OUTPUT] not in own:
                yield parts[_NODE_OUTPUT].decode()


def _groups(names: Sequence[str]) -> Iterator[list[str]]:
    return (list(names[start : start + _GROUP]) for start in range(0, len(names), _GROUP))
