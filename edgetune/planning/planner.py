"""Which execution plan to take: the fastest exact one that fits into the memory there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from edgetune.config import PlanName
from edgetune.formats.layered_graphs import widths
from edgetune.formats.manifest import BundleManifest
from edgetune.planning.cost import step_cost
from edgetune.planning.memory import SUBLAYERS, Sizes, Work, peak_memory
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.footprint import Footprint

_HEAD_LOGITS = 8 << 20
"""Logits that exist at the same time in the head."""
_FEWEST_HEAD_ROWS = 32
_MOST_HEAD_ROWS = 256
"""Of pieces of the vocabulary: more rows are not faster, and take more memory."""
_HALF = 2
"""Bytes of 16 bits."""
_TOKENS_MULTIPLE = 64
"""A piece of the vocabulary is a multiple of this large."""
_INT8_LAYERS, _EXACT_EVERY = 12, 3
"""So many layers can all be int8; of what a deeper model has more, one in three are exact, the lowest."""


@dataclass(frozen=True)
class Prediction:
    """What a plan will need."""

    plan: LayeredPlan
    peak_memory_bytes: int
    """Highest resident memory, file pages of the weights included."""
    cost: float
    """Work of the largest pass, in products of one weight and position; smaller is faster."""


class Planner:
    """Plans for one bundle on one runtime.

    Args:
        manifest: Of a bundle with the layered form.
        footprint: The runtime's.
        work: The largest pass.
        given: What every plan has: the trunk, the layers that are trained, and whether it runs forward alone.
    """

    def __init__(self, manifest: BundleManifest, footprint: Footprint, work: Work, given: LayeredPlan) -> None:
        self._given = given
        self._sizes = {wide: Sizes(manifest, replace(given, wide=wide)) for wide in widths(manifest)}
        self._footprint = footprint
        self._work = work

    def choose(self, name: PlanName, budget: int | None) -> Prediction | None:
        """The fastest of the plans that `name` allows and `budget` has room for; of `stream`, the smallest.

        Args:
            name: `auto`, or what to hold it to; not `whole`.
            budget: Bytes; none is as much as there is.

        Returns:
            None when no plan fits.
        """
        found = [self.smallest(name)] if name == "stream" else [self.predict(plan) for plan in self._plans(name)]
        fitting = [prediction for prediction in found if budget is None or prediction.peak_memory_bytes <= budget]
        return min(fitting, key=lambda prediction: prediction.cost, default=None)

    def smallest(self, name: PlanName) -> Prediction:
        """The plan that needs the least memory of those that `name` allows."""
        return min(map(self.predict, self._plans(name)), key=lambda prediction: prediction.peak_memory_bytes)

    def predict(self, plan: LayeredPlan) -> Prediction:
        """Memory and work of a layered plan."""
        sizes = self._sizes[plan.wide]
        peak = peak_memory(sizes, self._footprint, self._work, plan)
        return Prediction(plan, peak, step_cost(sizes, self._footprint.dequantise_products, self._work, plan))

    def _plans(self, name: PlanName) -> Iterator[LayeredPlan]:
        """In pieces of either width."""
        for wide in self._sizes:
            yield from self._plans_of(wide, name)

    def _plans_of(self, wide: bool, name: PlanName) -> Iterator[LayeredPlan]:
        """With each number of kept layers, resident and streamed; the head's weight whole and in pieces."""
        s, precision = self._sizes[wide], self._footprint.precision
        exact = max(0, s.layers - _INT8_LAYERS) // _EXACT_EVERY if precision == "int8" else 0
        given = replace(self._given, precision=precision, exact_layers=exact, wide=wide)
        kept = {"keep": [s.backward_layers], "recompute": [0], "stream": [0]}.get(name, range(s.backward_layers + 1))
        kept = [0] if self._given.forward_only else kept
        for resident in {"keep": [True], "recompute": [True], "stream": [False]}.get(name, [True, False]):
            for tokens in [s.vocabulary] if resident else _head_tokens(s):
                rows = max(_FEWEST_HEAD_ROWS, _HEAD_LOGITS // tokens)
                # Where graphs are compiled for shapes, the last rows take one of theirs only if it is a power of two.
                rows = 1 << (rows.bit_length() - 1)
                rows = rows if tokens == s.vocabulary else min(rows, _MOST_HEAD_ROWS)
                tokens_at_once = tokens if tokens < s.vocabulary else None
                plan = replace(given, resident=resident, head_rows=rows, head_tokens=tokens_at_once)
                for count, lean in product(kept, self._lean(name)):
                    yield replace(plan, kept_layers=count, lean=lean)

    def _lean(self, name: PlanName) -> list[bool]:
        """Whether plans may be lean: those of `auto` only where 16 bits, or less, are what there is anyway."""
        if self._given.forward_only:
            return [False]
        sixteen = self._footprint.storage_bytes == _HALF or self._footprint.precision == "int8"
        return [False, True] if name == "stream" or (name == "auto" and sixteen) else [False]


def _head_tokens(sizes: Sizes) -> list[int]:
    """Tokens of the vocabulary at a time: all, as large as a sublayer's piece is in float32, or in int8."""
    s = sizes
    piece = max(s.weights[name] // s.pieces[name] for name in SUBLAYERS) // s.hidden
    parts = (piece // share // _TOKENS_MULTIPLE * _TOKENS_MULTIPLE for share in (1, 4))
    return sorted({s.vocabulary, *(min(s.vocabulary, max(_TOKENS_MULTIPLE, part)) for part in parts)}, reverse=True)
