"""Which rows share a sequence and a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.data.packing import MULTIPLE, Capacity, Pass, attention_share, pack, pad, pass_work, round_up
from edgetune.data.prefixes import PackedRow, Prefix
from edgetune.model.architecture import Architecture
from edgetune.model.rope import Rope

ATTENTION = 1e-3
lengths_of_rows = st.lists(st.integers(1, 600), min_size=1, max_size=60)


def capacity_for(lengths: Sequence[int], batch_size: int, max_length: int = 700) -> Capacity:
    return Capacity(batch_size, round_up(max(lengths), max_length), round_up(max_length, max_length))


def strangers(lengths: Sequence[int]) -> list[Prefix | None]:
    """Rows that have nothing in common."""
    return [None] * len(lengths)


def positions(passes: list[Pass]) -> int:
    return sum(len(item.packs) * item.length for item in passes)


def test_lengths_are_few_and_not_much_longer() -> None:
    rounded = [round_up(length) for length in range(1, 4097)]
    assert all(
        0 <= new - length < max(MULTIPLE, length / 16) and new % MULTIPLE == 0
        for length, new in enumerate(rounded, start=1)
    )
    assert (
        len({new for new in rounded if 256 < new <= 512}) == len({new for new in rounded if 2048 < new <= 4096}) == 16
    )
    assert (round_up(500, 500), round_up(490, 500), round_up(470, 500), round_up(3, 500)) == (504, 496, 480, 8)


@pytest.mark.parametrize("lay", [lambda lengths, capacity: pack(lengths, strangers(lengths), capacity, ATTENTION), pad])
@settings(deadline=None)
@given(lengths=lengths_of_rows, batch_size=st.integers(1, 20), max_length=st.integers(600, 1500))
def test_every_row_has_one_place_within_the_room(
    lay: Callable[[Sequence[int], Capacity], list[Pass]], lengths: list[int], batch_size: int, max_length: int
) -> None:
    capacity = capacity_for(lengths, batch_size, max_length)
    passes = lay(lengths, capacity)
    rows = [packed.row for item in passes for rows in item.packs for packed in rows]
    assert sorted(rows) == list(range(len(lengths)))
    worst = batch_size * capacity.longest
    for item in passes:
        assert all(0 < sum(lengths[packed.row] for packed in rows) <= item.length for rows in item.packs)
        assert item.packs
        assert item.length <= capacity.limit
        assert len(item.packs) * item.length <= worst
        assert len(item.packs) * item.length**2 <= worst * capacity.longest
    assert passes == lay(lengths, capacity)


@settings(deadline=None)
@given(lengths=lengths_of_rows, batch_size=st.integers(1, 20))
def test_packing_never_computes_more_than_one_padded_batch(lengths: list[int], batch_size: int) -> None:
    lengths = lengths[:batch_size]
    capacity = capacity_for(lengths, batch_size)
    packed, padded = pack(lengths, strangers(lengths), capacity, ATTENTION), pad(lengths, capacity)
    assert len(padded) == 1
    work = [sum(len(p.packs) * p.length * (1 + ATTENTION * p.length) for p in passes) for passes in (packed, padded)]
    assert work[0] <= work[1]


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 600), st.integers(-1, 3)), min_size=1, max_size=60),
    shares=st.lists(st.integers(8, 300), min_size=4, max_size=4),
    batch_size=st.integers(1, 20),
)
def test_rows_that_begin_alike_follow_one_copy(
    rows: list[tuple[int, int]], shares: list[int], batch_size: int
) -> None:
    prefixes = [
        None if kind < 0 or length <= shares[kind] else Prefix(kind, shares[kind]) for length, kind in rows
    ]
    lengths = [length for length, _ in rows]
    capacity = capacity_for(lengths, batch_size)
    passes = pack(lengths, prefixes, capacity, ATTENTION)
    assert sorted(packed.row for item in passes for rows in item.packs for packed in rows) == list(range(len(lengths)))
    for item in passes:
        assert len(item.packs) * item.length <= capacity.positions
        for packed in item.packs:
            assert sum(lengths[place.row] - place.shared for place in packed) <= item.length
            whole = None
            for place in packed:
                if not place.shared:
                    whole = place.row
                else:
                    prefix = prefixes[place.row]
                    assert prefix is not None
                    assert whole is not None
                    assert (prefix, place.shared) == (prefixes[whole], prefix.tokens)
    work = [pass_work(found, ATTENTION) for found in (passes, pack(lengths, strangers(lengths), capacity, ATTENTION))]
    if len(set(lengths)) == 1 and len(set(prefixes)) == 1:
        assert work[0] <= work[1]


def test_a_common_prefix_is_computed_once_a_sequence() -> None:
    prefix = Prefix(0, 200)
    (found,) = pack([260] * 8, [prefix] * 8, Capacity(8, 272, 2048), ATTENTION)
    assert (found.length, len(found.packs)) == (704, 1)  # 200 + 8 * 60, rounded up
    assert [place.shared for place in found.packs[0]] == [0] + [200] * 7
    # Where sequences cannot be that long, each has a copy.
    (found,) = pack([260] * 8, [prefix] * 8, Capacity(8, 272, 384), ATTENTION)
    assert [[place.shared for place in rows] for rows in found.packs] == [[0, 200, 200]] * 2 + [[0, 200]]


def test_rows_that_fill_each_other_are_found() -> None:
    lengths = [300, 100, 256, 212, 256, 412]
    (found,) = pack(lengths, strangers(lengths), Capacity(4, 512, 512), ATTENTION)
    assert found.length == 512
    filled = sorted(sorted(lengths[packed.row] for packed in rows) for rows in found.packs)
    assert filled == [[100, 412], [212, 300], [256, 256]]


def test_long_sequences_are_avoided_where_attention_is_dear() -> None:
    lengths, capacity = [100, 60, 60, 60], Capacity(8, 104, 512)
    assert [(item.length, len(item.packs)) for item in pack(lengths, strangers(lengths), capacity, 0.0)] == [(288, 1)]
    assert [(item.length, len(item.packs)) for item in pack(lengths, strangers(lengths), capacity, 1.0)] == [(120, 3)]


def test_chat_rows_fill_what_is_computed() -> None:
    lengths = [41, 57, 66, 80, 93, 101, 118, 125, 140, 155, 171, 190, 220, 260, 330, 500]
    capacity = Capacity(16, 512, 1024)
    packed, padded = pack(lengths, strangers(lengths), capacity, 1e-4), pad(lengths, capacity)
    assert sum(lengths) / positions(packed) > 0.95
    assert positions(padded) / positions(packed) > 2.5


def test_many_rows_make_as_few_passes_as_fit() -> None:
    passes = pack([100] * 40, [None] * 40, Capacity(2, 512, 512), 0.0)
    assert [sum(map(len, item.packs)) for item in passes] == [10] * 4


def test_padded_rows_of_similar_length_share_a_pass() -> None:
    assert pad([10, 200, 12, 190], Capacity(2, 208, 512)) == [
        Pass(200, [[PackedRow(1)], [PackedRow(3)]]),
        Pass(16, [[PackedRow(2)], [PackedRow(0)]]),
    ]


def test_attention_is_weighed_by_the_model_s_sizes() -> None:
    small = Architecture(768, 2048, 12, 12, 12, 64, 8192, 4096, None, False, Rope(64, 1e4, 1.0, None, None, 4096))
    # Per layer, 7.08 M frozen weights, multiplied forward and backward; 6 · 768 multiplications a position looked at.
    assert attention_share(small) == pytest.approx(2.0 * 6 * 768 / (2 * (4 * 768**2 + 3 * 768 * 2048)))
