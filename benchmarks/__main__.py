"""`python -m benchmarks`: measure, print the table, and write table, JSON and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cache import Cache
from benchmarks.cases import CASES, ONNXSIM, SERIES, Case, Series
from benchmarks.experiments import Experiment
from benchmarks.machine import describe_machine
from benchmarks.plots import Curve, Mark, line_plot, svg_text
from benchmarks.quantities import QUANTITIES
from benchmarks.record import Outcome, Sitting, now, write_sitting
from benchmarks.report import write_report
from benchmarks.sitting import experiments_of, hold_sitting, rounds
from benchmarks.verdicts import fit_line, points_of

HERE = Path(__file__).resolve().parent
RUNS = 5
"""Fresh processes a measurement."""
NAMES = [*(case.name for case in CASES), *(series.name for series in SERIES)]


class RichProgress:
    """Shows a sitting on stderr."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def begin(self, experiment: Experiment, run: int) -> None:
        """Say what is measured now."""
        self._progress.update(self._task, description=f"{experiment}, run {run + 1}")
        if not self._progress.console.is_terminal:
            self.say(f"{experiment}, run {run + 1}")

    def end(self) -> None:
        """Move the bar."""
        self._progress.advance(self._task)

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


@click.command()
@click.option("--cases", "chosen", help=f"Names, with commas between them; all without it: {', '.join(NAMES)}.")
@click.option("--runs", type=click.IntRange(min=1), default=RUNS, show_default=True, help="Fresh processes a figure.")
@click.option("--list", "list_only", is_flag=True, help="Name the cases and what each measures, and measure nothing.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=HERE / "results",
    help="Folder of the results; benchmarks/results without it.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=HERE / ".cache",
    help="Folder of checkpoints and bundles; benchmarks/.cache without it.",
)
def main(chosen: str | None, runs: int, list_only: bool, output: Path, cache: Path) -> None:
    """Measure edgetune and PyTorch + PEFT in one sitting."""
    names = NAMES if chosen is None else [name.strip() for name in chosen.split(",")]
    if unknown := [name for name in names if name not in NAMES]:
        raise click.BadParameter(f"{', '.join(unknown)}: no such case; --list names them", param_hint="--cases")
    cases = [case for case in CASES if case.name in names]
    series = [each for each in SERIES if each.name in names]
    if list_only:
        for name, title in [(case.name, case.title) for case in cases] + [(each.name, each.title) for each in series]:
            click.echo(f"{name:22}{title}")
        return
    sitting = measure(cases, series, runs, cache, lambda found: write_results(output, found, cases, series))
    click.echo(write_results(output, sitting, cases, series))


def measure(
    cases: Sequence[Case], series: Sequence[Series], runs: int, cache: Path, keep: Callable[[Sitting], object]
) -> Sitting:
    """Hold a sitting and show its progress on stderr; `keep` is given what there is after each measurement."""
    order = rounds(experiments_of(cases, series), runs)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    machine, started = describe_machine(), now()

    def sitting(outcomes: list[Outcome]) -> Sitting:
        return Sitting(machine, runs, started, outcomes)

    with Progress(*columns, console=Console(stderr=True)) as progress:
        shown = RichProgress(progress, len(order))
        return sitting(hold_sitting(order, Cache(cache), shown, lambda outcomes: keep(sitting(outcomes))))


def write_results(output: Path, sitting: Sitting, cases: Sequence[Case], series: Sequence[Series]) -> str:
    """Write `results.md`, `results.json` and a plot a series; returns the Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    report = write_report(sitting, cases, series, [ONNXSIM])
    (output / "results.md").write_text(report, encoding="utf-8")
    (output / "results.json").write_text(write_sitting(sitting), encoding="utf-8")
    for each in series:
        if curves := curves_of(each, sitting):
            title = QUANTITIES[each.quantity].title
            plot = line_plot(each.title, each.x_label, title, curves)
            (output / f"{each.name}.svg").write_text(svg_text(plot), "utf-8")
    return report


def curves_of(series: Series, sitting: Sitting) -> list[Curve]:
    """What a series has to draw, in the units in which people read it."""
    unit = QUANTITIES[series.quantity].unit
    curves = []
    for line in series.lines:
        points = points_of(series, line, sitting)
        marks = [Mark(x, spread.median / unit, spread.least / unit, spread.most / unit) for x, spread in points]
        fit = fit_line(points)
        if marks:
            curves.append(Curve(line.label, marks, (fit.slope / unit, fit.offset / unit) if fit else None))
    return curves


if __name__ == "__main__":
    main()
