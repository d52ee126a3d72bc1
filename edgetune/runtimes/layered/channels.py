"""The order in which a backend holds channels.

A byte of an int4 block holds an even and an odd weight. What is unpacked fastest is all even ones of a block, then all
odd ones. Instead of putting them right, everything that meets them can have the same order: hidden states, the values
of attention, the inner channels of the feed-forward network, and with them norms, adapters and the rows of the weights
that give them. Sums over channels do not care. Queries and keys, which are rotated, and tokens stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.frozen import BLOCK_SIZE, Block
from edgetune.manifest import Architecture, BundleManifest

_HALF = BLOCK_SIZE // 2
_OWN_ROWS = ("q_proj", "k_proj", "lm_head")
"""Weights whose rows are no channels that have another order."""


@dataclass(frozen=True)
class Channels:
    """The order of the channels, in all axes that have one."""

    evens_first: bool
    """In each block of 32; otherwise channels are where the checkpoint has them."""

    def put(self, values: NDArray[Any], axis: int) -> NDArray[Any]:
        """Values whose channels are where the checkpoint has them, in this order."""
        return _regrouped(values, axis, _HALF, 2) if self.evens_first else values

    def restore(self, values: NDArray[Any], axis: int) -> NDArray[Any]:
        """The opposite."""
        return _regrouped(values, axis, 2, _HALF) if self.evens_first else values

    def block(self, name: str, block: Block) -> Block:
        """A frozen weight whose rows are in this order; its columns are what unpacking makes of them."""
        if not self.evens_first or name.startswith(_OWN_ROWS):
            return block
        scales = None if block.scales is None else self.put(block.scales, 0)
        return Block(self.put(block.values, 0), scales)

    def put_adapter(self, name: str, values: NDArray[Any], architecture: Architecture) -> NDArray[Any]:
        """A LoRA parameter with its channels in this order."""
        return self._adapter(name, values, architecture, _HALF)

    def restore_adapter(self, name: str, values: NDArray[Any], architecture: Architecture) -> NDArray[Any]:
        """The opposite."""
        return self._adapter(name, values, architecture, 2)

    def _adapter(self, name: str, values: NDArray[Any], architecture: Architecture, inner: int) -> NDArray[Any]:
        outer = BLOCK_SIZE // inner
        if not self.evens_first:
            return values
        if ".lora_A." in name:
            return _regrouped(values, 1, inner, outer)
        a = architecture
        own = (a.num_attention_heads + a.num_key_value_heads) * a.head_dim if ".qkv_proj." in name else 0
        return np.concatenate([values[:own], _regrouped(values[own:], 0, inner, outer)])


def fits(manifest: BundleManifest) -> bool:
    """Whether a model's int4 blocks can be left as they come out: every head and every axis has whole ones."""
    a = manifest.architecture
    sizes = (a.hidden_size, a.intermediate_size, a.head_dim)
    return manifest.base.weights == "int4" and not any(size % BLOCK_SIZE for size in sizes)


def _regrouped(values: NDArray[Any], axis: int, inner: int, outer: int) -> NDArray[Any]:
    """An axis, in blocks of inner · outer, with these two turned round; contiguous."""
    axis %= values.ndim
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    split = values.reshape(*before, -1, inner, outer, *after)
    return np.ascontiguousarray(split.swapaxes(axis + 1, axis + 2)).reshape(values.shape)
