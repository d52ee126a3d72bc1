"""The table of metrics: it has what the option offers, says what is missing, and refuses what it cannot measure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest

from edgetune.config import MetricName
from edgetune.errors import MissingDependencyError
from edgetune.evaluation import metrics
from edgetune.evaluation.metrics import METRICS, problem_of, require_packages
from support.answered import answered


def test_the_table_has_what_the_option_offers() -> None:
    assert tuple(METRICS) == get_args(MetricName)
    assert [name for name, metric in METRICS.items() if not metric.higher_is_better] == ["perplexity"]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_measures_a_right_answer_and_a_wrong_one(name: MetricName) -> None:
    reference = '{"device": "lamp"}'
    rows = [replace(row, loss=0.1, tokens=4) for row in answered((reference, reference), (reference, "no idea"))]
    found = METRICS[name].measure(rows)
    assert len(found.rows) == 2
    assert found.rows[0] >= found.rows[1]
    assert math.isfinite(found.score)


def test_perplexity_is_of_all_tokens() -> None:
    rows = [
        replace(row, loss=loss, tokens=count)
        for row, loss, count in zip(answered(("", ""), ("", "")), (1.0, 4.0), (2, 1), strict=True)
    ]
    found = METRICS["perplexity"].measure(rows)
    assert found.score == pytest.approx(math.exp((1.0 * 2 + 4.0) / 3))
    assert found.rows.tolist() == pytest.approx([math.e, math.exp(4)])


def test_what_is_not_installed_is_said_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    require_packages(["accuracy", "token-f1", "json-match"])
    with pytest.raises(
        MissingDependencyError, match=r'bleu needs sacrebleu, macro-f1 needs sklearn.*"edgetune\[eval\]"'
    ):
        require_packages(["bleu", "accuracy", "macro-f1"])


def test_a_reference_that_a_metric_cannot_read_is_a_problem() -> None:
    assert problem_of("the lamp", ["accuracy"]) is None
    assert problem_of("device: lamp", ["entity-f1"]) is None
    said = problem_of("the lamp", ["accuracy", "json-match"])
    assert said == "--metric json-match: the answer 'the lamp' is not an object or a list in JSON"
