"""How far the int8 trunk is from the float one, layer by layer, on calibration rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError
from edgetune.runtimes.onnx_session import open_graph
from edgetune.split.graph import TrunkGraph
from edgetune.split.quantise import Feed

_SUFFERS = 0.05
"""A layer that adds more than this to the error is named."""


def layer_errors(trunk: TrunkGraph, quantised: Path, rows: Iterable[tuple[Feed, Feed]]) -> list[float]:
    """Distance of the int8 graph's hidden states from the float ones behind each layer.

    Args:
        trunk: The float32 graph.
        quantised: What `quantise` made of it.
        rows: The inputs of each row: as it is for the float graph, and padded for the int8 one.

    Returns:
        For each layer the mean over all positions of all rows of |found − exact| / |exact|.
    """
    import onnx_ir as ir

    exact = open_graph(_giving(ir.to_proto(trunk.model), trunk.layers))
    found = open_graph(_giving(onnx.load(quantised), trunk.layers), exact_int8=True)
    apart: list[list[NDArray[np.float64]]] = [[] for _ in trunk.layers]
    for row, padded in rows:
        expected = exact.run(trunk.layers, dict(row))
        for layer, states in enumerate(found.run(trunk.layers, dict(padded))):
            # In float64, since squares of float32 may be more than float32 holds.
            exactly = expected[layer].astype(np.float64)
            off = states[:, : exactly.shape[1]] - exactly
            apart[layer].append(np.linalg.norm(off, axis=-1) / np.linalg.norm(exactly, axis=-1))
    return [float(np.mean(np.concatenate(layer, axis=1))) for layer in apart]


def described(errors: list[float]) -> str:
    """What the error is, and which layers add most to it, in a line."""
    if not math.isfinite(errors[-1]):
        first = next(layer for layer, error in enumerate(errors) if not math.isfinite(error))
        return f"The hidden states of layer {first} are not finite"
    added = np.diff([0.0, *errors])
    worst = [f"layer {layer} adds {added[layer]:.1%}" for layer in np.argsort(-added)[:3] if added[layer] > _SUFFERS]
    return f"In int8 the hidden states are {errors[-1]:.1%} from float{''.join(f'; {text}' for text in worst)}"


def require_fidelity(errors: list[float], most: float) -> None:
    """Refuse a trunk that computes something else than the model does.

    Raises:
        IncompatibleError: The error behind the last layer is more than `most`, or no number.
    """
    if not errors[-1] <= most:
        raise IncompatibleError(
            f"{described(errors)}; at most {most:.0%} from float are allowed, or the layers above would not know them. "
            "Use fewer --layers, or allow more with --largest-error"
        )


def _giving(model: onnx.ModelProto, names: list[str]) -> bytes:
    """The graph with more outputs."""
    given = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    return bytes(model.SerializeToString())
