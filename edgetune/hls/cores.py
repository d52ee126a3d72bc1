"""The cores of a bundle's trunk: a projection each, with the precision that its calibration rows asked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune.bundle import Bundle
from edgetune.errors import IncompatibleError
from edgetune.frozen import FrozenWeights
from edgetune.hls.core import Core
from edgetune.hls.fixed_point import holding
from edgetune.hls.resources import Fpga, shared
from edgetune.runtimes.layered.onnxruntime import OrtBackend
from edgetune.trunk import TrunkInfo


def trunk_cores(bundle: Bundle, info: TrunkInfo, fpga: Fpga) -> list[Core]:
    """A core for every projection in the trunk, all of them together on one FPGA.

    Args:
        bundle: A split bundle.
        info: Its trunk.
        fpga: Where they go.

    Raises:
        IncompatibleError: The FPGA's memories do not hold the weights.
    """
    frozen, backend = FrozenWeights(bundle.path, bundle.manifest.architecture), OrtBackend(bundle, "fp32")
    shapes = {name: frozen.shape(f"{name}.weight") for name in info.linear}
    count = sum(outputs * inputs for outputs, inputs in shapes.values())
    if count > fpga.weights():
        raise IncompatibleError(
            f"the {info.layers} layers of the trunk have {count:,} weights, the memories of a {fpga.name} hold "
            f"{fpga.weights():,} of 16 bits; split the bundle with fewer --layers, or use a smaller model: this way is "
            "for models of about a million weights a layer at most"
        )
    sizes = [(name, inputs, outputs) for name, (outputs, inputs) in shapes.items()]
    cores = []
    for size in shared(sizes, fpga):
        weight = _weight(frozen, backend, f"{size.name}.weight")
        seen = info.linear[size.name]
        cores.append(
            Core(
                size,
                weight,
                weight_type=holding(float(np.abs(weight).max()), headroom=1.0),
                input_type=holding(seen.input),
                output_type=holding(seen.output),
            )
        )
    return cores


def _weight(frozen: FrozenWeights, backend: OrtBackend, name: str) -> NDArray[np.float32]:
    """(outputs, inputs) in float32, whatever pieces it is stored in."""
    parts, start = [], 0
    for piece in frozen.pieces(name):
        stop = start + piece.shape[0]
        parts.append(backend.weight("", frozen.linear(name, (start, stop)), np.empty)[""])
        start = stop
    return np.concatenate(parts)
