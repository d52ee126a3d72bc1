"""The cores of a bundle's trunk: one for each projection, with the gain that was seen on calibration rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.trunk import TrunkInfo
from edgetune.model.pieces import LAYER_PREFIX
from edgetune.runtimes.fpga_hls.core import Core
from edgetune.runtimes.fpga_hls.fixed_point import holding
from edgetune.runtimes.fpga_hls.resources import Fpga, shared
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend


def trunk_cores(bundle: Bundle, info: TrunkInfo, fpga: Fpga) -> list[Core]:
    """A core for every projection in the trunk, all of them together on one FPGA.

    Args:
        bundle: A split bundle.
        info: The description of its trunk.
        fpga: The FPGA that has to hold them.

    Raises:
        IncompatibleError: The FPGA does not hold them.
    """
    frozen, backend = FrozenWeights(bundle.path, bundle.manifest.architecture), OrtBackend(bundle, "fp32")
    shapes = {name: frozen.shape(f"{name}.weight") for name in info.gains}
    sizes = [(name, inputs, outputs) for name, (outputs, inputs) in shapes.items()]
    if (fitting := shared(sizes, fpga)) is None:
        raise _too_large(info, sizes, fpga)
    cores = []
    for size in fitting:
        weight = _weight(frozen, backend, f"{size.name}.weight")
        cores.append(
            Core(
                size,
                weight,
                weight_type=holding(float(np.abs(weight).max()), headroom=1.0),
                output_type=holding(info.gains[size.name]),
            )
        )
    return cores


def _too_large(info: TrunkInfo, sizes: list[tuple[str, int, int]], fpga: Fpga) -> IncompatibleError:
    def lowest(layers: int) -> list[tuple[str, int, int]]:
        prefixes = tuple(LAYER_PREFIX.format(layer) for layer in range(layers))
        return [size for size in sizes if size[0].startswith(prefixes)]

    most = next((layers for layers in reversed(range(1, info.layers)) if shared(lowest(layers), fpga)), 0)
    advice = f"split the bundle with --layers {most}" if most else "use a smaller model"
    count = sum(inputs * outputs for _, inputs, outputs in sizes)
    return IncompatibleError(
        f"the {info.layers} layers of the trunk have {count:,} weights, which no reuse factors fit into the memories "
        f"of a {fpga.name}: {fpga.block_ram} block RAMs and {fpga.ultra_ram} UltraRAMs hold {fpga.weights():,} of 16 "
        f"bits if none is left partly empty; {advice}"
    )


def _weight(frozen: FrozenWeights, backend: OrtBackend, name: str) -> NDArray[np.float32]:
    """(outputs, inputs) in float32, whatever pieces it is stored in."""
    parts, start = [], 0
    for piece in frozen.pieces(name):
        stop = start + piece.shape[0]
        parts.append(backend.weight("", frozen.linear(name, (start, stop)), np.empty)[""])
        start = stop
    return np.concatenate(parts)
