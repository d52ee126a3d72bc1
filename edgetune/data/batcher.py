"""From the rows of an optimizer step, or of a whole file, to the batches that go through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgetune.data.batches import Batch, lay_out
from edgetune.data.buckets import Bucket, check_buckets, pack_into
from edgetune.data.encode import Example
from edgetune.data.packing import Capacity, Pass, attention_share, pack, pad, round_up
from edgetune.data.prefixes import Prefix, common_prefixes
from edgetune.formats.manifest import BundleManifest

MEASURED_ROWS = 4
"""Where rows are only measured, a pass takes no more memory than so many of the longest."""


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a batch, without its arrays."""

    sequences: int
    length: int
    """Positions of each sequence."""
    trained_tokens: int
    """Number of labels in all sequences that are not −100."""
    tokens: int
    """Tokens of all rows."""
    shared_tokens: int
    """Those of them that are not computed, because another row of the sequence has them."""

    @property
    def positions(self) -> int:
        """Positions of all sequences together."""
        return self.sequences * self.length

    @property
    def scores(self) -> int:
        """Attention scores of one head."""
        return self.positions * self.length


class Batcher:
    """Packs rows into batches.

    Args:
        manifest: The bundle's.
        longest: Tokens of the longest row that will come, which decide how much room there is.
        pass_rows: Every batch has room for this many of the longest row, padded.
        packing: Put several rows into one sequence; otherwise each has its own.
        share_prefixes: Where rows are packed, let those that begin alike follow one copy of what they have in common.
        buckets: The only shapes that batches may have; any shape may come without them.
        processes: That share a step: there is a batch for each of them, of about as many tokens, as far as rows go.

    Raises:
        UsageError: A row fits into no bucket.
    """

    def __init__(
        self,
        manifest: BundleManifest,
        longest: int,
        pass_rows: int,
        *,
        packing: bool,
        share_prefixes: bool = True,
        buckets: Sequence[Bucket] | None = None,
        processes: int = 1,
    ) -> None:
        self._processes = processes
        self._architecture = manifest.architecture
        self._buckets = buckets
        self._rope = manifest.architecture.rope
        self._sliding_window = manifest.architecture.sliding_window
        self._pad_token_id = manifest.tokenizer.pad_token_id
        self._attention = attention_share(manifest.architecture)
        self._packing = packing
        self._share_prefixes = packing and share_prefixes
        if buckets is not None:
            check_buckets(buckets, longest)
        limit = max(longest, manifest.max_length)
        self.capacity = Capacity(pass_rows, round_up(longest, limit), round_up(limit, limit))
        """No batch has more positions or more attention scores than `pass_rows` sequences of `longest` positions."""

    def step(self, drawn: Sequence[Sequence[Example]]) -> list[Batch]:
        """The batches of one optimizer step; every row occurs once.

        The gradient of a step is the mean over its trained tokens, so it does not matter which rows share a batch. The
        exception is longrope with a long row, which gives its whole batch the long factors, as in transformers: then
        only rows that were drawn together share a batch.

        Args:
            drawn: The step's rows, in the groups in which they were drawn.
        """
        return [self._lay_out(pool, item) for pool in self._pools(drawn) for item in self._passes(pool)]

    def shapes(self, drawn: Sequence[Sequence[Example]]) -> list[BatchShape]:
        """The shapes of the batches that `step` would return, without making them."""
        return [_shape(pool, item) for pool in self._pools(drawn) for item in self._passes(pool)]

    def shapes_of_strangers(self, drawn: Sequence[Sequence[Example]]) -> list[BatchShape]:
        """The same, if no two of the rows began alike."""
        return [_shape(pool, item) for pool in self._pools(drawn) for item in self._passes(pool, [None] * len(pool))]

    def measure(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """Batches of rows whose order does not matter, the longest first; every row occurs once.

        With longrope, each row has the factors that it has on its own.
        """
        for pool in self._measured(examples):
            for item in self._passes(pool):
                yield self._lay_out(pool, item)

    def measure_shapes(self, examples: Sequence[Example]) -> list[BatchShape]:
        """The shapes of the batches that `measure` would yield, without making them."""
        return [_shape(pool, item) for pool in self._measured(examples) for item in self._passes(pool)]

    def _pools(self, drawn: Sequence[Sequence[Example]]) -> list[list[Example]]:
        """Rows that may be laid out together."""
        rows = [example for group in drawn for example in group]
        if any(map(self._is_long, rows)):
            return [list(group) for group in drawn]
        return [rows] if self._processes == 1 else _divided(rows, self._processes)

    def _measured(self, examples: Sequence[Example]) -> list[list[Example]]:
        pools = ([row for row in examples if self._is_long(row) is long] for long in (True, False))
        return [pool for pool in pools if pool]

    def _passes(self, pool: Sequence[Example], prefixes: Sequence[Prefix | None] | None = None) -> list[Pass]:
        lengths = [len(example.input_ids) for example in pool]
        if max(lengths) > self.capacity.longest:
            raise ValueError(f"a row has {max(lengths)} tokens, but there is room for {self.capacity.longest}")
        if prefixes is None:
            prefixes = common_prefixes(pool) if self._share_prefixes else [None] * len(pool)
        if self._buckets is not None:
            return pack_into(lengths, prefixes, self._buckets, self._architecture, packing=self._packing)
        if not self._packing:
            return pad(lengths, self.capacity)
        return pack(lengths, prefixes, self.capacity, self._attention)

    def _lay_out(self, pool: Sequence[Example], item: Pass) -> Batch:
        return lay_out(
            pool,
            item.packs,
            item.length,
            self._rope,
            self._pad_token_id,
            longest=max(len(example.input_ids) for example in pool),
            sliding_window=self._sliding_window,
        )

    def _is_long(self, example: Example) -> bool:
        """Whether this row alone would have longrope's long factors."""
        rope = self._rope
        return rope.long_factor is not None and len(example.input_ids) > rope.original_max_position_embeddings


def _divided(rows: Sequence[Example], count: int) -> list[list[Example]]:
    """Rows in so many groups of about as many tokens, or in as many as there are rows.

    The longest come first, each to the group that has the fewest tokens by then.
    """
    groups: list[list[Example]] = [[] for _ in range(min(count, len(rows)))]
    tokens = [0] * len(groups)
    for row in sorted(rows, key=lambda row: len(row.input_ids), reverse=True):
        least = tokens.index(min(tokens))
        groups[least].append(row)
        tokens[least] += len(row.input_ids)
    return groups


def _shape(pool: Sequence[Example], item: Pass) -> BatchShape:
    placed = [(packed, pool[packed.row]) for pack in item.packs for packed in pack]
    return BatchShape(
        len(item.packs),
        item.length,
        trained_tokens=sum(example.trained_tokens for _, example in placed),
        tokens=sum(len(example.input_ids) for _, example in placed),
        shared_tokens=sum(packed.shared for packed, _ in placed),
    )
