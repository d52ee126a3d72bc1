"""One frozen projection as an HLS project, and its C simulation."""

from __future__ import annotations

import contextlib
import ctypes
import io
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import EdgetuneError, MissingDependencyError, ResourceError
from edgetune.machine.exhaustion import ADVICE, lack_of_process
from edgetune.machine.threads import threads_used
from edgetune.runtimes.fpga_hls.fixed_point import UNIT, FixedPoint, accumulator, exponents
from edgetune.runtimes.fpga_hls.resources import CoreSize, Fpga

COMPILER = "g++"
_LONGEST_BUILD = 600
"""Seconds that a build may take."""
_SHOWN = 2000
"""Characters of the compiler's error output that a message shows."""


@dataclass(frozen=True)
class Core:
    """A projection y = W·x in fixed point, each vector with an exponent of its own.

    In trained language models the vectors of one row differ by a factor of a thousand and more. The circuit takes
    x · 2^-e, which lies between -1 and 1, and gives y · 2^-e: e is found and both are shifted outside of it.
    """

    size: CoreSize
    weight: NDArray[np.float32]
    """(outputs, inputs)."""
    weight_type: FixedPoint
    output_type: FixedPoint
    """Of y · 2^-e."""
    input_type: FixedPoint = UNIT
    """Of x · 2^-e."""

    @property
    def sum_type(self) -> FixedPoint:
        """Holds every sum without rounding."""
        return accumulator(self.weight_type, self.input_type, self.size.inputs)

    def expected(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """The results (count, outputs) in numpy; exact, since all products are whole multiples of one step.

        Args:
            vectors: (count, inputs).
        """
        shifts = exponents(vectors)
        inputs = self.input_type.rounded(np.ldexp(vectors.astype(np.float64), -shifts))
        results = inputs @ self.weight_type.rounded(self.weight.astype(np.float64)).T
        return np.ldexp(self.output_type.rounded(results), shifts)


def require_hls4ml() -> None:
    """Check that projects can be written, without importing hls4ml, which takes memory.

    Raises:
        MissingDependencyError: hls4ml is not installed.
    """
    if find_spec("hls4ml") is None:
        raise MissingDependencyError('hls4ml is not installed; pip install "edgetune[fpga]"')


def require_compiler() -> None:
    """Check that simulations can be compiled.

    Raises:
        MissingDependencyError: There is no g++.
    """
    if shutil.which(COMPILER) is None:
        raise MissingDependencyError(
            f"{COMPILER} is not installed, and the C simulation is C++; install it (Debian: `apt install g++`)"
        )


def write_core(core: Core, folder: Path, fpga: Fpga) -> Path:
    """Write the HLS project of a core; returns the library that `build_lib.sh` in it will make.

    Args:
        core: The projection.
        folder: The folder of the project, which is made.
        fpga: The FPGA that it is for.

    Raises:
        MissingDependencyError: hls4ml is not installed.
    """
    require_hls4ml()
    from hls4ml.model.graph import ModelGraph

    config = _project_config(core, folder, fpga)
    # It tells on stdout what it thinks of names and factors; ours are chosen so that it changes nothing.
    with contextlib.redirect_stdout(io.StringIO()):
        graph = ModelGraph.from_layer_list(config, _layers(core), inputs=["x"], outputs=["product"])
        graph.write()
    return folder / "firmware" / f"{_project_name(core)}-{graph.config.get_config_value('Stamp')}.so"


def _project_name(core: Core) -> str:
    return core.size.name.replace(".", "_")


def _layers(core: Core) -> list[dict[str, Any]]:
    """hls4ml's description of y = W·x."""
    return [
        {"class_name": "InputLayer", "name": "x", "input_shape": [core.size.inputs], "data_format": "channels_last"},
        {
            "class_name": "Dense",
            "name": "product",
            "n_in": core.size.inputs,
            "n_out": core.size.outputs,
            "weight_data": np.ascontiguousarray(core.weight.T),
            "bias_data": np.zeros(core.size.outputs, np.float32),
            "inputs": ["x"],
            "outputs": ["product"],
        },
    ]


def _project_config(core: Core, folder: Path, fpga: Fpga) -> dict[str, Any]:
    """hls4ml's configuration: where the project goes, what it is for, and the types of its numbers."""
    precisions = {
        "weight": str(core.weight_type),
        "bias": str(core.weight_type),
        "accum": core.sum_type.exactly(),
        "result": str(core.output_type),
    }
    return {
        "OutputDir": str(folder),
        "ProjectName": _project_name(core),
        "Backend": "Vitis",
        "Part": fpga.part,
        "ClockPeriod": fpga.clock_ns,
        "IOType": "io_parallel",
        "HLSConfig": {
            "Model": {"Precision": str(core.output_type), "ReuseFactor": core.size.reuse, "Strategy": "Resource"},
            "LayerName": {"x": {"Precision": {"result": str(core.input_type)}}, "product": {"Precision": precisions}},
        },
        "WriterConfig": {"TBOutputStream": "both", "Namespace": None, "WriteWeightsTxt": True, "WriteTar": False},
    }


def simulate(cores: Sequence[Core], folder: Path, fpga: Fpga) -> list[Simulation]:
    """Write and compile the C simulations of cores, several at the same time.

    Args:
        cores: The projections.
        folder: An empty folder for their projects.
        fpga: The FPGA that the projects are for.

    Raises:
        MissingDependencyError: hls4ml or g++ is not installed.
        ResourceError: The compiler ran out of memory or of room on a disk.
        EdgetuneError: It gave up.
    """
    require_compiler()
    libraries = [write_core(core, folder / core.size.name, fpga) for core in cores]
    with ThreadPoolExecutor(threads_used()) as pool:
        return list(pool.map(lambda args: Simulation(*args), zip(cores, libraries, strict=True)))


class Simulation:
    """A C simulation, compiled where its project lies.

    Args:
        core: The projection.
        library: The path that `write_core` returned.

    Raises:
        ResourceError: The compiler ran out of memory or of room on a disk.
        EdgetuneError: It gave up.
    """

    def __init__(self, core: Core, library: Path) -> None:
        self._outputs = core.size.outputs
        built = subprocess.run(
            ["bash", "build_lib.sh"], cwd=library.parents[1], capture_output=True, text=True, timeout=_LONGEST_BUILD
        )
        if built.returncode or not library.is_file():
            failed = f"{core.size.name}: the C simulation does not compile:\n{built.stderr[-_SHOWN:]}"
            if lack := lack_of_process(built.returncode, built.stderr):
                raise ResourceError(f"{failed}\n{ADVICE[lack]}")
            raise EdgetuneError(failed)
        self._function = getattr(ctypes.CDLL(str(library)), f"{_project_name(core)}_float")
        self._function.restype = None
        self._function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def run(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Project vectors: (count, inputs) → (count, outputs)."""
        shifts = exponents(vectors)
        vectors = np.ascontiguousarray(np.ldexp(vectors, -shifts), np.float32)
        results = np.empty((len(vectors), self._outputs), dtype=np.float32)
        for vector, result in zip(vectors, results, strict=True):
            self._function(vector.ctypes.data, result.ctypes.data)
        return np.ldexp(results, shifts)
