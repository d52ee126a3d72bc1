"""Exact match and token F1 as SQuAD's script has them, and distinct-n, by hand and by published examples."""

from __future__ import annotations

import pytest

from edgetune.evaluation.words import distinct, exact_match, normalised_words, token_f1
from support.answered import answered

# The example on the page of the metric `squad` of Hugging Face's evaluate: two of three answers are right, the other
# has no word in common (`Beyonce`, where `Beyoncé and Bruno Mars` is the reference).
SQUAD = [("1976", "1976"), ("Beyoncé and Bruno Mars", "Beyonce"), ("climate change", "climate change")]


def test_the_published_example() -> None:
    rows = answered(*SQUAD)
    assert exact_match(rows).score == pytest.approx(0.6666666666666667)
    assert token_f1(rows).score == pytest.approx(0.6666666666666667)


def test_case_punctuation_and_articles_do_not_count() -> None:
    assert normalised_words("The  Eiffel-Tower, in a Park!") == ["eiffeltower", "in", "park"]
    assert exact_match(answered(("the Lamp.", "lamp"), ("a theatre", "theatre"))).rows.tolist() == [1.0, 1.0]
    assert exact_match(answered(("lamp", "lamps"))).score == 0.0


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        # 3 words in common, of 4 answered and 3 expected: precision 3/4, recall 1, F1 6/7.
        ("open the north valve", "please open north valve", 6 / 7),
        ("open open shut", "open shut shut", 2 / 3),
        ("lamp", "", 0.0),
        # Nothing is left of either: SQuAD 2's script says that they agree.
        ("the", "a", 1.0),
    ],
)
def test_token_f1_by_hand(reference: str, answer: str, expected: float) -> None:
    assert token_f1(answered((reference, answer))).score == pytest.approx(expected)


def test_distinct_counts_over_all_answers() -> None:
    rows = answered(("", "I do not know"), ("", "i do not care"))
    # i do not know care: 5 of 8 words; i-do do-not not-know not-care: 4 of 6 pairs.
    assert distinct(rows, 1).score == 5 / 8
    assert distinct(rows, 2).score == 4 / 6
    assert distinct(rows, 1).rows.tolist() == [1.0, 1.0]
    assert distinct(answered(("", "word")), 2).score == 0.0
