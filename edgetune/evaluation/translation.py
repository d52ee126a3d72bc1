"""Metrics of translation, as sacrebleu computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgetune.evaluation.measurement import AnsweredRow, Measurement, of_sums, texts

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric


def bleu(rows: Sequence[AnsweredRow]) -> Measurement:
    """BLEU of all answers together (Papineni et al. 2002), from 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU

    return _measured(BLEU(force=True), rows)


def chrf(rows: Sequence[AnsweredRow]) -> Measurement:
    """F-score of sequences of characters (chrF2, Popović 2015), from 0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    return _measured(CHRF(), rows)


def _measured(metric: Metric, rows: Sequence[AnsweredRow]) -> Measurement:
    references, answers = zip(*texts(rows), strict=True)
    # What corpus_score does with each row before it adds them up; its own bootstrap takes it from there, too.
    counts = metric._extract_corpus_statistics(answers, [references])
    return of_sums(counts, lambda sums: float(metric._aggregate_and_compute([sums.astype(int).tolist()]).score))
