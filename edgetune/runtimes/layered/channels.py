"""The order in which a backend holds channels.

A byte of an int4 weight holds an even and an odd channel. What is unpacked fastest is all even ones of a group, then
all odd ones. Instead of putting them right, everything that meets them can have the same order: hidden states, the
values of each head, the inner channels of a piece of the feed-forward network, and with them norms, adapters and the
rows of the weights that give them. Sums over channels do not care. Queries and keys, which are rotated, and tokens stay
as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.formats.layered_graphs import pieces_of
from edgetune.formats.manifest import BundleManifest
from edgetune.model.blocks import BLOCK_SIZE, Block
from edgetune.model.pieces import Slice


@dataclass(frozen=True)
class Groups:
    """How many channels are a group."""

    hidden: int
    """All hidden channels."""
    head: int
    """The values of a head."""
    inner: int
    """The inner channels of a piece."""
    rotated: int
    """Rows of queries and keys in a packed projection."""


class Channels:
    """The order of the channels in all axes that have one.

    Args:
        groups: In which even channels come first; without them all are where the checkpoint has them.
    """

    def __init__(self, groups: Groups | None = None) -> None:
        self._groups = groups
        if groups is not None:
            self._columns = {
                "qkv_proj": groups.hidden,
                "o_proj": groups.head,
                "gate_up_proj": groups.hidden,
                "down_proj": groups.inner,
                "lm_head": groups.hidden,
            }
            self._rows = {
                "qkv_proj": groups.head,
                "o_proj": groups.hidden,
                "gate_up_proj": groups.inner,
                "down_proj": groups.hidden,
            }

    def put(self, values: NDArray[Any], axis: int) -> NDArray[Any]:
        """Hidden channels of the checkpoint in this order."""
        return values if self._groups is None else evens_first(values, axis, self._groups.hidden)

    def block(self, slice_: Slice, block: Block) -> Block:
        """A slice of a frozen weight with its rows in this order, and the groups in which its columns are to be."""
        if self._groups is None:
            return block
        module = _module(slice_.parameter)
        first = slice_.rows[0] if slice_.rows is not None else 0
        values, scales = block.values, block.scales
        if module in self._rows and not (module == "qkv_proj" and first < self._groups.rotated):
            values = evens_first(values, 0, self._rows[module])
            scales = None if scales is None else evens_first(scales, 0, self._rows[module])
        return replace(block, values=values, scales=scales, group=self._columns[module])

    def put_adapter(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """A LoRA parameter of the checkpoint in this order; magnitudes have that of B's rows."""
        return values if self._groups is None else self._adapter(self._groups, name, values, forth=True)

    def restore_adapter(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """The opposite."""
        return values if self._groups is None else self._adapter(self._groups, name, values, forth=False)

    def _adapter(self, groups: Groups, name: str, values: NDArray[Any], *, forth: bool) -> NDArray[Any]:
        turn = evens_first if forth else in_turn
        module = _module(name)
        if ".lora_A." in name:
            return turn(values, 1, self._columns[module])
        own = groups.rotated if module == "qkv_proj" else 0
        return np.concatenate([values[:own], turn(values[own:], 0, self._rows[module])])


def groups_of(manifest: BundleManifest) -> Groups | None:
    """The groups of a model whose int4 weights can be left as they come out: all groups are of whole blocks."""
    a = manifest.architecture
    rotated = (a.num_attention_heads + a.num_key_value_heads) * a.head_dim
    groups = Groups(a.hidden_size, a.head_dim, a.intermediate_size // pieces_of(manifest).mlp, rotated)
    sizes = (groups.hidden, groups.head, groups.inner)
    return groups if manifest.base.weights == "int4" and not any(size % BLOCK_SIZE for size in sizes) else None


def evens_first(values: NDArray[Any], axis: int, group: int) -> NDArray[Any]:
    """In each group of an axis first the even places, then the odd ones; contiguous."""
    return _regrouped(values, axis, group // 2, 2)


def in_turn(values: NDArray[Any], axis: int, group: int) -> NDArray[Any]:
    """The opposite of `evens_first`."""
    return _regrouped(values, axis, 2, group // 2)


def _regrouped(values: NDArray[Any], axis: int, outer: int, inner: int) -> NDArray[Any]:
    axis %= values.ndim
    split = values.reshape(*values.shape[:axis], -1, outer, inner, *values.shape[axis + 1 :])
    return np.ascontiguousarray(split.swapaxes(axis + 1, axis + 2)).reshape(values.shape)


def _module(parameter: str) -> str:
    """`qkv_proj` of `model.layers.0.self_attn.qkv_proj.lora_A.weight`."""
    return next(name for name in parameter.split(".") if name == "lm_head" or name.endswith("_proj"))
