"""Which provider executes which node of a graph: what an accelerator took, and what fell back to the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_NAMED = 5
"""Nodes that a message names; it counts the others."""


@dataclass(frozen=True)
class Node:
    """One node of a graph, as the runtime has optimised it."""

    operator: str
    name: str
    reason: str = ""
    """Why the accelerator does not take it, in the provider's words; empty where it does, or does not say."""


@dataclass(frozen=True)
class Partition:
    """Nodes that a provider executes as one."""

    provider: str
    nodes: list[Node]


@dataclass(frozen=True)
class Placement:
    """Where a compiled graph runs."""

    graph: str
    """Its role in the bundle."""
    batch: int
    length: int
    provider: str
    """Of the accelerator."""
    device: str
    """What the provider compiled for, in words; an emulation says so."""
    partitions: list[Partition]
    """As the runtime divided the graph after it had optimised it."""
    cached: bool
    """Whether a compiled context was there already; then the partitions are those of its compilation."""

    @property
    def accelerated(self) -> int:
        """Nodes that the accelerator executes."""
        return sum(len(part.nodes) for part in self.partitions if part.provider == self.provider)

    @property
    def accelerator_partitions(self) -> int:
        """Pieces in which the accelerator has them; between two of them tensors go to the CPU and back."""
        return sum(part.provider == self.provider for part in self.partitions)

    @property
    def fallen_back(self) -> list[Node]:
        """The nodes that the accelerator does not execute."""
        return [node for part in self.partitions if part.provider != self.provider for node in part.nodes]

    @property
    def place(self) -> str:
        """Where it runs, in few words: the same for every shape that is divided alike."""
        place, left = f"{self.provider} ({self.device})", len(self.fallen_back)
        if left:
            return f"{place}, {left} node{'' if left == 1 else 's'} on the CPU"
        return f"{place}, all nodes" if self.partitions else place

    def __str__(self) -> str:
        """In one line."""
        total = self.accelerated + len(self.fallen_back)
        pieces = self.accelerator_partitions
        origin = "compiled context from the cache" if self.cached else "compiled now"
        text = (
            f"{self.graph} {self.batch}x{self.length}: {self.accelerated} of {total} nodes on {self.provider} "
            f"({self.device}) in {pieces} partition{'' if pieces == 1 else 's'}, {origin}"
        )
        return f"{text}; on the CPU: {named(self.fallen_back)}" if self.fallen_back else text


def named(nodes: Sequence[Node]) -> str:
    """The operators and how often each occurs, the first nodes' names, and the reasons."""
    counts = ", ".join(f"{name} {count}" for name, count in _operators(nodes).items())
    names = ", ".join(node.name for node in nodes[:_NAMED])
    reasons = "; ".join(sorted({node.reason for node in nodes if node.reason}))
    return f"{counts} ({names}{', …' if len(nodes) > _NAMED else ''}){': ' if reasons else ''}{reasons}"


def placement_record(placement: Placement) -> dict[str, Any]:
    """What `--json` says: figures, the operators of each partition, and the nodes that fell back."""
    return {
        "graph": placement.graph,
        "batch": placement.batch,
        "length": placement.length,
        "provider": placement.provider,
        "device": placement.device,
        "accelerated_nodes": placement.accelerated,
        "accelerator_partitions": placement.accelerator_partitions,
        "partitions": [
            {"provider": part.provider, "nodes": len(part.nodes), "operators": _operators(part.nodes)}
            for part in placement.partitions
        ],
        "fallen_back": [asdict(node) for node in placement.fallen_back],
        "cached": placement.cached,
    }


def _operators(nodes: Sequence[Node]) -> dict[str, int]:
    """How often each operator occurs, by name."""
    return dict(sorted(Counter(node.operator for node in nodes).items()))
