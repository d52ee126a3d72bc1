"""The Markdown table of a sitting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.cases import MINIMUM_FIT, SGEMM, Case, Goal, Reference, Series
from benchmarks.experiments import (
    Edgetune,
    Experiment,
    GemmLimit,
    Precision,
    PyTorch,
    RealLoss,
    Training,
    Workload,
)
from benchmarks.machine import Machine
from benchmarks.quantities import QUANTITIES
from benchmarks.record import Outcome, Sitting
from benchmarks.verdicts import fit_line, judge, points_of

_TRAINING_COLUMNS = (
    "tokens_per_second",
    "step_seconds",
    "first_step_seconds",
    "open_seconds",
    "flops_per_second",
    "peak_rss",
    "predicted_peak",
    "peak_anonymous",
    "peak_file",
    "first_loss",
)

_PRECISION_COLUMNS = ("loss", "loss_difference", "worst_cosine", "mean_cosine", "norm_ratio")
_LOSS_COLUMNS = ("first_validation_loss", "validation_loss")


def write_report(
    sitting: Sitting, cases: Sequence[Case], series: Sequence[Series], references: Sequence[Reference]
) -> str:
    """All tables of a sitting; docs/benchmarks.md says what the columns mean.

    Args:
        sitting: What was measured.
        cases: The cases that were asked for.
        series: The series that were asked for; their plots lie beside the report, by their names.
        references: Figures of other sittings.
    """
    sections = [
        _heading(sitting),
        _goals(sitting, cases),
        _limits(sitting),
        *_trainings(sitting, references),
        *_precision(sitting),
        _others(sitting),
        *(_series(each, sitting) for each in series),
        _not_run(sitting),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _heading(sitting: Sitting) -> str:
    machine = sitting.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    return "\n".join(
        [
            "# Benchmark results",
            "",
            f"{sitting.started}, {sitting.runs} fresh processes a measurement, contestants in turn; "
            "median (least–most). Columns: docs/benchmarks.md.",
            "",
            f"{_machine(machine)}. Python {machine.python}, {versions}.",
        ]
    )


def _machine(machine: Machine) -> str:
    flags = " ".join(machine.flags)
    return f"{machine.processor}, {machine.cores} cores ({flags}), {machine.memory / 1e9:.0f} GB, {machine.system}"


def _goals(sitting: Sitting, cases: Sequence[Case]) -> str:
    rows = []
    for verdict in (judge(case, sitting) for case in cases):
        case = verdict.case
        goals = ", ".join(f"{goal.direction} {_in_terms_of(goal, goal.bound)}" for goal in case.goals)
        found = ", ".join(_in_terms_of(each.goal, each.value) for each in verdict.findings) or "not measured"
        who = " against ".join(str(each) for each in (_who(verdict.winner), _who(verdict.rival)) if each)
        met = {True: "yes", False: "no", None: "not measured"}[verdict.met]
        rows.append([case.name, case.title, goals, found, who, met])
    if not rows:
        return ""
    return "## Goals\n\n" + _table(["case", "what", "goal", "found", "by", "met"], rows)


def _in_terms_of(goal: Goal, value: float) -> str:
    """A bound or a finding: `1.30 × tokens/s`, or `2.50 peak RSS, GB`."""
    quantity = QUANTITIES[goal.quantity]
    if goal.relative:
        return f"{value:.2f} × {quantity.title.partition(',')[0]}"
    return f"{quantity.text(value)} {quantity.title}"


def _who(experiment: Experiment | None) -> str:
    return str(experiment.contestant if isinstance(experiment, Training) else experiment or "")


def _limits(sitting: Sitting) -> str:
    rows = [
        [
            outcome.experiment.library,
            outcome.experiment.dtype,
            f"{outcome.experiment.m} × {outcome.experiment.k} × {outcome.experiment.n}",
            QUANTITIES["flops_per_second"].spread_text(outcome.spread("flops_per_second")),
        ]
        for outcome in sitting.outcomes
        if isinstance(outcome.experiment, GemmLimit)
    ]
    return "## The machine's limits: one matrix product\n\n" + _table(["library", "type", "m × k × n", "GFLOP/s"], rows)


def _trainings(sitting: Sitting, references: Sequence[Reference]) -> list[str]:
    groups: dict[Workload, list[Outcome]] = {}
    for outcome in sitting.outcomes:
        if isinstance(outcome.experiment, Training) and outcome.samples:
            groups.setdefault(outcome.experiment.workload, []).append(outcome)
    return [_training(workload, outcomes, sitting, references) for workload, outcomes in groups.items()]


def _training(
    workload: Workload, outcomes: Sequence[Outcome], sitting: Sitting, references: Sequence[Reference]
) -> str:
    peers = [o.median("tokens_per_second") or 0.0 for o in outcomes if _contestant_is(o, PyTorch)]
    best_peer, sgemm = max(peers, default=0.0), _sgemm(sitting)
    rows = []
    for outcome in sorted(outcomes, key=lambda each: -(each.median("tokens_per_second") or 0.0)):
        speed, flops = outcome.median("tokens_per_second"), outcome.median("flops_per_second")
        rows.append(
            [
                _who(outcome.experiment),
                *(QUANTITIES[name].spread_text(outcome.spread(name)) for name in _TRAINING_COLUMNS),
                f"{speed / best_peer:.2f} ×" if speed and best_peer else "–",
                f"{flops / sgemm:.2f}" if flops and sgemm else "–",
            ]
        )
    notes = []
    for reference in references:
        if reference.workload == workload:
            rows.append([f"{reference.label} ¹", *_reference_columns(reference), "–", "–"])
            notes.append(f"¹ {reference.note}.")
    titles = [QUANTITIES[name].title for name in _TRAINING_COLUMNS]
    table = _table(["contestant", *titles, "of PyTorch's fastest", "share of sgemm"], rows)
    return "\n\n".join([f"## {workload}", table, *notes])


def _reference_columns(reference: Reference) -> list[str]:
    known = {"tokens_per_second": reference.tokens_per_second, "peak_rss": reference.peak_rss}
    return [QUANTITIES[name].text(known[name]) if name in known else "–" for name in _TRAINING_COLUMNS]


def _sgemm(sitting: Sitting) -> float:
    """The highest fp32 figure of any library."""
    return max((sitting.outcome(limit).median("flops_per_second") or 0.0 for limit in SGEMM), default=0.0)


def _contestant_is(outcome: Outcome, kind: type[Edgetune] | type[PyTorch]) -> bool:
    return isinstance(outcome.experiment, Training) and isinstance(outcome.experiment.contestant, kind)


def _precision(sitting: Sitting) -> list[str]:
    """How far each contestant's step is from the exact one, a table a model; and what came of training."""
    steps = [outcome for outcome in sitting.outcomes if isinstance(outcome.experiment, Precision) and outcome.samples]
    losses = [outcome for outcome in sitting.outcomes if isinstance(outcome.experiment, RealLoss) and outcome.samples]
    groups: dict[str, list[Outcome]] = {}
    for outcome in steps:
        assert isinstance(outcome.experiment, Precision)
        groups.setdefault(f"Precision of a step: {outcome.experiment.model.name}", []).append(outcome)
    tables: list[tuple[str, list[Outcome], tuple[str, ...]]]
    tables = [(title, outcomes, _PRECISION_COLUMNS) for title, outcomes in groups.items()]
    tables += [("Validation loss of the real model", losses, _LOSS_COLUMNS)] if losses else []
    return [f"## {title}\n\n{_figures(outcomes, columns)}" for title, outcomes, columns in tables]


def _figures(outcomes: Sequence[Outcome], columns: Sequence[str]) -> str:
    rows = [
        [str(outcome.experiment), *(QUANTITIES[name].spread_text(outcome.spread(name)) for name in columns)]
        for outcome in outcomes
    ]
    return _table(["what", *(QUANTITIES[name].title for name in columns)], rows)


def _others(sitting: Sitting) -> str:
    """Gradients, start-up and whatever else is neither a training step nor a limit: a row a quantity."""
    rows = [
        [str(outcome.experiment), QUANTITIES[name].title, QUANTITIES[name].spread_text(outcome.spread(name))]
        for outcome in sitting.outcomes
        if outcome.samples and not isinstance(outcome.experiment, (Training, GemmLimit, Precision, RealLoss))
        for name in outcome.samples[0]
    ]
    return "## Other measurements\n\n" + _table(["what", "quantity", "found"], rows) if rows else ""


def _series(series: Series, sitting: Sitting) -> str:
    quantity = QUANTITIES[series.quantity]
    rows = []
    for line in series.lines:
        points = points_of(series, line, sitting)
        fit = fit_line(points)
        rows += [[line.label, f"{x:,g}", quantity.spread_text(spread)] for x, spread in points]
        if fit is not None:
            straight = "yes" if fit.r_squared >= MINIMUM_FIT else "no"
            rows.append([line.label, "straight line", f"{straight}: R² {fit.r_squared:.4f}"])
    if not rows:
        return f"## {series.title}\n\nNot measured."
    table = _table(["contestant", series.x_label, quantity.title], rows)
    return f"## {series.title}\n\n![{series.title}]({series.name}.svg)\n\n{table}"


def _not_run(sitting: Sitting) -> str:
    rows = [[str(outcome.experiment), outcome.failure] for outcome in sitting.outcomes if outcome.failure]
    return "## Not run\n\n" + _table(["what", "why"], rows) if rows else ""


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
