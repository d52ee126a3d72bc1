"""Goals held against what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.cases import Case, Goal, Line, Series
from benchmarks.experiments import Experiment
from benchmarks.record import Outcome, Sitting, Spread


@dataclass(frozen=True)
class Finding:
    """One goal and what was found."""

    goal: Goal
    value: float
    """In the goal's own terms: a ratio for a relative goal."""

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.value >= self.goal.bound if self.goal.direction == "≥" else self.value <= self.goal.bound


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    case: Case
    winner: Experiment | None = None
    """The contestant that the findings are about; none when the case could not be judged."""
    rival: Experiment | None = None
    """What it was held against."""
    findings: tuple[Finding, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why experiments of the case were not run."""

    @property
    def met(self) -> bool | None:
        """Whether all goals are reached; none when that was not measured."""
        return all(finding.met for finding in self.findings) if self.findings else None


@dataclass(frozen=True)
class Fit:
    """A straight line through the medians of a plot's line (least squares)."""

    slope: float
    offset: float
    r_squared: float


def judge(case: Case, sitting: Sitting) -> Verdict:
    """Hold a case's goals against the medians; the contestant that meets most of them counts, or fewest if all must."""
    reasons = [
        f"{outcome.experiment}: {outcome.failure}"
        for outcome in map(sitting.outcome, (*case.ours, *case.against))
        if outcome.failure
    ]
    first = case.goals[0]
    rival = _best(map(sitting.outcome, case.against), first)
    judged = [
        (outcome, findings)
        for outcome in map(sitting.outcome, case.ours)
        if (findings := _findings(case.goals, outcome, rival)) is not None
    ]
    if not judged or (case.every and len(judged) < len(case.ours)):
        return Verdict(case, reasons=tuple(reasons))
    sign = 1 if first.direction == "≥" else -1
    choose = min if case.every else max
    outcome, findings = choose(judged, key=lambda each: (sum(f.met for f in each[1]), sign * each[1][0].value))
    return Verdict(case, outcome.experiment, rival.experiment if rival else None, tuple(findings), tuple(reasons))


def _best(outcomes: Iterable[Outcome], goal: Goal) -> Outcome | None:
    measured = [(value, outcome) for outcome in outcomes if (value := outcome.median(goal.quantity)) is not None]
    if not measured:
        return None
    choose = max if goal.direction == "≥" else min
    return choose(measured, key=lambda each: each[0])[1]


def _findings(goals: Sequence[Goal], outcome: Outcome, rival: Outcome | None) -> list[Finding] | None:
    """A finding a goal; none when one of them cannot be judged."""
    findings = []
    for goal in goals:
        value = outcome.median(goal.quantity)
        other = rival.median(goal.quantity) if rival and goal.relative else None
        if value is None or (goal.relative and other is None):
            return None
        findings.append(Finding(goal, value / other if other is not None else value))
    return findings


def points_of(series: Series, line: Line, sitting: Sitting) -> list[tuple[float, Spread]]:
    """What was measured along a line; points that were not run are left out."""
    spreads = [(x, sitting.outcome(experiment).spread(series.quantity)) for x, experiment in line.points]
    return [(x, spread) for x, spread in spreads if spread is not None]


def fit_line(points: Sequence[tuple[float, Spread]]) -> Fit | None:
    """Least squares through the medians; none with fewer than three points, through which any line goes."""
    if len(points) < 3:
        return None
    x, y = (np.array(values, np.float64) for values in zip(*((x, spread.median) for x, spread in points), strict=True))
    slope, offset = np.polyfit(x, y, 1)
    rest = y - (slope * x + offset)
    spread = ((y - y.mean()) ** 2).sum()
    return Fit(float(slope), float(offset), float(1 - (rest**2).sum() / spread) if spread else 1.0)
