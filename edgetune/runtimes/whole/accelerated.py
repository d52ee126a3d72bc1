"""A model in training, and its forward pass alone, on an accelerator."""

from __future__ import annotations

from edgetune.formats.bundle import Bundle
from edgetune.model.lora import Parameters
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.placement import Placement
from edgetune.runtimes.whole.compiled import AcceleratorGraphs
from edgetune.runtimes.whole.session import PortableForward, PortableSession


class _Placing:
    """Tells where graphs run."""

    _placed: AcceleratorGraphs

    def placements(self) -> list[Placement]:
        """Where the graphs run that were compiled so far."""
        return list(self._placed.placements.values())


class AcceleratorSession(_Placing, PortableSession):
    """A model in training whose loss and gradients an accelerator computes.

    AdamW, its moments and the parameters stay in float32 on the CPU. The parameters are inputs of the compiled graph,
    so that a step changes values only.
    """

    def __init__(
        self, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, graphs: AcceleratorGraphs
    ) -> None:
        super().__init__(bundle, parameters, optimizer, graphs)
        self._placed = graphs


class AcceleratorForward(_Placing, PortableForward):
    """A model whose loss an accelerator computes; the parameters are inputs of the compiled graph."""

    def __init__(self, parameters: Parameters, graphs: AcceleratorGraphs) -> None:
        super().__init__(parameters, graphs)
        self._placed = graphs
