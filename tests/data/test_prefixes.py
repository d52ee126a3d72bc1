"""Which rows begin alike."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.data.encode import IGNORED, Example
from edgetune.data.prefixes import SHORTEST, Prefix, common_prefixes


def row(*parts: tuple[int, int], trained: int = 4) -> Example:
    """Tokens as (which, how many), and then so many that are trained."""
    ids = [token for token, count in parts for _ in range(count)]
    answer = [9] * trained
    return Example(1, [*ids, *answer], [*[IGNORED] * len(ids), *answer])


def saved(found: list[Prefix | None]) -> int:
    """Tokens that are left out if every prefix stands once."""
    prefixes = [prefix for prefix in found if prefix is not None]
    return sum(prefix.tokens for prefix in prefixes) - sum(prefix.tokens for prefix in set(prefixes))


def test_rows_share_what_they_begin_with() -> None:
    found = common_prefixes([row((1, 20), (2, 5)), row((1, 20), (3, 7)), row((4, 30))])
    assert found == [Prefix(0, 20), Prefix(0, 20), None]


def test_what_the_last_of_them_predicts_is_each_row_s_own() -> None:
    """All of the prompt is in common; its last token predicts the answer, and is repeated."""
    assert common_prefixes([row((1, 20))] * 2) == [Prefix(0, 19)] * 2
    text = Example(1, [5] * 30, [5] * 30)
    assert common_prefixes([text, text]) == [None, None]
    nothing_trained = Example(1, [5] * 30, [IGNORED] * 30)
    assert common_prefixes([nothing_trained] * 2) == [Prefix(0, 29)] * 2


@pytest.mark.parametrize(("tokens", "shares"), [(SHORTEST - 1, False), (SHORTEST, True)])
def test_short_prefixes_are_not_worth_it(tokens: int, shares: bool) -> None:
    found = common_prefixes([row((1, tokens), (2, 5)), row((1, tokens), (3, 5))])
    assert found == [Prefix(0, tokens) if shares else None] * 2


def test_two_system_prompts_beat_what_all_have_in_common() -> None:
    first, second = ((1, 10), (2, 90)), ((1, 10), (3, 60))
    rows = [row(*first, (5, 9)), row(*second, (5, 9)), row(*first, (6, 9)), row(*second, (6, 9))]
    found = common_prefixes(rows)
    assert [prefix and prefix.tokens for prefix in found] == [100, 70, 100, 70]
    assert (found[0], found[1]) == (found[2], found[3])


def test_a_long_prefix_of_few_does_not_cost_the_many_theirs() -> None:
    """Two rows have 3 tokens more in common than all twenty."""
    rows = [row((1, 50), (2, 3), (other, 9)) for other in (4, 5)]
    rows += [row((1, 50), (other, 9)) for other in range(10, 28)]
    assert {prefix and prefix.tokens for prefix in common_prefixes(rows)} == {50}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=0, max_size=4), st.integers(0, 40)), min_size=1, max_size=6)
)
def test_no_grouping_by_one_prefix_saves_much_more(parts: list[tuple[list[int], int]]) -> None:
    rows = [row(*((kind, 10) for kind in kinds), (7, tail), trained=2) for kinds, tail in parts]
    found = common_prefixes(rows)
    for example, prefix in zip(rows, found, strict=True):
        if prefix is not None:
            assert set(example.labels[1 : prefix.tokens + 1]) == {IGNORED}
            others = [other for other, same in zip(rows, found, strict=True) if same == prefix]
            assert len(others) > 1
            assert {tuple(other.input_ids[: prefix.tokens]) for other in others} == {
                tuple(example.input_ids[: prefix.tokens])
            }
    # Every group of rows, all of which share what they have in common, as a lower bound.
    for size in range(2, len(rows) + 1):
        for group in combinations(rows, size):
            prompts = [example.input_ids[: len(example.input_ids) - 3] for example in group]
            common = 0
            while all(len(p) > common for p in prompts) and len({p[common] for p in prompts}) == 1:
                common += 1
            assert saved(found) > (size - 1) * (common - SHORTEST)
