"""Batches of few shapes: what is compiled for each shape sees no other."""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.data.batcher import Batcher
from edgetune.data.batches import Batch
from edgetune.data.buckets import Bucket, default_buckets, parse_buckets
from edgetune.data.packing import Capacity
from edgetune.data.stored_examples import longest
from edgetune.errors import UsageError
from support.random_rows import rows_of
from support.tiny_phi3 import bundle

LENGTHS = [5, 30, 17, 8, 21, 12, 40, 9, 33, 6]


def batches_of(buckets: str, lengths: list[int], *, packing: bool) -> list[Batch]:
    rows = rows_of(0, lengths)
    manifest = bundle("multi-head", "fp32").manifest
    return Batcher(manifest, longest(rows), 4, packing=packing, buckets=parse_buckets(buckets)).step([rows])


def test_buckets_are_read_in_order() -> None:
    assert parse_buckets("1x512, 4x128,1x512") == [Bucket(128, 4), Bucket(512, 1)]
    assert [str(bucket) for bucket in parse_buckets("4x128")] == ["4x128"]


@pytest.mark.parametrize(
    "text", ["", "4", "0x8", "4x", "x128", "4x128;1x8", "-1x8", "4x128,", "9999999x9999999", "\u0664x8"]
)
def test_what_is_no_bucket_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--buckets is"):
        parse_buckets(text)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("buckets", ["4x40", "1x40,4x40", "2x48,4x64,1x64", "3x40,1x128"])
def test_every_row_is_once_in_a_batch_of_a_given_shape(buckets: str, packing: bool) -> None:
    shapes = {(bucket.batch, bucket.length) for bucket in parse_buckets(buckets)}
    batches = batches_of(buckets, LENGTHS, packing=packing)
    assert {batch.input_ids.shape for batch in batches} <= shapes
    seen = [example.line for batch in batches for example in batch.examples]
    assert sorted(seen) == list(range(len(LENGTHS)))
    for batch in batches:
        for index, example in enumerate(batch.examples):
            np.testing.assert_array_equal(batch.input_ids[batch.rows == index], example.input_ids)
        assert (batch.labels[batch.rows < 0] == -100).all()
        # A sequence of padding alone still sees itself, so that no softmax is empty.
        assert (batch.attn_bias.max(axis=-1) == 0).all()


def test_the_shape_with_the_least_work_is_taken() -> None:
    assert [batch.input_ids.shape for batch in batches_of("1x40,4x40", [30], packing=True)] == [(1, 40)]
    assert [batch.input_ids.shape for batch in batches_of("1x40,4x40,1x80", [30, 31, 32], packing=True)] == [(4, 40)]
    assert [batch.input_ids.shape for batch in batches_of("1x40,1x8", [5], packing=True)] == [(1, 8)]


def test_a_row_that_fits_no_bucket_is_refused_before_anything_is_compiled() -> None:
    with pytest.raises(UsageError, match=r"40 tokens.*4x32 has 32 positions"):
        batches_of("4x32", LENGTHS, packing=True)


@pytest.mark.parametrize("capacity", [Capacity(4, 48, 128), Capacity(1, 8, 8), Capacity(3, 256, 256)])
def test_the_default_is_few_shapes_that_take_the_longest_row(capacity: Capacity) -> None:
    found = default_buckets(capacity)
    assert len(found) <= 4
    assert max(bucket.length for bucket in found) == capacity.longest
    for bucket in found:
        assert bucket.batch * bucket.length <= capacity.positions
        assert bucket.batch * bucket.length**2 <= capacity.scores
