"""How much work a training step is, from the sizes in the manifest: products of one number with another, added up."""

from __future__ import annotations

from collections.abc import Iterable

from edgetune.data.batcher import BatchShape
from edgetune.data.batches import Batch
from edgetune.data.packing import ATTENTION_COST, PASS_COST
from edgetune.formats.manifest import BundleManifest
from edgetune.planning.memory import SUBLAYERS, Sizes, Work, head_tokens
from edgetune.runtimes.execution import ExecutionPlan, LayeredPlan
from edgetune.runtimes.footprint import Footprint

_PIECE = 1500
"""What every piece after a sublayer's first repeats and adds up, in products per hidden number: the 6 ms a piece
that OpenVINO took on an EPYC at Phi-3-mini's width and 512 positions, in products of bfloat16; of int8 it is 2,600."""


def step_cost(
    sizes: Sizes,
    dequantise: float,
    work: Work,
    plan: ExecutionPlan,
    trained: int | None = None,
    *,
    upper_alone: bool = False,
) -> float:
    """Work of a pass, forward and backward or forward alone, in products with a frozen weight; each is two operations.

    Args:
        sizes: Of the bundle.
        dequantise: Price of a weight that is dequantised, in products.
        work: The batch.
        plan: How it is executed.
        trained: Positions whose logits are computed; all when it is not given.
        upper_alone: Whether what enters the lowest trained layer is there already.
    """
    s, positions = sizes, work.positions
    layered = plan if isinstance(plan, LayeredPlan) else None
    logits = positions if trained is None else trained
    forward_layers = s.backward_layers if upper_alone else s.layers
    further_pieces = sum(s.pieces.values()) - len(SUBLAYERS) if layered else 0
    repeated = _PIECE * forward_layers * further_pieces * s.hidden * positions
    attention = ATTENTION_COST * 2 * s.queries * s.pieces["attention"] * work.scores
    if plan.forward_only:
        weights = forward_layers * sum(s.weights.values())
        dequantised = dequantise * (weights + s.head) if layered and not layered.resident else 0.0
        return weights * positions + repeated + attention * forward_layers + s.head * logits + dequantised
    kept = layered.kept_layers if layered else s.backward_layers
    again = s.backward_layers - kept
    both = forward_layers + s.backward_layers
    # Forward and backward; of what is computed again, the last product of a sublayer is not needed.
    products = float(both) * sum(s.weights.values())
    products += again * sum(s.weights[name] - s.hidden * width for name, width in _last_products(s).items())
    # Attention multiplies queries with keys and scores with values: forward, twice in the backward pass, and again.
    passes_of_attention = forward_layers + 2 * s.backward_layers + again
    if layered and layered.lean:
        products += s.weights["attention"] * again
        passes_of_attention += again
    passes = 2 if layered is None or head_tokens(s, layered) == s.vocabulary else 3
    cost = products * positions + both / forward_layers * repeated + attention * passes_of_attention
    cost += passes * s.head * logits
    if layered and not layered.resident:
        read = both * sum(s.weights.values()) + (passes - 1) * s.head
        read += s.weights["attention"] * again if layered.lean else 0
        cost += dequantise * read
    return cost


def start_cost(sizes: Sizes, dequantise: float, plan: ExecutionPlan) -> float:
    """Work of a pass beside that of its positions; without what streamed weights cost to dequantise.

    Args:
        sizes: Of the bundle.
        dequantise: Price of a weight that is dequantised, in products.
        plan: How it is executed.
    """
    none, one = (step_cost(sizes, dequantise, Work(positions, 0), plan, 0) for positions in (0, 1))
    return PASS_COST * (one - none)


class CostModel:
    """Work of a pass by the manifest's sizes: through the layers that the plan runs itself.

    Args:
        manifest: Of the bundle that is trained.
        plan: By which it is.
        footprint: The runtime's; none for the whole step.
    """

    def __init__(self, manifest: BundleManifest, plan: ExecutionPlan, footprint: Footprint | None) -> None:
        self._sizes = Sizes(manifest, plan if isinstance(plan, LayeredPlan) else None)
        self._plan = plan
        self._dequantise = 0.0 if footprint is None else footprint.dequantise_products
        self.layers = self._sizes.layers
        self.start = start_cost(self._sizes, self._dequantise, self._plan)
        """Work of a pass without positions."""

    def work(self, positions: int, scores: int, trained: int, *, upper_alone: bool = False) -> float:
        """Work of a pass; see `step_cost`."""
        pass_ = Work(positions, scores)
        return step_cost(self._sizes, self._dequantise, pass_, self._plan, trained, upper_alone=upper_alone)

    def of_passes(self, shapes: Iterable[BatchShape]) -> float:
        """Work of passes of these shapes, with what each costs beside its positions."""
        return sum(self.start + self.work(each.positions, each.scores, each.trained_tokens) for each in shapes)

    def of(self, batch: Batch) -> float:
        """Work of a batch."""
        sequences, length = batch.input_ids.shape
        return self.work(sequences * length, sequences * length**2, batch.trained_tokens)


def _last_products(s: Sizes) -> dict[str, int]:
    """Channels that go into the last product of each sublayer."""
    widths = s.queries * s.pieces["attention"], s.inner * s.pieces["mlp"]
    return dict(zip(SUBLAYERS, widths, strict=True))
