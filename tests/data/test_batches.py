"""Batches against transformers' masks, and the order of rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.data.batches import MASKED, Batch, epoch_batches, lay_out, make_batch
from edgetune.data.encode import IGNORED, Example
from edgetune.data.prefixes import PackedRow
from edgetune.errors import DataError
from edgetune.host.rope_config import rope_from_config
from edgetune.model.rope import rope_tables

ROPE = rope_from_config({"hidden_size": 32, "num_attention_heads": 4})
LONG = Example(1, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [IGNORED] * 4 + [9, 10, 11, 12, 13, 14])
SHORT = Example(2, [20, 21, 22], [20, 21, 22])


def test_rows_are_padded_and_labels_shifted() -> None:
    batch = make_batch([LONG, SHORT], ROPE, pad_token_id=3)
    assert batch.input_ids.shape == batch.labels.shape == (2, 16)
    assert batch.input_ids[1].tolist() == [20, 21, 22] + [3] * 13
    assert batch.labels[0].tolist() == [IGNORED] * 3 + [9, 10, 11, 12, 13, 14] + [IGNORED] * 7
    assert batch.labels[1].tolist() == [21, 22] + [IGNORED] * 14
    assert batch.tokens == 13
    assert batch.trained_tokens == 8 == LONG.trained_tokens + SHORT.trained_tokens
    assert batch.attn_bias.shape == (2, 1, 16, 16)
    assert (batch.input_ids.dtype, batch.labels.dtype) == (np.int64, np.int64)
    assert {array.dtype for array in (batch.attn_bias, batch.rope_cos, batch.rope_sin)} == {np.dtype(np.float32)}


def test_exact_length() -> None:
    assert make_batch([LONG, SHORT], ROPE, 3, multiple_of=1).input_ids.shape == (2, 10)
    assert make_batch([LONG], ROPE, 3, multiple_of=5).input_ids.shape == (1, 10)


def test_rope_tables_are_those_of_the_positions() -> None:
    batch = make_batch([LONG, SHORT], ROPE, 3)
    positions = np.broadcast_to(np.arange(16), (2, 16))
    cos, sin = rope_tables(ROPE, positions, np.array([10, 3]))
    real = batch.rows >= 0
    np.testing.assert_array_equal(batch.rope_cos[real], cos[real])
    np.testing.assert_array_equal(batch.rope_sin[real], sin[real])


@pytest.mark.parametrize("window", [None, 1, 3, 10, 100])
def test_real_positions_look_where_transformers_lets_them(window: int | None) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Phi3Config
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    batch = make_batch([LONG, SHORT], ROPE, 3, sliding_window=window)
    length = batch.input_ids.shape[1]
    padding = torch.arange(length)[None] < torch.tensor([[10], [3]])
    config = Phi3Config(sliding_window=window)
    config._attn_implementation = "eager"
    create = create_causal_mask if window is None else create_sliding_window_causal_mask
    mask = create(
        config=config,
        input_embeds=torch.zeros(2, length, 8),
        attention_mask=padding,
        cache_position=torch.arange(length),
        past_key_values=None,
    )
    expected = mask.numpy() == 0
    ours = batch.attn_bias == 0
    real = padding.numpy()
    np.testing.assert_array_equal(ours[:, 0][real], expected[:, 0][real])
    assert set(np.unique(batch.attn_bias)) == {MASKED, np.float32(0)}
    assert ours.any(axis=-1).all(), "a fully masked row makes the softmax meaningless"
    assert not ours[~np.broadcast_to(np.tri(length, dtype=bool), ours.shape)].any()


def packed(packs: list[list[Example]], length: int, window: int | None = None) -> Batch:
    longest = max(len(example.input_ids) for pack in packs for example in pack)
    rows = [example for pack in packs for example in pack]
    numbers = iter(range(len(rows)))
    places = [[PackedRow(next(numbers)) for _ in pack] for pack in packs]
    return lay_out(rows, places, length, ROPE, 3, longest=longest, sliding_window=window)


@st.composite
def packs_of_rows(draw: st.DrawFn) -> list[list[Example]]:
    lengths = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    packs = []
    for pack in lengths:
        ids = [generator.integers(4, 1000, length).tolist() for length in pack]
        packs.append([Example(1, row, [t if generator.random() < 0.6 else IGNORED for t in row]) for row in ids])
    return packs


@pytest.mark.own
@settings(deadline=None)
@given(packs=packs_of_rows(), spare=st.integers(0, 5), window=st.none() | st.integers(1, 6))
def test_a_packed_row_is_what_it_is_on_its_own(packs: list[list[Example]], spare: int, window: int | None) -> None:
    length = spare + max(sum(len(example.input_ids) for example in pack) for pack in packs)
    batch = packed(packs, length, window)
    assert batch.examples == tuple(example for pack in packs for example in pack)
    number = 0
    for sequence, pack in enumerate(packs):
        start = 0
        for example in pack:
            alone = make_batch([example], ROPE, 3, multiple_of=1, sliding_window=window)
            size = len(example.input_ids)
            place = slice(start, start + size)
            assert (batch.rows[sequence] == number).nonzero()[0].tolist() == list(range(length))[place]
            for name in ("input_ids", "labels", "rope_cos", "rope_sin"):
                np.testing.assert_array_equal(getattr(batch, name)[sequence, place], getattr(alone, name)[0], name)
            bias = batch.attn_bias[sequence, 0, place]
            np.testing.assert_array_equal(bias[:, place], alone.attn_bias[0, 0])
            assert (np.delete(bias, np.arange(length)[place], axis=1) == MASKED).all(), "a row sees beyond itself"
            only = batch.only(number)
            assert only.trained_tokens == alone.trained_tokens == (only.labels != IGNORED).sum()
            np.testing.assert_array_equal(only.labels[sequence, place], alone.labels[0])
            start, number = start + size, number + 1
        assert (batch.rows[sequence, start:] == -1).all()
        assert (batch.input_ids[sequence, start:] == 3).all()
        assert (batch.labels[sequence, start:] == IGNORED).all()
    assert batch.tokens == sum(len(example.input_ids) for example in batch.examples)
    assert batch.trained_tokens == sum(example.trained_tokens for example in batch.examples)
    assert (batch.attn_bias == 0).any(axis=-1).all(), "a fully masked row makes the softmax meaningless"


@pytest.mark.own
@settings(deadline=None)
@given(
    tails=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    shared=st.integers(1, 6),
    window=st.none() | st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_a_row_that_borrows_its_prefix_is_what_it_is_on_its_own(
    tails: list[int], shared: int, window: int | None, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    prefix = generator.integers(4, 1000, shared).tolist()
    rows = [[*prefix, *generator.integers(4, 1000, size).tolist()] for size in tails]
    examples = [Example(1, ids, [*[IGNORED] * (shared + 1), *ids[shared + 1 :]]) for ids in rows]
    # A stranger, the row with the prefix and those that borrow it, a stranger; then a sequence of the prefix's owner.
    stranger = Example(2, [7, 8, 9], [7, 8, 9])
    own, *others = range(len(rows))
    packs = [
        [PackedRow(len(rows)), PackedRow(own), *(PackedRow(row, shared) for row in others), PackedRow(len(rows))],
        [PackedRow(own)],
    ]
    length = 6 + shared + sum(tails) + 2
    longest = max(map(len, rows))
    batch = lay_out([*examples, stranger], packs, length, ROPE, 3, longest=longest, sliding_window=window)
    assert batch.tokens == sum(len(example.input_ids) for example in batch.examples)
    assert batch.trained_tokens == sum(example.trained_tokens for example in batch.examples)
    for number, example in enumerate(batch.examples):
        alone = make_batch([example], ROPE, 3, multiple_of=1, sliding_window=window)
        sequences, positions = places = batch.places(number)
        sequence = sequences[0]
        for name in ("input_ids", "rope_cos", "rope_sin"):
            np.testing.assert_array_equal(getattr(batch, name)[places], getattr(alone, name)[0], name)
        borrowed = batch.borrowed[number].tokens
        np.testing.assert_array_equal(batch.labels[places][borrowed:], alone.labels[0, borrowed:])
        bias = batch.attn_bias[sequence, 0, positions]
        np.testing.assert_array_equal(bias[:, positions], alone.attn_bias[0, 0])
        own_bias = np.delete(bias, positions, axis=1)[borrowed:]
        assert (own_bias == MASKED).all(), "a row sees beyond itself"


def test_packed_rows_look_where_transformers_lets_them() -> None:
    torch = pytest.importorskip("torch")
    from transformers import Phi3Config
    from transformers.masking_utils import create_causal_mask

    batch = packed([[LONG, SHORT], [SHORT, SHORT]], 13)
    config = Phi3Config()
    config._attn_implementation = "eager"
    positions = torch.tensor([[*range(10), *range(3)], [*range(3), *range(3), *range(7)]])
    mask = create_causal_mask(
        config=config,
        input_embeds=torch.zeros(2, 13, 8),
        attention_mask=None,
        cache_position=torch.arange(13),
        past_key_values=None,
        position_ids=positions,
    )
    np.testing.assert_array_equal(batch.attn_bias == 0, mask.numpy() == 0)


def test_longrope_chooses_by_the_longest_row_and_not_by_the_sequence() -> None:
    rope = replace(ROPE, short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=10)
    positions = np.array([[0, 1, 2, 0, 1, 2]])
    for longest, factor in ((10, 1.0), (11, 2.0)):
        batch = lay_out([SHORT], [[PackedRow(0), PackedRow(0)]], 6, rope, 3, longest=longest, sliding_window=None)
        cos, _ = rope_tables(replace(rope, short_factor=[factor] * 4), positions, np.array([1]))
        np.testing.assert_array_equal(batch.rope_cos, cos)


def test_order_is_seeded_and_new_every_epoch() -> None:
    rows = list(range(10))
    batches = list(islice(epoch_batches(rows, 4, seed=7, shuffle=True), 9))
    epochs = [[row for batch in batches[first : first + 3] for row in batch] for first in (0, 3, 6)]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches == list(islice(epoch_batches(rows, 4, seed=7, shuffle=True), 9))
    assert batches != list(islice(epoch_batches(rows, 4, seed=8, shuffle=True), 9))
    assert epochs[1] == [rows[index] for index in _permutation(10, 7, 1)]


def _permutation(length: int, seed: int, epoch: int) -> list[int]:
    indices = np.arange(length)
    np.random.default_rng((seed, epoch)).shuffle(indices)
    return indices.tolist()


def test_without_shuffle_the_file_s_order_holds() -> None:
    assert list(islice(epoch_batches("abcde", 2, 0, False), 4)) == [["a", "b"], ["c", "d"], ["e"], ["a", "b"]]


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        next(epoch_batches([], 2, 0, True))
