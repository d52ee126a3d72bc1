"""Updates of another tool in the slots of a bundle, so that each slot adds what the updates added.

A slot adds s·B·A with the bundle's rank and scaling s, an update t·D·C with its own.

- B becomes D·(t/s). Where the two scalings are a power of two apart that is exact, and so is every bit of s·B·A in
  float32. Elsewhere B is the nearest float32, within half a unit of its last place (6e-8 of a value).
- Where the bundle's rank is higher, B has columns of zeros; A's rows there are drawn as for a new adapter, so that
  they can learn.
- Of q, k and v apart (or gate and up), B takes the rows of each in the fused projection. Where their A differ, they
  stand one below the other, and B is block by block: the slot needs the sum of their ranks. Where all A are the same
  they share it, and the slot needs no more than the rank of one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError
from edgetune.formats.peft_config import PROJECTIONS, prepare_line
from edgetune.importing.updates import Update, Updates
from edgetune.model.architecture import Architecture, slots_of
from edgetune.model.lora import Lora, RowNorms, Slot, initial_parameters, layers_text

_APART = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that Phi-3 fuses, and what other models and tools call the rows of each, from the top."""
_FUSED = {part: fused for fused, parts in _APART.items() for part in parts}
_KINDS = {True: "DoRA, with magnitudes", False: "plain LoRA, without magnitudes"}
_SHOWN = 5
_DIGITS = 12
"""Of an alpha in a command line: more than float32 tells apart."""


@dataclass(frozen=True)
class Filling:
    """The updates of one slot."""

    name: str
    """The slot's, whether the bundle has it or not."""
    updates: list[Update]
    """From the top."""

    @property
    def module(self) -> str:
        """The last part of the slot's name."""
        return self.name.rpartition(".")[2]

    @property
    def parts(self) -> list[str]:
        """What each update is of: the projection itself, or one that is fused into it."""
        return [update.module.rpartition(".")[2] for update in self.updates]

    @cached_property
    def shares_a(self) -> bool:
        """Whether all updates have one and the same A."""
        first, *others = self.updates
        shape = (first.rank, first.in_features)
        return all(
            (other.rank, other.in_features) == shape and np.array_equal(first.a(), other.a()) for other in others
        )

    @property
    def rank(self) -> int:
        """The rank that the slot needs."""
        return self.updates[0].rank if self.shares_a else sum(update.rank for update in self.updates)


@dataclass(frozen=True)
class Reshaped:
    """An adapter in the slots of a bundle."""

    parameters: dict[str, NDArray[np.float32]]
    """All that `Lora.shapes` lists."""
    filled: list[str]
    """Names of the slots that have updates."""
    rounded: dict[str, float]
    """Names of those whose B is rounded, and the scaling that the update had."""
    untouched: list[str]
    """What stays as the base is, in words, such as `gate_up_proj` or `k_proj of qkv_proj`."""


def reshape(updates: Updates, lora: Lora, architecture: Architecture, norms: RowNorms, title: str) -> Reshaped:
    """Put updates into slots.

    Args:
        updates: What the adapter adds, and to what.
        lora: The bundle's slots.
        architecture: The bundle's model, whose sizes say which rows of a fused projection are whose.
        norms: The bundle's row norms, where it has DoRA.
        title: What messages begin with: which adapter does not fit what.

    Raises:
        IncompatibleError: The slots cannot hold it: names what is in the way, and the `edgetune prepare` line that
            makes a bundle which can, if there is one.
        VerificationError: It holds numbers that are not finite.
    """
    fillings = _fillings(updates)
    foreign = list(_of_another_model(fillings, lora, architecture))
    if foreign:
        raise IncompatibleError("\n".join([title, *_some(foreign)]))
    problems = [*_without_slot(fillings, lora), *_too_large(fillings, lora)]
    if updates.dora != lora.dora:
        problems.append(f"it is {_KINDS[updates.dora]}, and the bundle's slots are {_KINDS[lora.dora]}")
    if problems:
        raise IncompatibleError("\n".join([title, *problems, _advice(updates, fillings, lora)]))
    return _filled(fillings, lora, architecture, norms)


def _fillings(updates: Updates) -> list[Filling]:
    """The updates by slot, those of a fused projection in the order of its rows."""
    by_slot: dict[str, list[Update]] = {}
    for update in updates.of:
        parent, _, last = update.module.rpartition(".")
        by_slot.setdefault(f"{parent}.{_FUSED.get(last, last)}", []).append(update)
    order = {part: place for parts in _APART.values() for place, part in enumerate(parts)}
    return [
        Filling(name, sorted(of, key=lambda update: order.get(update.module.rpartition(".")[2], -1)))
        for name, of in by_slot.items()
    ]


def _places(slot: Slot, architecture: Architecture) -> dict[str, range]:
    """The rows of a slot's B that a projection takes, by its name: all of them, or some of a fused one."""
    a = architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    sizes = {"qkv_proj": (queries, keys, keys), "gate_up_proj": (a.intermediate_size,) * 2}.get(slot.module, ())
    ends = np.cumsum(sizes, dtype=int).tolist()
    apart = {
        part: range(end - size, end)
        for part, size, end in zip(_APART.get(slot.module, ()), sizes, ends, strict=True)
    }
    return {slot.module: range(slot.out_features), **apart}


def _of_another_model(fillings: list[Filling], lora: Lora, architecture: Architecture) -> Iterable[str]:
    """Each update of a projection that the bundle's model does not have, or not of this size, or not so."""
    known = {slot.name: slot for slot in [*slots_of(architecture, PROJECTIONS), *lora.slots]}
    for filling in fillings:
        slot = known.get(filling.name)
        if slot is None:
            layers = architecture.num_hidden_layers
            yield f"{filling.updates[0].module} is no projection of the bundle's model, which has {layers} layers"
            continue
        if filling.module in filling.parts and len(filling.parts) > 1:
            yield f"{filling.name} is there as a whole and in parts, {', '.join(filling.parts)}; save one of both"
            continue
        for update, part in zip(filling.updates, filling.parts, strict=True):
            sizes, expected = (update.in_features, update.out_features), len(_places(slot, architecture)[part])
            if sizes != (slot.in_features, expected):
                yield (
                    f"{update.module} takes {sizes[0]} and gives {sizes[1]} features, the bundle's "
                    f"{slot.in_features} and {expected}: it was trained on another model"
                )


def _without_slot(fillings: list[Filling], lora: Lora) -> Iterable[str]:
    slots = {slot.name for slot in lora.slots}
    missing = Counter(filling.module for filling in fillings if filling.name not in slots)
    if missing:
        told = ", ".join(f"{module} in {count} layers" for module, count in missing.items())
        yield f"the bundle has no slots for {told}; its slots are on {', '.join(lora.target_modules)}"


def _too_large(fillings: list[Filling], lora: Lora) -> Iterable[str]:
    """What needs a higher rank than the bundle has, once for each projection."""
    too_large: dict[str, list[Filling]] = {}
    for filling in fillings:
        if filling.rank > lora.rank_of(filling.module):
            too_large.setdefault(filling.module, []).append(filling)
    for module, those in too_large.items():
        worst = max(those, key=lambda filling: filling.rank)
        why = ""
        if len(worst.updates) > 1:
            ranks = [f"{part} {update.rank}" for part, update in zip(worst.parts, worst.updates, strict=True)]
            why = f", the sum of {', '.join(ranks)}, because each has an A of its own"
        yield f"{module} needs rank {worst.rank} in {len(those)} layers{why}; the bundle has {lora.rank_of(module)}"


def _advice(updates: Updates, fillings: list[Filling], lora: Lora) -> str:
    """How to get a bundle whose slots hold the updates, to the bit, or why there can be none."""
    ranks = {module: lora.rank_of(module) for module in lora.target_modules}
    alphas = {module: lora.alpha_pattern.get(module, lora.alpha) for module in lora.target_modules}
    for module in PROJECTIONS:
        if of := [filling for filling in fillings if filling.module == module]:
            ranks[module] = max(filling.rank for filling in of)
            divisor = math.sqrt(ranks[module]) if updates.rank_stabilised else ranks[module]
            alphas[module] = float(f"{of[0].updates[0].scaling * divisor:.{_DIGITS}g}")
    if (highest := max(ranks.values())) > lora.highest_rank:
        return f"no `edgetune prepare` line takes rank {highest}: {lora.highest_rank} is the most; train a lower one"
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    asked = Lora(
        rank,
        alpha,
        sorted(ranks),
        [],
        updates.rank_stabilised,
        {module: each for module, each in ranks.items() if each != rank},
        {module: each for module, each in alphas.items() if each != alpha},
        updates.dora,
    )
    return f"a bundle that takes it: {prepare_line(asked)}"


def _filled(fillings: list[Filling], lora: Lora, architecture: Architecture, norms: RowNorms) -> Reshaped:
    parameters = initial_parameters(lora, 0, norms)
    slots = {slot.name: slot for slot in lora.slots}
    rounded = {}
    for filling in fillings:
        slot, column = slots[filling.name], 0
        places, ours = _places(slot, architecture), lora.scaling_of(slot.module)
        for update, part in zip(filling.updates, filling.parts, strict=True):
            rows, columns = places[part], slice(column, column + update.rank)
            scaled, is_exact = rescaled(update.b(), update.scaling, ours)
            if not np.isfinite(scaled).all():
                raise IncompatibleError(
                    f"{update.module}: B times {update.scaling:g} / {ours:g}, its scaling by the bundle's, leaves what "
                    "float32 holds; train it again with a smaller alpha"
                )
            parameters[slot.a][columns] = update.a()
            parameters[slot.b][rows.start : rows.stop, columns] = scaled
            if lora.dora:
                parameters[slot.magnitude][rows.start : rows.stop] = update.magnitudes()
            if not is_exact:
                rounded[slot.name] = update.scaling
            column += 0 if filling.shares_a else update.rank
    given = {filling.name for filling in fillings}
    filled = [slot.name for slot in lora.slots if slot.name in given]
    rounded = {name: rounded[name] for name in filled if name in rounded}
    return Reshaped(parameters, filled, rounded, list(_untouched(fillings, lora)))


def rescaled(b: NDArray[np.float32], scaling: float, ours: float) -> tuple[NDArray[np.float32], bool]:
    """B·(scaling / ours) in float32, and whether it is exact.

    Args:
        b: Any matrix.
        scaling: What B·A is multiplied with where it comes from.
        ours: What it is multiplied with where it goes.
    """
    with np.errstate(over="ignore", under="ignore"):
        (theirs, exponent), (mine, own_exponent) = (np.frexp(np.float32(factor)) for factor in (scaling, ours))
        if theirs == mine:
            # A power of two apart, as float32 has them: nothing is lost but in numbers below 1e-38.
            shift = int(exponent) - int(own_exponent)
            scaled = np.ldexp(b, shift)
            return scaled, bool(np.array_equal(np.ldexp(scaled, -shift), b))
        product = b.astype(np.float64) * (scaling / ours)
        scaled = product.astype(np.float32)
    return scaled, bool(np.array_equal(scaled, product))


def _untouched(fillings: list[Filling], lora: Lora) -> Iterable[str]:
    """What of the bundle's slots stays as the base is."""
    parts = {filling.name: filling.parts for filling in fillings}
    for module in lora.target_modules:
        slots = [slot for slot in lora.slots if slot.module == module]
        absent = [slot.layer for slot in slots if slot.name not in parts]
        if len(absent) == len(slots):
            yield module
            continue
        if absent:
            yield f"{module} of {layers_text(absent)}"
        for part in _APART.get(module, ()):
            given = {slot.layer: parts[slot.name] for slot in slots if slot.name in parts}
            lacking = [layer for layer, names in given.items() if not {part, module} & set(names)]
            if lacking:
                yield f"{part} of {module}" + (f" in {layers_text(lacking)}" if len(lacking) < len(given) else "")


def _some(lines: list[str]) -> list[str]:
    return lines[:_SHOWN] + ([f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
