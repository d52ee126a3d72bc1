"""The peak memory of a layered plan: everything that a process holds at once, added up.

Peak resident memory = the process itself + what its allocator does not give back + adapters with gradients and
moments + hidden states between the sublayers + kept activations + weights in the layout in which they are multiplied +
memory of the graphs while they run + pages of the weights' file. The sizes come from the bundle's manifest; what can
only be measured is the runtime's `Footprint`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgetune.formats.layered_graphs import kept_outputs, pieces_of
from edgetune.formats.manifest import BundleManifest, TensorSpec
from edgetune.formats.roles import LAYERS, sublayer_role
from edgetune.formats.trunk import FOLDER
from edgetune.model.architecture import frozen_weights
from edgetune.model.blocks import BITS, BLOCK_SIZE
from edgetune.model.pieces import cut
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.footprint import Footprint
from edgetune.runtimes.layered.moments import STRETCH

SUBLAYERS = ("attention", "mlp")
_FLOAT_BYTES = 4
"""Bytes of a float32."""
_ADAPTER_COPIES = 3
"""Float32 arrays of the adapter's size: parameters, gradients, and the copy that is written at the end."""
_MOMENTS = 2
"""Of each parameter."""
_OF_MAGNITUDES = 3
"""Arrays of the magnitudes' size beside them: gains, norms, and those of the frozen rows."""
_FORWARD_COPIES = 3
"""The same without a backward pass: parameters, their perturbed copy, and the copy that is written."""
_WITHOUT_FIRST = 0.7
"""Share of a piece's weights that are not in its first matrix, roughly."""
_HALF = 2
"""Bytes of a 16-bit number: in an fp16 base, and in the hidden states that a lean plan keeps."""
_TURNS = 2
"""Arrays between which hidden states that are not kept as they are computed take turns."""
_OTHERS_KEPT = 0.75
"""Share of the memory of graphs for other batch shapes where all activations are kept; measured, not derived."""
_MASK = 8
"""Bytes per attention score of one head: the mask of this batch, and the last one's while it is made."""
_BETWEEN_GRAPHS = 6
"""Arrays of hidden states besides those between sublayers, at most: gradients, sums over pieces, one in transit."""
_BETWEEN_FORWARD = 2
"""The same without a backward pass: one sum over pieces, one in transit."""


@dataclass(frozen=True)
class Work:
    """The largest pass of a run through the model."""

    positions: int
    """Positions of all its sequences together."""
    scores: int
    """Attention scores of one head: the sum of the squared lengths of its sequences."""
    others: tuple[tuple[int, int], ...] = ()
    """Positions and scores of every other shape of a pass."""
    row_bytes: int = 0
    """Bytes of the rows that are trained and measured on, which stay in memory."""


class Sizes:
    """The sizes of a bundle that decide how much memory and work a step takes.

    Args:
        manifest: The manifest of the bundle; without the layered form, what pieces keep is unknown and counts as 0.
        plan: Says how many of the lowest layers a trunk computes, and how wide the pieces of the others are; none where
            the whole step is one graph.
    """

    def __init__(self, manifest: BundleManifest, plan: LayeredPlan | None = None) -> None:
        plan = plan or LayeredPlan()
        a = manifest.architecture
        layered = any(graph.role.startswith(f"{LAYERS}/") for graph in manifest.graphs)
        pieces = pieces_of(manifest, wide=plan.wide) if layered else cut(a)
        self.layers = a.num_hidden_layers - plan.trunk_layers
        """Those that the plan runs itself."""
        self.backward_layers = a.num_hidden_layers - plan.first_trained
        """Those of them that have a backward pass: from the lowest that is trained on."""
        self.trunk_layers = plan.trunk_layers
        self.trunk = trunk_bytes(manifest) if plan.trunk_layers else 0
        """Bytes of the trunk's graph: its weights as they are stored and as they are multiplied."""
        self.hidden = a.hidden_size
        self.heads = a.num_attention_heads // pieces.attention
        self.queries = self.heads * a.head_dim
        """Query channels of a piece; `heads` counts the heads of a piece, too."""
        self.inner = a.intermediate_size // pieces.mlp
        self.vocabulary = a.vocab_size
        lora = plan.trained_slots(manifest.lora)
        self.adapter = lora.parameters
        """Number of trainable parameters."""
        slots = lora.slots if lora.dora else []
        projected = sum(lora.rank_of(slot.module) * slot.out_features for slot in slots) // self.layers
        self.gains = _OF_MAGNITUDES * sum(slot.out_features for slot in slots) + projected
        """Numbers beside DoRA's magnitudes; of what the norms are found from, one layer's at a time."""
        self.pieces = dict(zip(SUBLAYERS, (pieces.attention, pieces.mlp), strict=True))
        self.weights = frozen_weights(a)
        """Number of frozen weights of each sublayer of a layer."""
        roles = {name: sublayer_role(LAYERS, name, wide=plan.wide) for name in SUBLAYERS}
        kept = {name: kept_outputs(manifest, role) if layered else [] for name, role in roles.items()}
        self.kept = {name: sum(map(_channels, specs)) for name, specs in kept.items()}
        """Numbers per position that a piece keeps for the backward pass."""
        self.stored = bytes_a_weight(manifest.base.weights)
        """Bytes per weight in the file."""

    @property
    def head(self) -> int:
        """Number of weights of the output projection."""
        return self.vocabulary * self.hidden


def bytes_a_weight(base: str) -> float:
    """Bytes per linear weight in the file, including its share of a scale."""
    if base in BITS:
        return BITS[base] / 8 + _FLOAT_BYTES / BLOCK_SIZE
    return _HALF if base == "fp16" else _FLOAT_BYTES


def peak_memory(sizes: Sizes, footprint: Footprint, work: Work, plan: LayeredPlan) -> int:
    """Peak resident memory of a run in bytes, file pages included."""
    s, f = sizes, footprint
    positions = work.positions
    layer = sum(s.pieces[name] * s.kept[name] for name in SUBLAYERS)
    # A layer that keeps nothing writes what it could keep to one place that all of them share; a lean one its
    # attention's to a place for each piece.
    shared = 0 if plan.kept_layers == s.backward_layers else sum(s.kept.values())
    if plan.lean and shared:
        shared += s.pieces["attention"] * s.kept["attention"]
    held = _adapter(s, plan) + _FLOAT_BYTES * s.gains + positions * s.hidden * _states(s, f, plan)
    held += f.storage_bytes * positions * (plan.kept_layers * layer + shared)
    # While what enters the lowest trained layer is written, there is all of it in 16 bits as well.
    entering = 0 if plan.states is None else _HALF * positions * s.hidden
    held += s.trunk + entering + _MASK * work.scores
    base = f.base_bytes - (f.backward_bytes if plan.forward_only else 0)
    return int(base + work.row_bytes + held + _weights(s, f, plan) + _graphs(s, f, work, plan) + _pages(s))


def _adapter(s: Sizes, plan: LayeredPlan) -> float:
    """Bytes of the adapter, and of all that a step has for each of its parameters."""
    if plan.forward_only:
        return _FLOAT_BYTES * _FORWARD_COPIES * s.adapter
    # Moments in 8 bits are float32 where they are being updated.
    opened = min(s.adapter, STRETCH) if plan.eight_bit_states else 0
    moments = _MOMENTS * (plan.moment_bytes * s.adapter + _FLOAT_BYTES * opened)
    return _FLOAT_BYTES * _ADAPTER_COPIES * s.adapter + moments


def trunk_bytes(manifest: BundleManifest) -> int:
    """Bytes that ONNX Runtime holds for a trunk: its file, and the same weights once more as it multiplies them."""
    return 2 * sum(file.size for file in manifest.files if file.path.startswith(f"{FOLDER}/"))


def _states(s: Sizes, f: Footprint, plan: LayeredPlan) -> int:
    """Bytes of all hidden states, per position and channel: float32 where computed, and as they are kept."""
    if plan.forward_only:
        return _FLOAT_BYTES * (_TURNS + _BETWEEN_FORWARD)
    between = _FLOAT_BYTES * _BETWEEN_GRAPHS
    if plan.lean:
        # What enters a layer; of layers that keep their activations, what enters the feed-forward network as well.
        return _HALF * (s.backward_layers + 1 + plan.kept_layers) + _FLOAT_BYTES * _TURNS + between
    # Layers without a backward pass keep none of theirs.
    as_computed = f.storage_bytes == _FLOAT_BYTES and s.backward_layers == s.layers
    turns = 0 if as_computed else _FLOAT_BYTES * _TURNS
    return f.storage_bytes * (2 * s.backward_layers + 1) + turns + between


def _weights(s: Sizes, f: Footprint, plan: LayeredPlan) -> float:
    """Bytes of the weights that are in memory at the same time, in the layout in which they are multiplied."""
    if plan.resident:
        # The exact ones beside those of the backward pass.
        numbers = f.weight_bytes * s.layers + f.storage_bytes * plan.exact_layers
        return numbers * sum(s.weights.values()) + f.storage_bytes * s.head
    # The head's weight shares memory with a piece's first one.
    rest = max(_WITHOUT_FIRST * s.weights[name] / s.pieces[name] for name in SUBLAYERS)
    # Exact ones are given back before a backward pass, which needs more unless all activations are kept.
    exact = plan.exact_layers and (plan.forward_only or plan.kept_layers == s.backward_layers)
    weight = max(f.weight_bytes, f.storage_bytes) if exact else f.weight_bytes
    return weight * rest + f.storage_bytes * head_tokens(s, plan) * s.hidden


def _graphs(s: Sizes, f: Footprint, work: Work, plan: LayeredPlan) -> float:
    """Bytes that the graphs hold while they run."""
    rows, tokens = min(plan.head_rows, work.positions), head_tokens(s, plan)
    head = rows * (f.logit_bytes * tokens + f.hidden_state_bytes * s.hidden)
    share = f.forward_share if plan.forward_only else 1.0
    # A lean plan's attention keeps its activations until the backward pass, which comes next.
    score = f.kept_score_bytes if plan.lean or plan.kept_layers == s.backward_layers else f.attention_score_bytes
    largest = (work.positions, work.scores)
    if not f.together:
        sublayers = share * max(_sublayers(s, f, *largest, score))
        return max(sublayers, head) + f.apart_share * min(sublayers, head)
    # Where some layers are computed again and others are not, there are two graphs for the backward pass.
    both = 0 < plan.kept_layers < s.backward_layers
    each = [f.shape_bytes + sum(_sublayers(s, f, *shape, score)) for shape in (largest, *work.others)]
    # Beside the largest are those that came last, whichever they are.
    others = sum(each[1:]) * min(1.0, (f.shapes_held - 1) / max(1, len(work.others)))
    held = each[0] + (_OTHERS_KEPT if plan.kept_layers == s.backward_layers else 1.0) * others
    exact = f.forward_share * held if plan.exact_layers else 0.0
    return share * (1.4 if both else 1.0) * held + exact + head


def _sublayers(s: Sizes, f: Footprint, positions: int, scores: int, score: float) -> tuple[float, float]:
    """Bytes of the graphs of attention and of the feed-forward network, for batches of one shape."""
    states = f.hidden_state_bytes * positions * s.hidden
    weights = {name: f.graph_weight_bytes * s.weights[name] / s.pieces[name] for name in SUBLAYERS}
    attention = f.attention_state_bytes * positions * s.queries + score * scores * s.heads
    return attention + states + weights["attention"], f.mlp_state_bytes * positions * s.inner + states + weights["mlp"]


def _pages(s: Sizes) -> float:
    """Bytes of mapped pages of the weights' file, which are given back after each sublayer."""
    return s.stored * max(*s.weights.values(), s.head)


def head_tokens(sizes: Sizes, plan: LayeredPlan) -> int:
    """Number of vocabulary tokens whose weights the head takes at a time."""
    return min(plan.head_tokens or sizes.vocabulary, sizes.vocabulary)


def _channels(spec: TensorSpec) -> int:
    """Numbers per position: the product of all dimensions other than batch and sequence."""
    return math.prod(size for size in spec.shape if isinstance(size, int))
