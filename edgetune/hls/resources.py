"""What cores take of an FPGA, by counting; what a synthesis makes of them, it alone says.

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
"""Of the FPGA's DSPs that the cores may take together."""


@dataclass(frozen=True)
class Fpga:
    """An FPGA."""

    name: str
    part: str
    """What Vitis HLS calls it."""
    dsp: int
    block_ram: int
    """36 Kb each."""
    ultra_ram: int
    """288 Kb each."""
    clock_ns: float

    def weights(self) -> int:
        """How many weights its memories hold."""
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
        """For one vector; as many as weights."""
        return self.inputs * self.outputs

    @property
    def dsp(self) -> int:
        """Multipliers."""
        return math.ceil(self.multiplications / self.reuse)

    @property
    def block_ram(self) -> int:
        """Of weights, or as much UltraRAM."""
        return math.ceil(self.dsp * WIDTH / _BLOCK_WIDTH) * math.ceil(self.reuse / _BLOCK_DEPTH)


@dataclass(frozen=True)
class Estimate:
    """What all cores take together."""

    multiplications: int
    """For each token."""
    dsp: int
    block_ram: int
    cycles: int
    """For each token through all cores, one after the other; attention and the rest are not counted."""


def estimate(cores: Iterable[CoreSize]) -> Estimate:
    """Add up."""
    cores = list(cores)
    return Estimate(
        sum(core.multiplications for core in cores),
        sum(core.dsp for core in cores),
        sum(core.block_ram for core in cores),
        sum(core.reuse for core in cores),
    )


def shared(sizes: Sequence[tuple[str, int, int]], fpga: Fpga) -> list[CoreSize]:
    """Cores that fit into the FPGA's DSPs together, each with its share by its multiplications.

    Args:
        sizes: Name, inputs and outputs of each.
        fpga: Where they go.
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
