"""The trunk of a split bundle: its lower layers, which have no adapter, for an accelerator that has no backward pass.

`trunk/int8.onnx` computes what enters the first layer above it; `trunk/trunk.json` says what it is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import cattrs
from cattrs.errors import BaseValidationError

from edgetune.errors import IncompatibleError, VerificationError
from edgetune.formats.bundle import Bundle
from edgetune.formats.json_file import read_object
from edgetune.formats.manifest import BundleManifest

FOLDER = "trunk"
GRAPH = f"{FOLDER}/int8"
"""Role of the quantised graph."""
INDEX = f"{FOLDER}/trunk.json"
PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""The frozen projections of a layer, by their names in the checkpoint."""
_SPLIT_AGAIN = "split the bundle again"


@dataclass(frozen=True)
class TrunkInfo:
    """`trunk/trunk.json`."""

    layers: int
    """Decoder layers in the trunk, the lowest ones."""
    length: int
    """Positions that its graph takes; it takes one row at a time."""
    gains: dict[str, float]
    """The largest magnitude that each frozen projection gave on the calibration rows, relative to the largest that it
    was given at the same position, by its name in the checkpoint, such as `model.layers.0.self_attn.qkv_proj`."""
    errors: list[float]
    """How far the int8 hidden states behind each layer were from float on these rows, relative to them."""


_converter = cattrs.Converter(forbid_extra_keys=True)


def has_trunk(manifest: BundleManifest) -> bool:
    """Whether a bundle was split."""
    return any(graph.role == GRAPH for graph in manifest.graphs)


def write_trunk_info(info: TrunkInfo) -> bytes:
    """The bytes of `trunk/trunk.json`."""
    return f"{json.dumps(_converter.unstructure(info), indent=1)}\n".encode()


def read_trunk_info(bundle: Bundle) -> TrunkInfo:
    """What the trunk of a verified bundle is.

    Raises:
        IncompatibleError: The bundle has no trunk, or an older edgetune's.
        VerificationError: `trunk/trunk.json` cannot be what `edgetune split` wrote.
    """
    path = bundle.path / INDEX
    if not has_trunk(bundle.manifest) or not path.is_file():
        raise IncompatibleError(
            f"{bundle.path} has no trunk; make a bundle that has one with "
            f"`edgetune split {bundle.path} --data ROWS.jsonl --output SPLIT`"
        )
    found = read_object(path, _SPLIT_AGAIN)
    if "linear" in found:
        raise IncompatibleError(
            f"{path} is of an older edgetune, where one enormous activation took the int8 scale from all others; "
            f"{_SPLIT_AGAIN}"
        )
    try:
        info = _converter.structure(found, TrunkInfo)
    except BaseValidationError as error:
        raise VerificationError(f"{path}: cannot be read ({error}); {_SPLIT_AGAIN}") from error
    if problem := _problem(info, bundle.manifest):
        raise VerificationError(f"{path}: {problem}; {_SPLIT_AGAIN}")
    return info


def _problem(info: TrunkInfo, manifest: BundleManifest) -> str | None:
    """What cannot be; none where there is nothing."""
    architecture = manifest.architecture
    most, longest = architecture.num_hidden_layers - 1, architecture.max_position_embeddings
    if not 1 <= info.layers <= most or not 1 <= info.length <= longest:
        return (
            f"{info.layers} layers of {info.length} positions, expected 1 to {most} layers and 1 to {longest} positions"
        )
    taken = [spec.shape for spec in manifest.graph(GRAPH).inputs if spec.name == "hidden"]
    if taken != [[1, info.length, architecture.hidden_size]]:
        return f"{info.length} positions, but the graph takes {taken or 'no hidden states'}"
    expected = {f"model.layers.{layer}.{module}" for layer in range(info.layers) for module in PROJECTIONS}
    if info.gains.keys() != expected:
        return f"{len(info.gains)} projections, expected {', '.join(PROJECTIONS)} of each layer"
    if len(info.errors) != info.layers:
        return f"{len(info.errors)} errors, expected one of each of the {info.layers} layers"
    if not all(math.isfinite(value) and value >= 0 for value in (*info.gains.values(), *info.errors)):
        return "a gain or an error that is not finite, or below zero"
    return None
