"""What a runtime needs for the layered form, as it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.runtimes.execution import Precision


@dataclass(frozen=True)
class Footprint:
    """What a runtime needs for the layered form; measured by `python -m benchmarks.footprints`."""

    precision: Precision
    """Of products with frozen weights."""
    storage_bytes: int
    """Bytes per number in hidden states, kept activations and the head's weights."""
    base_bytes: int
    """Bytes of a process that has loaded everything except the model."""
    attention_state_bytes: float
    """Memory of the attention graphs: bytes per position and query channel of a piece."""
    attention_score_bytes: float
    """Further memory of the attention graphs that compute a layer again: bytes per score of each head of a piece."""
    kept_score_bytes: float
    """The same of those that take what the layer kept."""
    mlp_state_bytes: float
    """Memory of the feed-forward network's graphs: bytes per position and inner channel of a piece."""
    hidden_state_bytes: float
    """Further memory of either sublayer's graphs, and of the head's: bytes per position and hidden channel."""
    graph_weight_bytes: float
    """Bytes that the graphs of the sublayers hold per weight that they are given."""
    logit_bytes: float
    """Memory of the head's graphs: bytes per logit."""
    together: bool
    """Whether each graph has memory of its own, for each batch shape; otherwise the largest's serves all."""
    apart_share: float
    """Share of what the smaller of sublayers and head need that the larger's memory does not serve: it is in pieces."""
    shapes_held: int
    """Number of batch shapes whose graphs are held at once, where each has memory of its own."""
    shape_bytes: int
    """Bytes per batch shape, whatever its size: compiled code, where graphs are compiled for shapes."""
    cache_bytes: int
    """Most bytes on disk for compiled graphs."""
    weight_bytes: float
    """Bytes per frozen weight of a sublayer, laid out as it is multiplied."""
    forward_share: float
    """Share of the sublayer graphs' memory that is the forward pass's."""
    backward_bytes: int
    """Bytes of `base_bytes` that belong to the backward graphs, loaded or compiled."""
    dequantise_products: float
    """Time to dequantise a weight, relative to the time of a product per weight and position."""
