"""How much memory a layered plan takes: what a process holds at once, added up.

Highest resident memory = the process itself + adapters with gradients and moments + hidden states between the
sublayers + kept activations + weights as they are multiplied + what the graphs hold while they run + pages of the
weights' file. Sizes come from the bundle's manifest; what only measuring tells is the runtime's `Footprint`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgetune.execution import ExecutionPlan, Products
from edgetune.frozen import BITS, BLOCK_SIZE, LAYERS
from edgetune.manifest import BundleManifest, TensorSpec
from edgetune.pieces import cut, kept_outputs, pieces_of
from edgetune.trunk import FOLDER

SUBLAYERS = ("attention", "mlp")
_FLOAT = 4
_ADAPTER_COPIES = 5
"""Parameters, gradients, two moments, and the copy that is written at the end."""
_FORWARD_COPIES = 3
"""Without a backward pass: parameters, what is measured in their place, and the copy that is written."""
_WITHOUT_FIRST = 0.7
"""About what share of a piece's weights is not the first of its matrices."""
_HALF = 2
"""Bytes of a number in 16 bits: of an fp16 base, and of the hidden states that a lean plan keeps."""
_TURNS = 2
"""Arrays in which a lean plan computes hidden states by turns."""
_BETWEEN_GRAPHS = 6
"""Arrays of hidden states beside those between the sublayers: three gradients, two sums of pieces, one on the way."""
_BETWEEN_FORWARD = 2
"""The same without a backward pass: one sum of pieces, one on the way."""


@dataclass(frozen=True)
class Footprint:
    """What a runtime takes in the layered form; found by `python -m benchmarks.footprints`."""

    products: Products
    storage: int
    """Bytes of a number in hidden states, kept activations and the head's weights."""
    base: int
    """Bytes of a process that has everything loaded but nothing of the model."""
    attention_states: float
    """What the attention's graphs hold: bytes for each position and channel of a piece's queries."""
    attention_scores: float
    """And for each score of each head of a piece."""
    mlp_states: float
    """What the feed-forward network's graphs hold: bytes for each position and inner channel of a piece."""
    hidden_states: float
    """What either holds besides: bytes for each position and hidden channel."""
    graph_weights: float
    """What either, and the head's, hold of the weights they are given: bytes for each."""
    logits: float
    """What the head's graphs hold: bytes for each logit."""
    together: bool
    """Each graph has memory of its own; otherwise all share what the largest needs."""
    shapes: int
    """Shapes of a batch whose memory is held at the same time: of compiled graphs, or what cannot be used again."""
    shape: int
    """Bytes that a shape takes whatever its size: compiled code, where graphs are compiled for shapes."""
    cache: int
    """Bytes on the disk for compiled graphs, at most."""
    weight: float
    """Bytes of a sublayer's frozen weight as it is multiplied."""
    forward: float
    """Of what the sublayers' graphs hold: the share of those of the forward pass."""
    backward: int
    """Bytes of `base` that are the backward graphs', loaded or compiled."""
    dequantise: float
    """Time to dequantise a weight, in the time that a product needs for one weight and position."""


@dataclass(frozen=True)
class Work:
    """The largest batch of a run."""

    positions: int
    """Of all its sequences together."""
    scores: int
    """Attention scores of one head: the squares of the sequences' lengths, added up."""
    others: tuple[tuple[int, int], ...] = ()
    """Positions and scores of each other shape that batches have."""


class Sizes:
    """What of a bundle decides how much memory and work a step takes.

    Args:
        manifest: Of a bundle; without the layered form nothing is known of what is kept.
        trunk_layers: Lowest layers that a trunk computes.
    """

    def __init__(self, manifest: BundleManifest, trunk_layers: int = 0) -> None:
        a = manifest.architecture
        layered = any(graph.role.startswith(f"{LAYERS}/") for graph in manifest.graphs)
        pieces = pieces_of(manifest) if layered else cut(a)
        self.layers = a.num_hidden_layers - trunk_layers
        self.trunk_layers = trunk_layers
        self.trunk = trunk_bytes(manifest) if trunk_layers else 0
        """What the trunk's graph holds: its weights as they are stored and as they are multiplied."""
        self.hidden = a.hidden_size
        self.heads = a.num_attention_heads // pieces.attention
        self.queries = self.heads * a.head_dim
        """Of a piece, as the number of its heads is."""
        self.inner = a.intermediate_size // pieces.mlp
        self.vocabulary = a.vocab_size
        self.adapter = sum(math.prod(shape) for shape in manifest.lora.from_layer(trunk_layers).shapes().values())
        self.pieces = dict(zip(SUBLAYERS, (pieces.attention, pieces.mlp), strict=True))
        queries, keys = (heads * a.head_dim for heads in (a.num_attention_heads, a.num_key_value_heads))
        self.weights = {
            "attention": a.hidden_size * 2 * (queries + keys),
            "mlp": 3 * a.hidden_size * a.intermediate_size,
        }
        """Frozen weights of a layer's sublayers."""
        kept = {name: kept_outputs(manifest, f"{LAYERS}/{name}") if layered else [] for name in SUBLAYERS}
        self.kept = {name: sum(map(_channels, specs)) for name, specs in kept.items()}
        """What a piece keeps for the backward pass: numbers for each position."""
        self.stored = stored_bytes(manifest.base.weights)
        """Of a weight in the file."""

    @property
    def head(self) -> int:
        """Weights of the logits."""
        return self.vocabulary * self.hidden


def stored_bytes(base: str) -> float:
    """Of a linear weight in the file, with its share of a scale."""
    if base in BITS:
        return BITS[base] / 8 + _FLOAT / BLOCK_SIZE
    return _HALF if base == "fp16" else _FLOAT


def peak_memory(sizes: Sizes, footprint: Footprint, work: Work, plan: ExecutionPlan) -> int:
    """Highest resident memory of a run, in bytes, file pages included."""
    s, f = sizes, footprint
    positions = work.positions
    layer = sum(s.pieces[name] * s.kept[name] for name in SUBLAYERS)
    # A layer that keeps nothing writes what it could keep to one place that all of them share; a lean one its
    # attention's to a place for each piece.
    shared = 0 if plan.kept_layers == s.layers else sum(s.kept.values())
    if plan.lean and shared:
        shared += s.pieces["attention"] * s.kept["attention"]
    copies = _FORWARD_COPIES if plan.forward_only else _ADAPTER_COPIES
    held = copies * _FLOAT * s.adapter + positions * s.hidden * _states(s, f, plan)
    held += f.storage * positions * (plan.kept_layers * layer + shared)
    held += s.trunk + plan.trunk_cache_bytes
    base = f.base - (f.backward if plan.forward_only else 0)
    return int(base + held + _weights(s, f, plan) + _graphs(s, f, work, plan) + _pages(s))


def trunk_bytes(manifest: BundleManifest) -> int:
    """What ONNX Runtime holds of a trunk: its file, and the same weights once more as it multiplies them."""
    return 2 * sum(file.size for file in manifest.files if file.path.startswith(f"{FOLDER}/"))


def _states(s: Sizes, f: Footprint, plan: ExecutionPlan) -> int:
    """Bytes of all hidden states for each position and channel."""
    if plan.forward_only:
        return f.storage * (_TURNS + _BETWEEN_FORWARD)
    if not plan.lean:
        return f.storage * (2 * s.layers + 1 + _BETWEEN_GRAPHS)
    # What enters a layer; of layers that keep their activations, what enters the feed-forward network as well.
    return _HALF * (s.layers + 1 + plan.kept_layers) + f.storage * (_TURNS + _BETWEEN_GRAPHS)


def _weights(s: Sizes, f: Footprint, plan: ExecutionPlan) -> float:
    """Weights as they are multiplied that are in memory at the same time."""
    if plan.resident:
        return f.weight * s.layers * sum(s.weights.values()) + f.storage * s.head
    # The head's weight shares memory with a piece's first one.
    rest = max(_WITHOUT_FIRST * s.weights[name] / s.pieces[name] for name in SUBLAYERS)
    return f.weight * rest + f.storage * head_tokens(s, plan) * s.hidden


def _graphs(s: Sizes, f: Footprint, work: Work, plan: ExecutionPlan) -> float:
    """What graphs hold while they run."""
    rows, tokens = min(plan.head_rows, work.positions), head_tokens(s, plan)
    head = rows * (f.logits * tokens + f.hidden_states * s.hidden) + f.graph_weights * tokens * s.hidden
    share = f.forward if plan.forward_only else 1.0
    shapes = [(work.positions, work.scores), *sorted(work.others, reverse=True)][: f.shapes]
    if not f.together:
        largest, *others = (max(_sublayers(s, f, *shape)) for shape in shapes)
        return max(share * largest, head) + share * sum(others)
    # Where some layers are computed again and others are not, there are two graphs for the backward pass.
    both = 0 < plan.kept_layers < s.layers
    held = sum(f.shape + sum(_sublayers(s, f, *shape)) for shape in shapes)
    return share * (1.4 if both else 1.0) * held + head


def _sublayers(s: Sizes, f: Footprint, positions: int, scores: int) -> tuple[float, float]:
    """What the graphs of attention and of the feed-forward network hold for batches of one shape."""
    states = f.hidden_states * positions * s.hidden
    weights = {name: f.graph_weights * s.weights[name] / s.pieces[name] for name in SUBLAYERS}
    attention = f.attention_states * positions * s.queries + f.attention_scores * scores * s.heads
    return attention + states + weights["attention"], f.mlp_states * positions * s.inner + states + weights["mlp"]


def _pages(s: Sizes) -> float:
    """Pages of the weights' file, which are given back after each sublayer."""
    return s.stored * max(*s.weights.values(), s.head)


def head_tokens(sizes: Sizes, plan: ExecutionPlan) -> int:
    """Tokens of the vocabulary whose weights the head takes at a time."""
    return min(plan.head_tokens or sizes.vocabulary, sizes.vocabulary)


def _channels(spec: TensorSpec) -> int:
    """Numbers for each position: the sizes that are no batch and no sequence."""
    return math.prod(size for size in spec.shape if isinstance(size, int))
