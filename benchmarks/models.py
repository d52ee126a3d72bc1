"""The models that are measured, and the LoRA slots that every contestant trains in them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.checkpoints import SIZES, Size


@dataclass(frozen=True)
class Model:
    """A Phi-3 model with LoRA slots on all its projections; its weights are random unless it says so."""

    name: str
    """What tables call it, and the folder of its checkpoint and bundles in the cache."""
    size: Size
    rank: int
    alpha: float
    max_length: int = 1024
    """Longest row that its bundles take, in tokens."""
    trained: bool = False
    """Whether it is the real model (`examples/llama_to_phi3.py`), or the lowest of its layers."""


SMALL = Model("small", SIZES["small"], rank=8, alpha=16.0)
"""98 million parameters."""
_GROUPED = Size(hidden=1024, intermediate=2816, layers=4, heads=16, vocabulary=32064, key_value_heads=4)
GROUPED = Model("grouped", _GROUPED, rank=8, alpha=16.0)
"""111 million parameters, most of them the vocabulary's; grouped-query attention."""
FULL = Model("full", SIZES["full"], rank=16, alpha=32.0)
"""Phi-3-mini, 3.8 billion parameters."""
REAL = Model(
    "smollm2",
    Size(hidden=576, intermediate=1536, layers=30, heads=9, vocabulary=49152, positions=8192, key_value_heads=3),
    rank=16,
    alpha=32.0,
    max_length=256,
    trained=True,
)
"""SmolLM2-135M."""


def with_layers(model: Model, layers: int) -> Model:
    """The same model in another depth."""
    return replace(model, name=f"{model.name}-{layers}-layers", size=replace(model.size, layers=layers))
