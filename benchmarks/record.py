"""What a sitting found, as JSON: every sample of every experiment."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

import cattrs
from cattrs.strategies import configure_tagged_union

from benchmarks.experiments import Contestant, Experiment
from benchmarks.machine import Machine


@dataclass(frozen=True)
class Spread:
    """Median and range of the samples of one quantity."""

    median: float
    least: float
    most: float


@dataclass
class Outcome:
    """What came of one experiment: samples, or why there are none."""

    experiment: Experiment
    samples: list[dict[str, float]] = field(default_factory=list)
    """One a process: quantities by name, in seconds, bytes, tokens and operations."""
    failure: str = ""
    """Why it was not run, or not to the end; empty when it was."""

    def spread(self, quantity: str) -> Spread | None:
        """Median, least and most of a quantity; none where it was not measured."""
        values = [sample[quantity] for sample in self.samples if quantity in sample]
        return Spread(median(values), min(values), max(values)) if values else None

    def median(self, quantity: str) -> float | None:
        """Median of a quantity; none where it was not measured."""
        spread = self.spread(quantity)
        return spread.median if spread else None


@dataclass(frozen=True)
class Sitting:
    """All that was measured in one sitting."""

    machine: Machine
    runs: int
    """Fresh processes an experiment, unless one is enough."""
    started: str
    """When, in UTC."""
    outcomes: list[Outcome]

    def outcome(self, experiment: Experiment) -> Outcome:
        """What came of an experiment."""
        for outcome in self.outcomes:
            if outcome.experiment == experiment:
                return outcome
        return Outcome(experiment, failure="not part of this sitting")


def now() -> str:
    """The time of day, for records."""
    return datetime.now(UTC).isoformat(timespec="seconds")


_converter = cattrs.Converter(forbid_extra_keys=True)
configure_tagged_union(Contestant, _converter, tag_name="kind")
configure_tagged_union(Experiment, _converter, tag_name="kind")


def write_experiment(experiment: Experiment) -> dict[str, Any]:
    """As JSON holds it."""
    plain: dict[str, Any] = _converter.unstructure(experiment, unstructure_as=Experiment)
    return plain


def read_experiment(plain: dict[str, Any]) -> Experiment:
    """The inverse of `write_experiment`."""
    return _converter.structure(plain, Experiment)  # type: ignore[arg-type]


def write_sitting(sitting: Sitting) -> str:
    """The JSON file."""
    return json.dumps(_converter.unstructure(sitting), indent=1, ensure_ascii=False) + "\n"


def read_sitting(text: str) -> Sitting:
    """The inverse of `write_sitting`."""
    return _converter.structure(json.loads(text), Sitting)
