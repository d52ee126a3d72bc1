"""LoRA and DoRA: the slots of a model, their parameters, and the values these begin with.

With DoRA (Liu et al. 2024) a slot has a magnitude m for each row of W as well, and computes
y = g ⊙ (x·Wᵀ + s·(x·Aᵀ)·Bᵀ) with the gain g = m / ‖W + s·B·A‖, by rows. The norm counts as a constant when it is
differentiated (section 4.3): `edgetune.model.gains`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import VerificationError

LORA_B = ".lora_B.weight"
MAGNITUDE, GAIN = ".lora_magnitude_vector", ".lora_gain"
"""What follows a slot's name in those of its B, its magnitudes and its gain."""
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


@dataclass(frozen=True)
class Slot:
    """One projection that carries LoRA parameters A (rank, in_features) and B (out_features, rank)."""

    name: str
    """Module path in the checkpoint, such as `model.layers.0.self_attn.qkv_proj`."""
    in_features: int
    out_features: int

    @property
    def layer(self) -> int:
        """The decoder layer that it belongs to; 0 for a module outside of them."""
        found = _LAYER.match(self.name)
        return int(found[1]) if found else 0

    @property
    def module(self) -> str:
        """The last part of its name, such as `qkv_proj`: what targets and patterns say."""
        return self.name.rpartition(".")[2]

    @property
    def a(self) -> str:
        """Name of the A parameter in the checkpoint and in the whole step's graphs; layered ones take slices of it."""
        return f"{self.name}.lora_A.weight"

    @property
    def b(self) -> str:
        """Name of the B parameter in the checkpoint and in the whole step's graphs; layered ones take slices of it."""
        return f"{self.name}{LORA_B}"

    @property
    def magnitude(self) -> str:
        """Name of DoRA's magnitudes (out_features,), as PEFT saves them."""
        return f"{self.name}{MAGNITUDE}"

    @property
    def gain(self) -> str:
        """Name of DoRA's gain (out_features,), by which graphs are differentiated in the place of the magnitudes."""
        return f"{self.name}{GAIN}"


@dataclass(frozen=True)
class Lora:
    """The trainable parameters, as `prepare` fixed them: graphs have their rank, and training cannot change it."""

    rank: int
    alpha: float
    target_modules: list[str]
    slots: list[Slot]
    rank_stabilised: bool = False
    """Whether alpha is divided by the root of the rank (rsLoRA, Kalajdzievski 2023), not by the rank."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of projections, such as `down_proj`, that have another one, in all layers."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Their alphas, in the same way."""
    dora: bool = False
    """Whether slots have magnitudes; not written where it is the default."""

    def __post_init__(self) -> None:
        for module, rank in {"": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise ValueError(f"rank{module and f' of {module}'} is {rank}; expected at least 1")

    def rank_of(self, module: str) -> int:
        """The rank of the slots of a projection, by the last part of its name."""
        return self.rank_pattern.get(module, self.rank)

    def scaling_of(self, module: str) -> float:
        """What B·A of a projection's slots is multiplied with: alpha / rank (Hu et al. 2021), or alpha / √rank."""
        rank = self.rank_of(module)
        return self.alpha_pattern.get(module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def in_words(self) -> str:
        """Ranks and alphas, such as `rank 8 (down_proj 32), alpha 16, rsLoRA`."""
        patterns = (self.rank_pattern, self.alpha_pattern)
        ranks, alphas = ("".join(f" ({module} {value:g})" for module, value in each.items()) for each in patterns)
        kind = f"{', rsLoRA' if self.rank_stabilised else ''}{', DoRA' if self.dora else ''}"
        return f"rank {self.rank}{ranks}, alpha {self.alpha:g}{alphas}{kind}"

    def computes_as(self, other: Lora) -> bool:
        """Whether the same parameters mean the same: the slots, and what each is scaled with, up to rounding."""
        return self.shapes() == other.shapes() and all(
            math.isclose(self.scaling_of(slot.module), other.scaling_of(slot.module), rel_tol=1e-6)
            for slot in self.slots
        )

    @property
    def highest_rank(self) -> int:
        """The features of the widest slot: no slot of a bundle has a higher rank."""
        return max((max(slot.in_features, slot.out_features) for slot in self.slots), default=self.rank)

    def layers(self) -> list[int]:
        """The decoder layers with slots, in order."""
        return sorted({slot.layer for slot in self.slots})

    def of_layers(self, layers: Container[int]) -> Lora:
        """The slots of these decoder layers."""
        return replace(self, slots=[slot for slot in self.slots if slot.layer in layers])

    def from_layer(self, first: int) -> Lora:
        """The slots of this decoder layer and those above it."""
        return self.of_layers([layer for layer in self.layers() if layer >= first])

    @property
    def parameters(self) -> int:
        """How many numbers are trainable, in all slots."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, A before B before the magnitudes, slot by slot."""
        shapes: dict[str, tuple[int, ...]] = {}
        for slot in self.slots:
            rank = self.rank_of(slot.module)
            shapes[slot.a] = (rank, slot.in_features)
            shapes[slot.b] = (slot.out_features, rank)
            if self.dora:
                shapes[slot.magnitude] = (slot.out_features,)
        return shapes

    def differentiated(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of what graphs are differentiated by: the parameters, with gains in magnitudes' places."""
        gains = {slot.magnitude: slot.gain for slot in self.slots}
        return {gains.get(name, name): shape for name, shape in self.shapes().items()}


def initial_parameters(
    lora: Lora, seed: int, norms: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
) -> dict[str, NDArray[np.float32]]:
    """Parameters that change nothing yet, as PEFT starts: A ~ U(−1/√in, 1/√in), B zero, magnitudes the row norms.

    Args:
        lora: The slots; A matrices are drawn in their order.
        seed: Seed of `numpy.random.default_rng`.
        norms: The row norms of the frozen weights (`RowNorms`), where slots have magnitudes.

    Returns:
        A (rank, in_features), B (out_features, rank) and magnitudes (out_features,) of every slot, under the names of
        `Lora.shapes`.

    Raises:
        VerificationError: There are no slots.
    """
    require_slots(lora)
    generator = np.random.default_rng(seed)
    shapes = lora.shapes()
    # One large array goes back to the system as soon as nobody holds it; many small ones would stay in the heap.
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    pieces = np.split(np.zeros(ends[-1], np.float32), ends[:-1])
    parameters = {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
    for slot in lora.slots:
        bound = slot.in_features**-0.5
        parameters[slot.a][...] = generator.uniform(-bound, bound, shapes[slot.a])
        if lora.dora:
            parameters[slot.magnitude][...] = norms[slot.name]
    return parameters


def layers_text(layers: Sequence[int]) -> str:
    """Layers in words: `layers 16-31`, `layers 0-3 and 16-31`, or `layer 16`."""
    # What follows each other is as far from its place in the list.
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda each: each[1] - each[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {' and '.join(words)}"


def require_slots(lora: Lora) -> None:
    """Rows can be looked at without any, which is why a bundle opens without them."""
    if not lora.slots:
        raise VerificationError("the bundle's manifest lists no LoRA slots, so there is nothing to train; make it anew")


Parameters = Mapping[str, NDArray[np.float32]]
"""LoRA parameters by name, as `Lora.shapes` lists them."""
RowNorms = Mapping[str, NDArray[np.float32]]
"""‖w_i‖ (out_features,) of the rows of each slot's frozen weight, by the slot's name."""
