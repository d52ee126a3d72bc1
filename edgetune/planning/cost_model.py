"""How much work the passes of a run are."""

from __future__ import annotations

from collections.abc import Iterable

from edgetune.data.batcher import BatchShape
from edgetune.data.batches import Batch
from edgetune.formats.bundle import Bundle
from edgetune.planning.choice import Choice
from edgetune.planning.cost import start_cost, step_cost
from edgetune.planning.memory import Sizes, Work


class CostModel:
    """Work of a pass by the manifest's sizes: through the layers that the plan runs itself.

    Args:
        bundle: What is trained.
        choice: By which plan.
    """

    def __init__(self, bundle: Bundle, choice: Choice) -> None:
        self._sizes = Sizes(bundle.manifest, choice.plan)
        self._plan = choice.plan
        self._dequantise = choice.footprint.dequantise if choice.footprint else 0.0
        self.layers = self._sizes.layers
        self.start = start_cost(self._sizes, self._dequantise, self._plan)
        """Work of a pass without positions."""

    def work(self, positions: int, scores: int, trained: int) -> float:
        """Work of a pass; see `step_cost`."""
        return step_cost(self._sizes, self._dequantise, Work(positions, scores), self._plan, trained)

    def of_passes(self, shapes: Iterable[BatchShape]) -> float:
        """Work of passes of these shapes, with what each costs beside its positions."""
        return sum(self.start + self.work(each.positions, each.scores, each.trained_tokens) for each in shapes)

    def of(self, batch: Batch) -> float:
        """Work of a batch."""
        sequences, length = batch.input_ids.shape
        return self.work(sequences * length, sequences * length**2, batch.trained_tokens)
