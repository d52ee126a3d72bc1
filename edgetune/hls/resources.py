"""What cores take of an FPGA, estimated by counting; only a synthesis tells the real figures.

A multiplier is one DSP48E2, which multiplies 27 × 18 bits (AMD UG579). A weight memory holds as many words as the reuse
factor, each of all weights that are multiplied at the same time; a 36 Kb block RAM is at most 72 bits wide and then 512
deep (AMD UG573). Look-up tables and flip-flops depend on how the tool schedules and are not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgetune.hls.fixed_point import WIDTH

_BLOCK_WIDTH, _BLOCK_DEPTH = 72, 512
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
        """Number of weights that its memories hold."""
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
    def block_ram(self) -> int:
        """Number of block RAMs for the weights; UltraRAM of the same capacity does as well."""
        return math.ceil(self.dsp * WIDTH / _BLOCK_WIDTH) * math.ceil(self.reuse / _BLOCK_DEPTH)


@dataclass(frozen=True)
class Estimate:
    """What all cores take together."""

    multiplications: int
    """Multiplications for each token."""
    dsp: int
    block_ram: int
    cycles: int
    """Clock cycles for each token through all cores, one after the other; attention and the rest are not counted."""


def estimate(cores: Iterable[CoreSize]) -> Estimate:
    """What cores take together."""
    cores = list(cores)
    return Estimate(
        sum(core.multiplications for core in cores),
        sum(core.dsp for core in cores),
        sum(core.block_ram for core in cores),
        sum(core.reuse for core in cores),
    )


def shared(sizes: Sequence[tuple[str, int, int]], fpga: Fpga) -> list[CoreSize]:
    """Cores that fit into the FPGA's DSPs together, each with a share in proportion to its multiplications.

    Args:
        sizes: Name, inputs and outputs of each.
        fpga: The FPGA that has to hold them.
    """
    total = sum(inputs * outputs for _, inputs, outputs in sizes)
    least = math.ceil(total / (_DSP_SHARE * fpga.dsp))
    return [CoreSize(name, inputs, outputs, _reuse(inputs, outputs, least)) for name, inputs, outputs in sizes]


def _reuse(inputs: int, outputs: int, least: int) -> int:
    """The smallest reuse factor from `least` on that hls4ml's `Resource` strategy takes as it is.

    It divides the multiplications; below the number of inputs it divides these, above it is a multiple of them.
    """
    candidates = (factor for factor in range(min(least, inputs * outputs), inputs * outputs + 1))
    return next(
        factor
        for factor in candidates
        if (inputs * outputs) % factor == 0
        and (inputs % factor == 0 if factor < inputs else factor % inputs == 0)
    )  # fmt: skip
