"""Every metric of answers, in one table: what it says, what it needs, and which direction is better."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import numpy as np

from edgetune.config import MetricName
from edgetune.errors import MissingDependencyError
from edgetune.evaluation.labels import accuracy, macro_f1
from edgetune.evaluation.measurement import AnsweredRow, Measurement, of_sums
from edgetune.evaluation.structure import entities_in, entity_f1, json_match, leaves_in
from edgetune.evaluation.translation import bleu, chrf
from edgetune.evaluation.words import distinct, exact_match, token_f1


@dataclass(frozen=True)
class Metric:
    """One metric."""

    measure: Callable[[Sequence[AnsweredRow]], Measurement]
    """Of at least one row."""
    needs: Literal["answers", "losses"] = "answers"
    """What of the rows it looks at beside the references."""
    higher_is_better: bool = True
    package: str | None = None
    """What it imports that is no part of a device's packages."""
    form: tuple[Callable[[str], object], str] | None = None
    """What gives None for a reference that it can say nothing of, and what a reference should be."""
    rows_add_up: bool = True
    """Whether rows can be drawn again and again to say how sure a difference is: not where a repetition counts."""


def _perplexity(rows: Sequence[AnsweredRow]) -> Measurement:
    """Exponential of the mean loss of all trained tokens: what `edgetune eval` says of a bundle."""
    counts = [((row.loss or 0.0) * (row.tokens or 0), row.tokens or 0) for row in rows]
    return of_sums(counts, lambda sums: float(np.exp(sums[0] / sums[1])))


METRICS: dict[MetricName, Metric] = {
    "accuracy": Metric(accuracy),
    "macro-f1": Metric(macro_f1, package="sklearn"),
    "entity-f1": Metric(
        entity_f1,
        form=(entities_in, 'entities: [{"type": …, "text": …}], {type: text or texts}, or lines `type: text`'),
    ),
    "json-match": Metric(json_match, form=(leaves_in, "an object or a list in JSON")),
    "exact-match": Metric(exact_match),
    "token-f1": Metric(token_f1),
    "chrf": Metric(chrf, package="sacrebleu"),
    "bleu": Metric(bleu, package="sacrebleu"),
    "distinct-1": Metric(partial(distinct, length=1), rows_add_up=False),
    "distinct-2": Metric(partial(distinct, length=2), rows_add_up=False),
    "perplexity": Metric(_perplexity, needs="losses", higher_is_better=False),
}


def require_packages(names: Iterable[MetricName]) -> None:
    """Check that metrics have what they import, before anything long begins.

    Raises:
        MissingDependencyError: Naming those that have not, and how to get it.
    """
    needed = {name: METRICS[name].package for name in names}
    missing = [f"{name} needs {package}" for name, package in needed.items() if package and find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f'{", ".join(missing)}, which is not installed; pip install "edgetune[eval]"')


def problem_of(reference: str, names: Iterable[MetricName]) -> str | None:
    """What is wrong with a reference for some metrics; None where nothing is."""
    for name in names:
        form = METRICS[name].form
        if form is not None and form[0](reference) is None:
            return f"--metric {name}: the answer {reference!r:.60} is not {form[1]}"
    return None
