"""BLEU and chrF: by hand, and on the example of sacrebleu's own page."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgetune.evaluation.translation import bleu, chrf
from support.answered import answered

# The example of sacrebleu's page, with its first set of references.
REFERENCES = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
ANSWERS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]


def test_bleu_by_hand() -> None:
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; as long as the reference."""
    found = bleu(answered(("the cat sat on a mat", "the cat sat on the mat")))
    assert found.score == pytest.approx(100 * math.exp(np.log([5 / 6, 3 / 5, 2 / 4, 1 / 3]).mean()))


def test_a_short_answer_pays_for_it() -> None:
    """All that is said is right, but 5 words are said of 8: brevity penalty exp(1 − 8/5)."""
    found = bleu(answered(("one two three four five six seven eight", "one two three four five")))
    assert found.score == pytest.approx(100 * math.exp(1 - 8 / 5))


def test_chrf_by_hand() -> None:
    """abd for abc: 2 of 3 letters, 1 of 2 pairs, 0 of 1 triples; precision and recall are the same, and so is F2."""
    assert chrf(answered(("abc", "abd"))).score == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_the_example_is_what_sacrebleu_says_of_it() -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    rows = answered(*zip(REFERENCES, ANSWERS, strict=True))
    assert bleu(rows).score == pytest.approx(corpus_bleu(ANSWERS, [REFERENCES]).score)
    assert chrf(rows).score == pytest.approx(corpus_chrf(ANSWERS, [REFERENCES]).score)
    drawn = np.array([2, 0, 2])
    expected = corpus_bleu([ANSWERS[row] for row in drawn], [[REFERENCES[row] for row in drawn]]).score
    assert bleu(rows).of(drawn) == pytest.approx(expected)
