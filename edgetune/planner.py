"""Which execution plan to take: what each needs in memory and in work, and the cheapest that fits.

A plan's peak is added up from what it holds at once: the process itself, adapters with gradients and moments, hidden
states between the sublayers, kept activations, dequantised weights, and the working set of the largest graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from edgetune.errors import ResourceError, UsageError
from edgetune.execution import WHOLE_STEP, ExecutionPlan, Products
from edgetune.manifest import BundleManifest

PlanName = Literal["auto", "whole", "keep", "recompute", "stream", "int8"]
_FLOAT = 4
_HEAD_LOGITS = 8 << 20
"""Logits that exist at the same time in the head."""
_FEWEST_HEAD_ROWS = 32


@dataclass(frozen=True)
class Footprint:
    """What a runtime needs in the layered form; figures as measured (benchmarks/results)."""

    products: Products
    storage: int
    """Bytes of a number in hidden states, kept activations and dequantised weights."""
    base: int
    """Bytes of a process that has everything loaded but nothing of the model."""
    attention_states: float
    """Working set of the attention's backward graph, in bytes for each position and hidden channel."""
    attention_scores: float
    """And for each score of each head."""
    mlp_states: float
    """Working set of the feed-forward network's backward graph, in bytes for each position and inner channel."""
    dequantise: float
    """Time to dequantise a weight, in the time that a product needs for one weight and position."""


@dataclass(frozen=True)
class Work:
    """The largest batch of a run."""

    positions: int
    """Of all its sequences together."""
    scores: int
    """Attention scores of one head: the squares of the sequences' lengths, added up."""


@dataclass(frozen=True)
class Prediction:
    """What a plan will need."""

    plan: ExecutionPlan
    peak_memory_bytes: int
    """Highest resident memory, file pages of the weights included."""
    cost: float
    """Work of a step, in products of one weight and position; smaller is faster."""


class Planner:
    """Plans for one bundle on one runtime.

    Args:
        manifest: The bundle's.
        footprint: The runtime's.
        work: The largest batch.
    """

    def __init__(self, manifest: BundleManifest, footprint: Footprint, work: Work) -> None:
        self._sizes = manifest.architecture
        self._footprint = footprint
        self._work = work
        self._adapter = sum(rows * columns for rows, columns in manifest.lora.shapes().values())
        self._file = next(file.size for file in manifest.files if file.path == "model.onnx.data")

    def choose(self, name: PlanName, budget: int | None) -> Prediction:
        """The cheapest of the plans that `name` allows and `budget` has room for.

        Raises:
            ResourceError: None fits; says what the smallest needs.
            UsageError: The plan's memory is not known, so that it takes no budget.
        """
        if name == "whole":
            if budget is not None:
                raise UsageError("--plan whole takes no --memory-budget: all activations are kept; use --plan auto")
            return Prediction(WHOLE_STEP, 0, 0.0)
        found = [self.predict(plan) for plan in self._candidates(name)]
        fitting = [prediction for prediction in found if budget is None or prediction.peak_memory_bytes <= budget]
        if not fitting:
            smallest = min(found, key=lambda prediction: prediction.peak_memory_bytes)
            raise ResourceError(
                f"--memory-budget {_gigabytes(budget or 0)} is too small: the smallest plan for this bundle and these "
                f"rows needs {_gigabytes(smallest.peak_memory_bytes)}; give that, or fewer or shorter rows a batch "
                "(--batch-size, --truncate)"
            )
        return min(fitting, key=lambda prediction: (prediction.cost, prediction.peak_memory_bytes))

    def predict(self, plan: ExecutionPlan) -> Prediction:
        """Memory and work of a layered plan."""
        return Prediction(plan, self._peak(plan), self._cost(plan))

    def _candidates(self, name: PlanName) -> Iterator[ExecutionPlan]:
        layers = self._sizes.num_hidden_layers
        rows = max(_FEWEST_HEAD_ROWS, _HEAD_LOGITS // self._sizes.vocab_size)
        products: Products = "int8" if name == "int8" else self._footprint.products
        plan = ExecutionPlan("layered", products, head_rows=rows)
        kept = {"keep": [layers], "recompute": [0], "stream": [0]}.get(name, range(layers + 1))
        for resident in {"keep": [True], "recompute": [True], "stream": [False]}.get(name, [True, False]):
            for count in kept:
                yield replace(plan, kept_layers=count, resident=resident)

    def _peak(self, plan: ExecutionPlan) -> int:
        a, f, positions = self._sizes, self._footprint, self._work.positions
        weight = 1 if plan.products == "int8" else f.storage
        linear = self._linear_weights()
        weights = sum(linear.values()) * a.num_hidden_layers + self._head_weights()
        if not plan.resident:
            weights = max(*linear.values(), self._head_weights())
        kept = self._kept_numbers() * max(1, plan.kept_layers)
        hidden = (2 * a.num_hidden_layers + 4) * positions * a.hidden_size
        graph = max(
            f.attention_states * positions * a.hidden_size
            + f.attention_scores * self._work.scores * a.num_attention_heads,
            f.mlp_states * positions * a.intermediate_size,
            2 * _FLOAT * plan.head_rows * a.vocab_size,
        )
        pages = self._file if plan.resident else self._file // max(1, a.num_hidden_layers)
        adapters = 4 * _FLOAT * self._adapter
        return int(f.base + adapters + weight * weights + f.storage * (kept + hidden) + graph + pages)

    def _cost(self, plan: ExecutionPlan) -> float:
        a, positions = self._sizes, self._work.positions
        linear = self._linear_weights()
        layer = sum(linear.values())
        # Forward and backward; the last product of a sublayer is not computed again.
        products = 2.0 * layer * a.num_hidden_layers
        again = linear["attention"] - a.hidden_size * a.num_attention_heads * a.head_dim + 2 * linear["mlp"] / 3
        products += again * (a.num_hidden_layers - plan.kept_layers)
        cost = products * positions
        if not plan.resident:
            cost += 2 * self._footprint.dequantise * (layer * a.num_hidden_layers + self._head_weights())
        return cost

    def _linear_weights(self) -> dict[str, int]:
        """Frozen weights of a layer's sublayers."""
        a = self._sizes
        queries = a.num_attention_heads * a.head_dim
        packed = queries + 2 * a.num_key_value_heads * a.head_dim
        return {"attention": a.hidden_size * (packed + queries), "mlp": 3 * a.hidden_size * a.intermediate_size}

    def _head_weights(self) -> int:
        return self._sizes.vocab_size * self._sizes.hidden_size

    def _kept_numbers(self) -> int:
        """What one layer keeps: qkv, context, gate_up."""
        a = self._sizes
        queries = a.num_attention_heads * a.head_dim
        channels = 2 * queries + 2 * a.num_key_value_heads * a.head_dim + 2 * a.intermediate_size
        return self._work.positions * channels


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
