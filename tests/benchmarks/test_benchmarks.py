"""The benchmark counts, watches, judges and writes what it should; and measures a tiny model from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from matplotlib import rc_context
from matplotlib.container import ErrorbarContainer

from benchmarks.__main__ import NAMES, curves_of, main, write_results
from benchmarks.cache import Cache
from benchmarks.cases import CASES, LIMITS, ONNXSIM, SERIES, SGEMM, Case, Goal, Line, Series
from benchmarks.checkpoints import Size
from benchmarks.commands import measure_job, measure_start_up, text_rows
from benchmarks.edgetune_worker import _B_SPREAD, batch_of, gradients
from benchmarks.experiments import Edgetune, Experiment, GemmLimit, Job, Precision, PyTorch, StartUp, Training, Workload
from benchmarks.flops import step_flops
from benchmarks.machine import Machine
from benchmarks.memory import MemoryWatch, process_tree, read_status
from benchmarks.models import Model
from benchmarks.plots import Curve, Mark, line_plot, svg_text
from benchmarks.precision_worker import measure_precision
from benchmarks.process import ProcessError, run_watched
from benchmarks.pytorch_worker import measure_pytorch_job
from benchmarks.quantities import QUANTITIES
from benchmarks.record import Outcome, Sitting, read_experiment, read_sitting, write_experiment, write_sitting
from benchmarks.report import write_report
from benchmarks.sitting import ONCE, experiments_of, hold_sitting, rounds
from benchmarks.verdicts import fit_line, judge, points_of
from edgetune.formats.bundle import load_bundle
from edgetune.model.lora import initial_parameters
from edgetune.preview import preview
from support.prepared_bundles import CONFIG, Prepared
from support.tiny_phi3 import checkpoint

TINY = Model("tiny", Size(128, 192, 2, 4, 448), rank=CONFIG.rank, alpha=CONFIG.alpha, max_length=CONFIG.max_length)
"""The multi-head variant of `tiny_phi3`."""
WORKLOAD = Workload(TINY, 2, 16)
OURS, OTHER = (Training(Edgetune("onnxruntime", base=base), WORKLOAD, 2) for base in ("fp32", "int4"))
PEER, LEAN_PEER = (Training(PyTorch("fp32", checkpointing), WORKLOAD, 2) for checkpointing in (False, True))
MB = 1 << 20
MACHINE = Machine("Some | CPU", 2, ["avx2"], 8 << 30, "Linux", "3.11", {"edgetune": "0"})


class Listener:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.begun: list[tuple[Experiment, int]] = []
        self.ended = 0
        self.said: list[str] = []

    def begin(self, experiment: Experiment, run: int) -> None:
        self.begun.append((experiment, run))

    def end(self) -> None:
        self.ended += 1

    def say(self, text: str) -> None:
        self.said.append(text)


def sitting(*outcomes: Outcome) -> Sitting:
    return Sitting(MACHINE, 3, "2026-01-01T00:00:00+00:00", list(outcomes))


def outcome(experiment: Experiment, **quantities: float) -> Outcome:
    return Outcome(experiment, [dict(quantities)])


# What is counted


def test_operations_of_a_step_by_hand() -> None:
    model = Model("hand", Size(hidden=4, intermediate=6, layers=2, heads=1, vocabulary=10), rank=2, alpha=2.0)
    # Multiplications of one layer and 3 tokens: (inputs × outputs) of qkv, o, gate-up, down; forward and backward.
    frozen = 3 * 2 * (4 * 12 + 4 * 4 + 4 * 12 + 6 * 4)
    # x·Aᵀ, ·Bᵀ, and for each of them two gradients.
    lora = 3 * 3 * 2 * ((4 + 12) + (4 + 4) + (4 + 12) + (6 + 4))
    # Scores and context, and for each of them two gradients: 3 × 3 positions, 4 numbers each.
    attention = 6 * 3 * 3 * 4
    # The lowest qkv and its A give no gradient downwards.
    lowest = 3 * (4 * 12 + 4 * 2)
    # Two of three positions have a next token; forward and backward.
    head = 2 * 2 * 10 * 4
    assert step_flops(model, rows=1, length=3) == 2 * (2 * (frozen + lora + attention) - lowest + head)
    assert step_flops(model, rows=5, length=3) == 5 * step_flops(model, rows=1, length=3)


def test_operations_of_a_step_are_those_that_pytorch_does() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Phi3ForCausalLM

    base = Phi3ForCausalLM.from_pretrained(checkpoint("multi-head"), attn_implementation="eager", use_cache=False)
    slots = LoraConfig(r=TINY.rank, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    model = get_peft_model(base, slots)
    ids = torch.arange(3, 3 + WORKLOAD.tokens).reshape(WORKLOAD.rows, WORKLOAD.length)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # PyTorch computes logits of all positions, and rotary angles as a product of (dim / 2, 1) and (1, length).
    last_positions = WORKLOAD.rows * 4 * TINY.size.vocabulary * TINY.size.hidden
    angles = 2 * (TINY.size.hidden // TINY.size.heads // 2) * WORKLOAD.length
    counted = counter.get_total_flops() - last_positions - angles
    assert step_flops(TINY, WORKLOAD.rows, WORKLOAD.length) == counted


def test_gradients_are_read_off_a_step(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "fp32")
    generator = np.random.default_rng(1)
    parameters = {
        name: array if "lora_A" in name else (_B_SPREAD * generator.standard_normal(array.shape)).astype(np.float32)
        for name, array in initial_parameters(bundle.manifest.lora, seed=0).items()
    }
    step = ort.InferenceSession(bundle.file("step"), providers=["CPUExecutionProvider"])
    names = [f"{name}.grad" for name in parameters]
    feed = {**batch_of(bundle, WORKLOAD).tensors(), **parameters, "loss_scale": np.ones(1, np.float32)}
    exact = dict(zip(parameters, step.run(names, feed), strict=True))
    found = gradients(Edgetune("onnxruntime", base="fp32"), bundle, WORKLOAD)
    factor = np.linalg.norm(np.concatenate([array.ravel() for array in exact.values()])) / np.linalg.norm(
        np.concatenate([array.ravel() for array in found.values()])
    )
    for name, array in exact.items():
        np.testing.assert_allclose(factor * found[name], array, rtol=1e-3, atol=1e-3 * np.abs(array).max())


def test_a_step_is_held_to_the_exact_one(prepared: Prepared, tmp_path: Path) -> None:
    cache, whole = Cache(tmp_path), Edgetune("onnxruntime", plan="whole")
    folder = cache.bundle_for(whole, TINY)
    folder.parent.mkdir()
    folder.symlink_to(prepared("multi-head", "int4").path)
    exact, rounded = (
        measure_precision(Precision(Edgetune("onnxruntime", plan="keep", precision=precision), whole, TINY), cache)
        for precision in ("auto", "int8")
    )
    assert exact["loss_difference"] < 1e-5
    assert exact["norm_ratio"] == pytest.approx(1, abs=1e-3)
    assert exact["worst_cosine"] > 0.9999 > rounded["mean_cosine"] > rounded["worst_cosine"] > 0.9
    assert rounded["loss_difference"] > 1e-5


def test_each_request_has_a_bundle_of_its_own(tmp_path: Path) -> None:
    stock = Edgetune("onnxruntime")
    requests = [stock, replace(stock, base="fp32"), replace(stock, npu="qdq"), replace(stock, quantiser="nearest")]
    folders = [Cache(tmp_path).bundle_for(each, TINY) for each in [*requests, replace(stock, trunk=True)]]
    assert len(set(folders)) == len(folders)
    assert folders[0] == Cache(tmp_path).bundle(TINY, "int4")


# Memory and processes


def test_memory_is_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text(
        "Name:\tx\nVmHWM:\t  900 kB\nVmRSS:\t 700 kB\nRssAnon:\t 300 kB\nRssFile:\t 350 kB\nRssShmem:\t 50 kB\n"
    )
    status = read_status(7, tmp_path)
    assert status is not None
    assert (status.high_water, status.anonymous, status.file, status.shared) == (
        900 << 10,
        300 << 10,
        350 << 10,
        50 << 10,
    )
    assert read_status(8, tmp_path) is None
    (tmp_path / "7" / "status").write_text("Name:\tzombie\n")
    assert read_status(7, tmp_path) is None


@pytest.mark.parametrize(("own", "child"), [(150, 0), (20, 120)])
def test_memory_of_a_process_and_its_children(own: int, child: int) -> None:
    """bytes of ones are written, so that they are resident."""
    inner = f"import time; block = b'1' * ({child} << 20); time.sleep(0.4)"
    start = f"subprocess.run([sys.executable, '-c', {inner!r}])" if child else "time.sleep(0.4)"
    code = f"import subprocess, sys, time; block = b'1' * ({own} << 20); time.sleep(0.2); {start}"
    memory = run_watched([sys.executable, "-c", code]).memory
    assert (own + child) * MB < memory.resident < (own + child + 60) * MB
    assert max(own, child) * MB < memory.largest < (max(own, child) + 30) * MB
    assert (own + child) * MB < memory.anonymous <= memory.resident
    assert MB < memory.file < 60 * MB


def test_a_process_tree_has_grandchildren() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 10
        while len(process_tree(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        tree = process_tree(process.pid)
        assert tree[0] == process.pid
        assert len(tree) == 2
    finally:
        for pid in process_tree(process.pid)[1:]:
            subprocess.run(["kill", str(pid)], check=True)
        process.wait()
    with MemoryWatch(process.pid) as watch:
        time.sleep(0.05)
    assert watch.peak().resident == 0


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(ProcessError, match=r"^ValueError: no such thing$"):
        run_watched([sys.executable, "-c", "print('first'); raise ValueError('no such thing')"])
    with pytest.raises(ProcessError, match=r"^exit code 3$"):
        run_watched([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ProcessError, match="memory runs out"):
        run_watched([sys.executable, "-c", "import os; print('last words'); os.kill(os.getpid(), 9)"])


def test_a_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(ProcessError, match=r"longer than 0\.3 s"):
        run_watched([sys.executable, "-c", "import time; time.sleep(60)"], time_limit=0.3)


def test_lines_of_a_process_are_heard_when_they_come() -> None:
    heard: list[tuple[str, float]] = []
    code = "import sys, time; print('a', file=sys.stderr, flush=True); time.sleep(0.5); print('out')"
    finished = run_watched([sys.executable, "-c", code], on_error_line=lambda line, now: heard.append((line, now)))
    [(line, seconds)] = heard
    assert line == "a\n"
    assert seconds < finished.seconds - 0.4
    assert finished.stdout == "out\n"


# Tables of what is measured


def test_names_are_unique() -> None:
    assert len(NAMES) == len(set(NAMES)) == len(CASES) + len(SERIES)


def test_every_goal_names_a_quantity() -> None:
    assert {goal.quantity for case in CASES for goal in case.goals} <= QUANTITIES.keys()
    assert {series.quantity for series in SERIES} <= QUANTITIES.keys()


def test_relative_goals_have_something_to_be_held_against() -> None:
    for case in CASES:
        assert bool(case.against) == any(goal.relative for goal in case.goals), case.name


def test_every_experiment_survives_json_and_is_measured_once() -> None:
    experiments = experiments_of(CASES, SERIES)
    assert len(set(experiments)) == len(experiments)
    assert tuple(experiments[: len(LIMITS)]) == LIMITS
    for experiment in experiments:
        assert read_experiment(json.loads(json.dumps(write_experiment(experiment)))) == experiment


def test_contestants_take_turns() -> None:
    start_up = StartUp(Edgetune("onnxruntime"), WORKLOAD)
    once = next(experiment for case in CASES for experiment in case.ours if isinstance(experiment, ONCE))
    elsewhere = replace(OURS, workload=replace(WORKLOAD, rows=3))
    order = rounds([OURS, start_up, once, PEER, elsewhere], runs=2)
    assert order == [
        *((0, OURS), (0, PEER), (1, OURS), (1, PEER)),
        *((0, start_up), (1, start_up)),
        (0, once),
        *((0, elsewhere), (1, elsewhere)),
    ]


# Verdicts


def case(*goals: Goal, ours: tuple[Experiment, ...] = (OURS, OTHER)) -> Case:
    relative = any(goal.relative for goal in goals)
    return Case("name", "title", ours, goals, against=(PEER, LEAN_PEER) if relative else ())


FASTER = Goal("tokens_per_second", "≥", 2.0, relative=True)
LEANER = Goal("peak_rss", "≤", 0.5, relative=True)


def test_the_best_is_held_against_the_best() -> None:
    verdict = judge(
        case(FASTER),
        sitting(
            outcome(OURS, tokens_per_second=90.0),
            outcome(OTHER, tokens_per_second=84.0),
            outcome(PEER, tokens_per_second=30.0),
            outcome(LEAN_PEER, tokens_per_second=40.0),
        ),
    )
    assert (verdict.winner, verdict.rival, verdict.met) == (OURS, LEAN_PEER, True)
    assert verdict.findings[0].value == 2.25


def test_all_goals_have_to_be_met_by_the_same_contestant() -> None:
    found = sitting(
        outcome(OURS, tokens_per_second=100.0, peak_rss=9.0),
        outcome(OTHER, tokens_per_second=21.0, peak_rss=5.0),
        outcome(PEER, tokens_per_second=10.0, peak_rss=10.0),
    )
    verdict = judge(case(FASTER, LEANER), found)
    assert (verdict.winner, verdict.met) == (OTHER, True)
    verdict = judge(case(FASTER, replace(LEANER, bound=0.4)), found)
    assert (verdict.winner, verdict.met) == (OURS, False)


def test_where_every_contestant_has_to_the_worst_counts() -> None:
    every = replace(case(Goal("worst_cosine", "≥", 0.99)), every=True)
    good, bad = outcome(OURS, worst_cosine=0.999), outcome(OTHER, worst_cosine=0.9)
    verdict = judge(every, sitting(good, bad))
    assert (verdict.winner, verdict.met) == (OTHER, False)
    assert judge(every, sitting(good, outcome(OTHER, worst_cosine=0.995))).met
    assert judge(every, sitting(good, Outcome(OTHER, failure="no runtime"))).met is None


def test_an_absolute_goal_needs_no_rival() -> None:
    verdict = judge(case(Goal("peak_rss", "≤", 2.5e9)), sitting(outcome(OURS, peak_rss=2.4e9)))
    assert (verdict.rival, verdict.met) == (None, True)


def test_what_was_not_measured_is_not_judged() -> None:
    verdict = judge(case(FASTER), sitting(outcome(OURS, tokens_per_second=9.0), Outcome(PEER, failure="no torch")))
    assert verdict.met is None
    assert f"{PEER}: no torch" in verdict.reasons


def test_the_median_counts() -> None:
    samples = [{"peak_rss": value} for value in (1.0, 9.0, 2.0)]
    assert judge(case(Goal("peak_rss", "≤", 2.0)), sitting(Outcome(OURS, samples))).met


def some_series(values: dict[float, float]) -> tuple[Series, Sitting]:
    points = [(x, replace(OURS, workload=replace(WORKLOAD, rows=int(x)))) for x in values]
    outcomes = [outcome(experiment, step_seconds=values[x]) for x, experiment in points]
    lines = (Line("a line", tuple(points)),)
    return Series("steps", "Step time", "rows", "step_seconds", lines), sitting(*outcomes)


def test_a_straight_line_is_told_from_a_bent_one() -> None:
    series, found = some_series({x: 3 * x + 1 for x in (1.0, 2.0, 4.0, 8.0)})
    fit = fit_line(points_of(series, series.lines[0], found))
    assert fit is not None
    assert (fit.slope, fit.offset, fit.r_squared) == pytest.approx((3.0, 1.0, 1.0))
    series, found = some_series({x: x**3 for x in (1.0, 2.0, 4.0, 8.0)})
    fit = fit_line(points_of(series, series.lines[0], found))
    assert fit is not None
    assert fit.r_squared < 0.95


# What is written


def written(*outcomes: Outcome, cases: tuple[Case, ...] = (), series: tuple[Series, ...] = ()) -> str:
    return write_report(sitting(*outcomes), cases, series, [replace(ONNXSIM, workload=WORKLOAD)])


def test_the_report_has_every_case_and_says_what_was_not_run() -> None:
    report = written(
        outcome(SGEMM[0], flops_per_second=100e9),
        outcome(OURS, tokens_per_second=60.0, flops_per_second=80e9, peak_rss=2e9),
        Outcome(OTHER, failure="this runtime is missing"),
        outcome(PEER, tokens_per_second=20.0, flops_per_second=30e9, peak_rss=4e9),
        Outcome(LEAN_PEER, failure="no memory"),
        cases=(case(FASTER), replace(case(LEANER, ours=(OTHER,)), name="unknown")),
    )
    assert "| name | title | ≥ 2.00 × tokens/s | 3.00 × tokens/s |" in report
    assert "against PyTorch fp32 | yes |" in report
    assert "| unknown | title | ≤ 0.50 × peak RSS | not measured |  | not measured |" in report
    assert f"| {OTHER} | this runtime is missing |" in report
    assert f"| {LEAN_PEER} | no memory |" in report
    assert "onnxsim" in report
    assert "247.0" in report
    assert [
        line for line in report.splitlines() if line.startswith("| edgetune") and line.endswith("| 3.00 × | 0.80 |")
    ]


def test_tables_keep_their_columns() -> None:
    series, found = some_series({1.0: 1.0, 2.0: 2.0, 3.0: 3.0})
    report = written(*found.outcomes, outcome(PEER, tokens_per_second=1.0), cases=CASES, series=(series,))
    widths = []
    for line in report.splitlines():
        if line.startswith("|"):
            widths.append(line.replace("\\|", "").count("|"))
        elif widths:
            assert len(set(widths)) == 1
            widths = []


def test_a_sitting_survives_json() -> None:
    found = sitting(outcome(OURS, peak_rss=1.5), Outcome(LIMITS[0], failure="why"))
    assert read_sitting(write_sitting(found)) == found


SVG = "{http://www.w3.org/2000/svg}"
TWO = [
    Curve("one & two", [Mark(x, x / 2, x / 4, x) for x in (10.0, 20.0, 40.0)], (0.5, 3.0)),
    Curve("$5 and $6", [Mark(1_500.0, 15.0, 14.0, 15.5)]),
]
"""A curve with its straight line, and one without; the second one's label is no formula."""


def test_a_plot_shows_medians_and_ranges_where_they_are() -> None:
    [axes] = line_plot("title", "x", "y", TWO).axes
    for curve, drawn in zip(TWO, axes.containers, strict=True):
        assert isinstance(drawn, ErrorbarContainer)
        points, _, [bars] = drawn.lines
        np.testing.assert_array_equal(points.get_xydata(), [[mark.x, mark.y] for mark in curve.marks])
        assert points.get_marker() and points.get_linestyle() == "None"
        ranges = [[[mark.x, mark.least], [mark.x, mark.most]] for mark in curve.marks]
        np.testing.assert_allclose(bars.get_segments(), ranges)


def test_a_plot_shows_the_straight_line_over_what_was_measured() -> None:
    [axes] = line_plot("title", "x", "y", TWO).axes
    [fit] = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    np.testing.assert_allclose(fit.get_xydata(), [[10, 8], [40, 23]])
    assert isinstance(axes.containers[0], ErrorbarContainer)
    assert fit.get_color() == axes.containers[0].lines[0].get_color()


def test_a_plot_begins_at_zero_and_is_to_scale() -> None:
    [axes] = line_plot("title", "x", "y", TWO).axes
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    assert axes.get_xlim()[1] > 1_500 and axes.get_ylim()[1] > 40
    (_, zero), (_, middle), (_, end) = axes.transData.transform([(0, 0), (500, 20), (1_000, 40)])
    assert end - middle == pytest.approx(middle - zero)


def test_curves_are_told_apart_without_colours() -> None:
    many = [replace(TWO[0], label=str(number)) for number in range(6)]
    [axes] = line_plot("title", "x", "y", many).axes
    points = [drawn.lines[0] for drawn in axes.containers if isinstance(drawn, ErrorbarContainer)]
    assert len({line.get_marker() for line in points}) == len({str(line.get_color()) for line in points}) == 6


def test_the_legend_names_every_curve_and_covers_none() -> None:
    figure = line_plot("title", "x", "y", TWO)
    [axes], [legend] = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [curve.label for curve in TWO]
    svg_text(figure)  # only now everything has its place
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0


def test_a_plot_is_written_with_its_words_as_they_are() -> None:
    written = svg_text(line_plot("a < b", "so many tokens", "s a step", TWO))
    texts = ["".join(text.itertext()) for text in ElementTree.fromstring(written).iter(f"{SVG}text")]
    assert {"a < b", "so many tokens", "s a step", "one & two", "$5 and $6", "0", "1,000"} <= set(texts)


def test_the_same_figures_give_the_same_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another day, whatever a person's own settings are."""
    written = svg_text(line_plot("title", "x", "y", TWO))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    with rc_context({"svg.hashsalt": "another", "lines.markersize": 20, "font.size": 30, "svg.fonttype": "path"}):
        assert svg_text(line_plot("title", "x", "y", TWO)) == written
    assert svg_text(line_plot("title", "x", "y", TWO[:1])) != written


def test_a_plot_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty: no points"):
        line_plot("empty", "x", "y", [])


def test_results_are_written(tmp_path: Path) -> None:
    series, found = some_series({1.0: 1.0, 2.0: 2.0, 3.0: 3.0})
    report = write_results(tmp_path, found, [case(FASTER)], [series])
    assert {path.name for path in tmp_path.iterdir()} == {"results.md", "results.json", "steps.svg"}
    assert (tmp_path / "results.md").read_text() == report
    assert "](steps.svg)" in report
    [curve] = curves_of(series, found)
    assert curve.fit == pytest.approx((1.0, 0.0), abs=1e-9)
    assert (tmp_path / "steps.svg").read_text() == svg_text(line_plot("Step time", "rows", "s a step", [curve]))


def test_the_command_lists_cases_and_refuses_unknown_ones() -> None:
    listed = CliRunner().invoke(main, ["--list"]).output
    assert [line.split()[0] for line in listed.splitlines()] == NAMES
    refused = CliRunner().invoke(main, ["--cases", "small-best,nonsense"])
    assert refused.exit_code == 2
    assert "nonsense: no such case" in refused.output


# From end to end


def test_rows_of_text_have_the_length_of_the_workload(prepared: Prepared, tmp_path: Path) -> None:
    bundle = prepared("multi-head", "fp32")
    (tmp_path / "rows.jsonl").write_text(text_rows(WORKLOAD, bundle.path))
    lengths = [len(row.input_ids) for row in preview(bundle.path, tmp_path / "rows.jsonl")]
    assert lengths == [WORKLOAD.length] * WORKLOAD.rows


def test_the_first_step_of_a_command_is_noticed(cache: Cache) -> None:
    found = measure_start_up(StartUp(Edgetune("onnxruntime", base="fp32"), WORKLOAD), cache)
    assert 0.1 < found["first_step_after"] <= found["seconds"]
    assert found["peak_rss"] > 20 * MB


def test_the_job_is_the_same_for_both(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"text": " ".join(f"w{(row + word) % 12}" for word in range(5))}) for row in range(160)]
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    train.write_text("\n".join(rows))
    valid.write_text("\n".join(rows[:5]))
    monkeypatch.setattr("benchmarks.rows.real_rows", lambda: (train, valid))
    contestant = Edgetune("onnxruntime", base="fp32")
    ours = measure_job(Job(contestant, TINY, 1e-2), contestant, cache)
    bundle, torch = load_bundle(cache.bundle_for(contestant, TINY)), PyTorch("fp32", checkpointing=False)
    theirs = measure_pytorch_job(Job(torch, TINY, 1e-2), torch, cache.checkpoint(TINY), bundle)
    assert ours["first_validation_loss"] == pytest.approx(theirs["first_validation_loss"], rel=1e-4)
    # First A matrices differ.
    assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=0.2)
    assert ours["validation_loss"] < 0.5 * ours["first_validation_loss"]
    assert min(ours["seconds"], theirs["seconds"]) > 0


@pytest.fixture
def cache(tmp_path: Path, prepared: Prepared) -> Cache:
    """What the tiny model needs is there."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "checkpoint").symlink_to(checkpoint("multi-head"))
    (tmp_path / "tiny" / "fp32").symlink_to(prepared("multi-head", "fp32").path)
    return Cache(tmp_path)


def test_a_sitting_with_a_tiny_model(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests use the cores at the same time: PyTorch's threads shall wait asleep.
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    unknown = replace(OURS, contestant=Edgetune("abacus", base="fp32"))
    order = rounds([GemmLimit("onnxruntime", "int8", 8, 32, 16), OURS, PEER, LEAN_PEER, unknown], runs=1)
    order.append((1, unknown))
    listener = Listener()
    kept: list[int] = []

    def keep(found: list[Outcome]) -> None:
        kept.append(sum(len(outcome.samples) for outcome in found))

    limit, ours, peer, lean, refused = hold_sitting(order, cache, listener, keep)
    # After each measurement; the last one fails, and is not tried again.
    assert kept == [1, 2, 3, 4, 4]
    assert listener.ended == len(order)
    assert [experiment for experiment, _ in listener.begun].count(unknown) == 1
    assert limit.spread("flops_per_second") is not None
    for each in (ours, peer, lean):
        assert not each.failure
        [sample] = each.samples
        assert sample["tokens_per_second"] == pytest.approx(WORKLOAD.tokens / sample["step_seconds"])
        assert 20 * MB < sample["peak_anonymous"] < sample["peak_rss"] < 4096 * MB
    # The same model, slots, rows and optimizer: the same loss.
    assert ours.median("first_loss") == pytest.approx(peer.median("first_loss"), rel=1e-4)
    assert lean.median("first_loss") == pytest.approx(peer.median("first_loss"), rel=1e-5)
    assert "runtime is 'abacus', expected one of auto" in refused.failure
    assert refused.samples == []
