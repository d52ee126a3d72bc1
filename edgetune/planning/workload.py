"""What a run puts through the model: which rows, in which batches, how often."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batcher import Batcher, BatchShape
from edgetune.data.batches import Batch, epoch_batches
from edgetune.data.buckets import Bucket
from edgetune.data.encode import Example
from edgetune.data.packing import Capacity
from edgetune.data.stored_examples import held_bytes, longest, token_counts
from edgetune.formats.manifest import BundleManifest
from edgetune.planning.memory import Work
from edgetune.planning.run import RunRequest
from edgetune.planning.schedule import schedule_steps

_LOOKED_AT = 256
"""Steps whose batches are looked at before the run: the others are alike."""


class Workload:
    """Rows, schedule and batches of a run.

    Args:
        manifest: The bundle's.
        rows: What is trained on, at least one row.
        valid: What is measured on; may be empty.
        request: What the run asks for.
        buckets: The only shapes of batches, where graphs are compiled for each.
        pass_rows: As many of the longest rows, padded, a pass through the model has room for; the batch size without
            it. A step has the same rows in more passes. Buckets have their own capacity.

    Raises:
        UsageError: Warm-up takes the whole run, or a row, of training or validation, fits into no bucket.
    """

    def __init__(
        self,
        manifest: BundleManifest,
        rows: Sequence[Example],
        valid: Sequence[Example],
        request: RunRequest,
        buckets: Sequence[Bucket] | None = None,
        pass_rows: int | None = None,
    ) -> None:
        self._manifest, self._rows, self._valid, self._request = manifest, rows, valid, request
        self.schedule = schedule_steps(len(rows), request)
        self.buckets = buckets
        self._pass_rows = request.batching.batch_size if pass_rows is None else pass_rows
        self._batcher = self._batches_of(rows, buckets)
        self._measurer = self._batches_of(valid, buckets) if valid else None

    def within(self, buckets: Sequence[Bucket]) -> Workload:
        """The same rows in batches of these shapes alone.

        Raises:
            UsageError: A row fits into none of them.
        """
        return Workload(self._manifest, self._rows, self._valid, self._request, buckets, self._pass_rows)

    @property
    def pass_rows(self) -> int | None:
        """For how many of the longest rows, padded, a pass has room; none where buckets say it."""
        return None if self.buckets is not None else self._pass_rows

    def in_passes(self, rows: int) -> Workload:
        """The same rows in passes with room for so many of the longest."""
        return Workload(self._manifest, self._rows, self._valid, self._request, self.buckets, rows)

    def steps(self, done: int = 0) -> Iterator[list[Batch]]:
        """The batches of every step after so many."""
        return map(self._batcher.step, islice(self._drawn(), done, None))

    def validation(self) -> Iterator[Batch]:
        """The batches of the validation rows."""
        return iter(()) if self._measurer is None else self._measurer.measure(self._valid)

    @cached_property
    def step_shapes(self) -> list[list[BatchShape]]:
        """Shapes of the batches of the first steps, of all of them in a short run."""
        return [self._batcher.shapes(drawn) for drawn in islice(self._drawn(), _LOOKED_AT)]

    @cached_property
    def validation_shapes(self) -> list[BatchShape]:
        """Shapes of the batches of one validation."""
        return [] if self._measurer is None else self._measurer.measure_shapes(self._valid)

    def shared_prefixes(self) -> float:
        """Which part of the tokens of the first steps is not computed again, being another row's prefix as well."""
        shapes = [shape for step in self.step_shapes for shape in step]
        return sum(shape.shared_tokens for shape in shapes) / sum(shape.tokens for shape in shapes)

    def different_rows(self) -> int:
        """Number of rows, for training and for validation, rows that are alike counted once."""
        return len(_lengths(self._rows, self._valid))

    def lengths_again(self) -> NDArray[np.int32]:
        """Tokens of each row that goes through the model more than once; of rows that are alike only one counts."""
        again = self.schedule.total_steps > self.schedule.steps_per_epoch or self._request.forward_only
        return _lengths(self._rows, self._valid) if again else _lengths(self._valid)

    def validations(self) -> int:
        """How often the validation rows are measured."""
        return self.schedule.validations() if self._valid else 0

    def work(self) -> Work:
        """The largest pass, and the other shapes that there are."""
        shapes = [*(shape for step in self.step_shapes for shape in step), *self.validation_shapes]
        if self.schedule.total_steps > _LOOKED_AT:
            # A later step may draw the longest rows together, and of those no two that begin alike.
            shapes += self._batcher.shapes_of_strangers(self._longest_drawn())
        sizes = sorted({(shape.positions, shape.scores) for shape in shapes}, reverse=True)
        positions, scores = sizes[0][0], max(scores for _, scores in sizes)
        return Work(positions, scores, tuple(sizes[1:]), held_bytes(self._rows) + held_bytes(self._valid))

    def capacity(self) -> Capacity:
        """The largest pass of training and validation."""
        capacities = [batcher.capacity for batcher in (self._batcher, self._measurer) if batcher is not None]
        return max(capacities, key=lambda capacity: capacity.longest)

    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(longest(self._rows), longest(self._valid))

    def _drawn(self) -> Iterator[list[list[Example]]]:
        """The rows of every step, in groups of the batch size."""
        batching = self._request.batching
        drawn = epoch_batches(self._rows, batching.batch_size, batching.seed, batching.shuffle)
        for step in range(self.schedule.total_steps):
            yield list(islice(drawn, self.schedule.batches(step)))

    def _longest_drawn(self) -> list[list[Example]]:
        """A step's worth of the longest rows, in groups of the batch size."""
        size = self._request.batching.batch_size
        longest_first = np.argsort(-token_counts(self._rows), kind="stable")
        rows = [self._rows[row] for row in longest_first[: size * self._request.batching.gradient_accumulation_steps]]
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _batches_of(self, rows: Sequence[Example], buckets: Sequence[Bucket] | None) -> Batcher:
        batching = self._request.batching
        return Batcher(
            self._manifest,
            longest(rows),
            self._pass_rows,
            packing=batching.packing,
            share_prefixes=batching.share_prefixes,
            buckets=buckets,
            processes=self._request.processes,
        )


def _lengths(*rows: Sequence[Example]) -> NDArray[np.int32]:
    """Tokens of rows that are not alike, told by a short hash: they are only counted."""
    hashes = [
        int.from_bytes(hashlib.blake2b(np.asarray(row.input_ids, "<i4").tobytes(), digest_size=8).digest(), "little")
        for row in chain(*rows)
    ]
    _, first = np.unique(np.array(hashes, np.uint64), return_index=True)
    counts: NDArray[np.int32] = np.concatenate([token_counts(part) for part in rows])[first]
    return counts
