"""What cores take of an FPGA, estimated by counting; only a synthesis tells the real figures.

A multiplier is one DSP48E2, which multiplies 27 × 18 bits (AMD UG579). A weight memory holds as many words as the reuse
factor, each of all weights that are multiplied at the same time. It is built of columns of 72 bits: a 36 Kb block RAM
is a column 512 deep, an UltraRAM one 4,096 deep (AMD UG573). Look-up tables and flip-flops depend on how the tool
schedules and are not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgetune.runtimes.fpga_hls.fixed_point import WIDTH

_COLUMN = 72
"""Bits."""
_BLOCK_DEPTH, _ULTRA_DEPTH = 512, 4096
_DSP_SHARE = 0.8
"""Share of the FPGA's DSPs that the cores may take together."""


@dataclass(frozen=True)
class Fpga:
    """An FPGA."""

    name: str
    part: str
    """Its part number for Vitis HLS."""
    dsp: int
    block_ram: int
    """Number of block RAMs of 36 Kb."""
    ultra_ram: int
    """Number of UltraRAMs of 288 Kb."""
    clock_ns: float

    def weights(self) -> int:
        """How many weights its memories hold, if every column is full."""
        return (self.block_ram * 36 + self.ultra_ram * 288) * 1024 // WIDTH


KV260 = Fpga("Kria KV260", "xck26-sfvc784-2LV-c", dsp=1248, block_ram=144, ultra_ram=64, clock_ns=5.0)
"""AMD Kria K26 SOM Data Sheet (DS987)."""


@dataclass(frozen=True)
class CoreSize:
    """A frozen projection, and how often each of its multipliers is used for a vector."""

    name: str
    inputs: int
    outputs: int
    reuse: int

    @property
    def multiplications(self) -> int:
        """Multiplications for one vector, which are as many as the weights."""
        return self.inputs * self.outputs

    @property
    def dsp(self) -> int:
        """Number of multipliers, one DSP each."""
        return math.ceil(self.multiplications / self.reuse)

    @property
    def columns(self) -> int:
        """Of its weight memory, 72 bits each and `reuse` deep."""
        return math.ceil(self.dsp * WIDTH / _COLUMN)

    @property
    def column_blocks(self) -> int:
        """Block RAMs that a column takes."""
        return math.ceil(self.reuse / _BLOCK_DEPTH)

    @property
    def column_ultras(self) -> int:
        """UltraRAMs that a column takes instead."""
        return math.ceil(self.reuse / _ULTRA_DEPTH)


@dataclass(frozen=True)
class Estimate:
    """What all cores take together."""

    multiplications: int
    """Multiplications for each token."""
    dsp: int
    block_ram: int
    ultra_ram: int
    cycles: int
    """Clock cycles for each token through all cores, one after the other; attention and the rest are not counted."""

    def fits(self, fpga: Fpga) -> bool:
        """Whether the FPGA has as much."""
        return self.dsp <= fpga.dsp and self.block_ram <= fpga.block_ram and self.ultra_ram <= fpga.ultra_ram

    def of(self, fpga: Fpga) -> str:
        """Beside what the FPGA has, in words."""
        return (
            f"{self.dsp:,} of {fpga.dsp:,} DSPs, {self.block_ram:,} of {fpga.block_ram:,} block RAMs and "
            f"{self.ultra_ram:,} of {fpga.ultra_ram:,} UltraRAMs"
        )


def estimate(cores: Iterable[CoreSize], fpga: Fpga) -> Estimate:
    """Add up; columns for which there is no block RAM go to UltraRAM, as far as there is any, the deepest first."""
    cores = list(cores)
    block_ram, ultra_ram = sum(core.columns * core.column_blocks for core in cores), 0
    for core in sorted(cores, key=lambda core: core.column_blocks / core.column_ultras, reverse=True):
        missing = math.ceil(max(0, block_ram - fpga.block_ram) / core.column_blocks)
        moved = min(missing, core.columns, (fpga.ultra_ram - ultra_ram) // core.column_ultras)
        block_ram -= moved * core.column_blocks
        ultra_ram += moved * core.column_ultras
    multiplications, dsp = sum(core.multiplications for core in cores), sum(core.dsp for core in cores)
    return Estimate(multiplications, dsp, block_ram, ultra_ram, sum(core.reuse for core in cores))


def shared(sizes: Sequence[tuple[str, int, int]], fpga: Fpga) -> list[CoreSize] | None:
    """The fastest cores that fit into the FPGA together; none where no reuse factors make them fit.

    Each has a share of the DSPs by its multiplications. Memories that are deeper than a block RAM leave less of
    UltraRAM unused, so that slower cores may fit where faster ones do not.

    Args:
        sizes: Name, inputs and outputs of each.
        fpga: The FPGA that has to hold them.
    """
    total = sum(inputs * outputs for _, inputs, outputs in sizes)
    if total > fpga.weights():
        return None
    least = math.ceil(total / (_DSP_SHARE * fpga.dsp))
    while True:
        cores = [CoreSize(name, inputs, outputs, _reuse(inputs, outputs, least)) for name, inputs, outputs in sizes]
        if estimate(cores, fpga).fits(fpga):
            return cores
        slower = [core.reuse for core in cores if core.reuse < core.multiplications]
        if not slower:
            return None
        least = min(slower) + 1


def _reuse(inputs: int, outputs: int, least: int) -> int:
    """The smallest reuse factor from `least` on that hls4ml's `Resource` strategy takes as it is; else the largest.

    It divides the multiplications; below the number of inputs it divides these, above it is a multiple of them.
    """
    below = (factor for factor in range(1, inputs) if inputs % factor == 0)
    above = (inputs * factor for factor in range(1, outputs + 1) if outputs % factor == 0)
    return next((factor for factor in (*below, *above) if factor >= least), inputs * outputs)
