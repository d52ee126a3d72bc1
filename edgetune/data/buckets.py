"""Buckets: for accelerators that compile a graph per shape, batches are padded to one of few shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.data.packing import MULTIPLE, Capacity, Pass, attention_share, best_fit, longest_first, pass_work
from edgetune.data.prefixes import PackedRow, Prefix
from edgetune.errors import UsageError
from edgetune.model.architecture import Architecture

_LARGEST = 1 << 20
_BUCKET = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape that batches may have."""

    length: int
    """Positions of a sequence, T."""
    batch: int
    """Sequences, B."""

    def __str__(self) -> str:
        """As `--buckets` takes it."""
        return f"{self.batch}x{self.length}"


def parse_buckets(text: str) -> list[Bucket]:
    """Read what `--buckets` was given: `BxT` for B sequences of T positions, several with commas.

    Raises:
        UsageError: The text is no such list, or a shape has more than 2^20 positions.
    """
    found = [_BUCKET.fullmatch(part.strip()) for part in text.split(",")]
    buckets = [Bucket(int(match[2]), int(match[1])) for match in found if match]
    if len(buckets) < len(found) or any(bucket.batch * bucket.length > _LARGEST for bucket in buckets):
        raise UsageError(f"--buckets is {text!r:.80}; expected shapes such as 4x128,1x512 (sequences x positions)")
    return sorted(set(buckets))


def default_buckets(capacity: Capacity) -> list[Bucket]:
    """At most four shapes: sequences as long as the longest row or half as long, one or as many as there is room for.

    Args:
        capacity: The largest pass.
    """
    half = -(-capacity.longest // (2 * MULTIPLE)) * MULTIPLE
    lengths = {capacity.longest, half}
    return sorted({Bucket(length, batch) for length in lengths for batch in (1, capacity.sequences(length))})


def check_buckets(buckets: Sequence[Bucket], longest: int) -> None:
    """Refuse buckets into which the longest row does not fit.

    Raises:
        UsageError: It has more tokens than every bucket has positions.
    """
    most = max(bucket.length for bucket in buckets)
    if longest > most:
        raise UsageError(
            f"the longest row has {longest:,} tokens, the longest of the buckets {', '.join(map(str, buckets))} has "
            f"{most:,} positions; give a longer one in --buckets, or prepare with a smaller --max-length and --truncate"
        )


def pack_into(
    lengths: Sequence[int],
    prefixes: Sequence[Prefix | None],
    buckets: Sequence[Bucket],
    architecture: Architecture,
    *,
    packing: bool,
) -> list[Pass]:
    """Spread rows over passes with the shapes of buckets, with the least work.

    Args:
        lengths: Tokens of each row, at least one row, none longer than the longest bucket.
        prefixes: Of each row, what it has in common with others; used in packing alone.
        buckets: The shapes.
        architecture: Sizes of the model, which decide what attention costs.
        packing: Put several rows into one sequence; otherwise each has its own.

    Returns:
        Passes with as many sequences as their bucket; the last ones may have no row.
    """
    attention = attention_share(architecture)
    candidates = []
    for length in sorted({bucket.length for bucket in buckets if bucket.length >= max(lengths)}):
        packs = best_fit(lengths, prefixes, length) if packing else [[PackedRow(row)] for row in longest_first(lengths)]
        batches = sorted(bucket.batch for bucket in buckets if bucket.length == length)
        candidates.append([Pass(length, part) for part in _filled(packs, batches)])
    return min(candidates, key=lambda passes: pass_work(passes, attention))


def _filled(packs: list[list[PackedRow]], batches: Sequence[int]) -> list[list[list[PackedRow]]]:
    """Sequences in groups of the given sizes: full ones of the largest size, then the smallest that takes the rest.

    One padded group is better than several small ones: every pass reads all weights.
    """
    groups = []
    left = packs
    while left:
        size = next((batch for batch in batches if batch >= len(left)), batches[-1])
        groups.append(left[:size] + [[] for _ in range(size - len(left))])
        left = left[size:]
    return groups
