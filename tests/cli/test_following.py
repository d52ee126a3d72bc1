"""`edgetune train --report`: a report at the end, and of what was done where a run stops."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.reporting.runs import read_run
from support.bigram_runtime import BigramSession
from support.golden import BUNDLE, TRAIN, VALID
from support.repository import ROOT
from support.tiny_bundle import make_bundle, some_rows, write_rows
from support.written_runs import lines_of_run, write_run


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def training(output: Path, *more: str | Path) -> list[str | Path]:
    command = ["train", BUNDLE, "--data", TRAIN, "--output", output, "--runtime", "onnxruntime", "--steps", "3"]
    return [*command, *more]


def test_a_run_leaves_its_report(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = run(*training(tmp_path / "adapter", "--valid", VALID, "--report", report))
    assert done.exit_code == 0, done.stderr
    assert re.search(rf"^{re.escape(str(report))}: the run's report, [\d.]+ kB$", done.stderr, re.MULTILINE)
    assert "adapter, validation" in report.read_text()
    again = run("report", tmp_path / "adapter", "--output", tmp_path / "again.html")
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_a_report_may_lie_in_the_adapter(tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    done = run(*training(output, "--report", output / "report.html", "--quiet", "--json"))
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["steps"] == 3
    assert run("inspect", output).exit_code == 0
    assert (output / "report.html").is_file()


def test_an_interrupted_run_leaves_a_report_of_what_it_did(tmp_path: Path) -> None:
    output, report = tmp_path / "adapter", tmp_path / "report.html"
    command = [sys.executable, "-m", "edgetune", *map(str, training(output, "--report", report, "--steps", "100000"))]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith("step 1/"))
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 130
    assert f"{report}: the run's report" in said
    assert said.splitlines()[-1].startswith("error: interrupted by SIGINT after step ")
    page = report.read_text()
    assert re.search(r"not finished: [\d,]+ of 100000 steps are done, --resume goes on from there", page)
    assert page.count('class="line s0"') > 4


def test_a_paused_run_whose_report_cannot_be_written_still_says_that_it_paused(tmp_path: Path) -> None:
    pause = tmp_path / "pause"
    pause.touch()
    output = tmp_path / "adapter"
    done = run(*training(output, "--pause-file", pause, "--save-steps", "0", "--report", tmp_path / "report.html"))
    assert done.exit_code == 75
    lines = done.stderr.splitlines()
    assert lines[-2].startswith(f"no report is written: {output}: no adapter here")
    assert lines[-1].startswith("error: ")


def test_a_run_that_stops_at_a_loss_that_is_not_finite_leaves_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.runtimes.RUNTIMES", {"onnxruntime": "support.bigram_runtime"})
    monkeypatch.setattr(BigramSession, "break_at", 3)
    bundle = make_bundle(tmp_path / "bundle")
    data = write_rows(tmp_path / "train.jsonl", some_rows(10))
    report = tmp_path / "report.html"
    done = run("train", bundle.path, "--data", data, "--output", tmp_path / "adapter", "--report", report)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("error: the loss of step 3 is not finite")
    assert '<p class="stopped"><strong>adapter</strong>: the loss of step 3 is not finite' in report.read_text()


def test_a_run_that_goes_on_has_all_its_steps_in_the_report(tmp_path: Path) -> None:
    output, report = tmp_path / "adapter", tmp_path / "report.html"
    more = ["--report", report, "--save-steps", "1"]
    pause = tmp_path / "pause"
    pause.touch()
    assert run(*training(output, *more, "--pause-file", pause)).exit_code == 75
    before = read_run(output).history
    assert before.steps == 1 and report.is_file()
    assert run(*training(output, *more, "--resume")).exit_code == 0
    after = read_run(output).history
    assert [point.x for point in after.curves["loss"].points] == [1, 2, 3]
    assert after.by_time.points[0] == before.by_time.points[0]
    assert after.by_time.points[1].x > before.seconds
    assert "not finished" not in report.read_text()


def test_a_run_that_does_not_begin_leaves_the_report_of_before(tmp_path: Path) -> None:
    output = write_run(tmp_path / "adapter", lines_of_run(4))
    report = tmp_path / "report.html"
    done = run(*training(output, "--report", report))
    assert done.exit_code == 2 and "already exists" in done.stderr
    assert not report.exists()


def test_a_place_that_takes_no_report_is_refused_before_the_run(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    for report, told in ((page, "is no report of edgetune"), (tmp_path / "none" / "r.html", "is no folder")):
        done = run(*training(tmp_path / "adapter", "--report", report))
        assert done.exit_code == 2 and told in done.stderr
        assert "step 1" not in done.stderr
    assert not (tmp_path / "adapter").exists()


def test_report_and_runs_on_the_command_line(tmp_path: Path) -> None:
    first = write_run(tmp_path / "runs" / "first", lines_of_run(4))
    write_run(tmp_path / "runs" / "second", lines_of_run(8))
    write_run(tmp_path / "runs" / "broken", b"{}\n")
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "Which valve?", "before": "?", "after": "Valve 3."}\n')
    report = tmp_path / "report.html"
    done = run("report", first, tmp_path / "runs" / "second", "--output", report, "--answers", answers)
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.fullmatch(r"\S+report\.html: 2 runs, [\d.]+ kB\n", done.stdout)
    assert "Valve 3." in report.read_text()
    told = json.loads(run("report", first, "--output", report, "--json").stdout)
    assert told == {"path": str(report), "bytes": len(report.read_bytes()), "runs": 1}

    listed = run("runs", tmp_path / "runs", "--sort", "steps")
    assert listed.exit_code == 0
    assert listed.stdout.index("first") < listed.stdout.index("second") < listed.stdout.index("broken")
    assert "broken: " in listed.stderr and "step is None" in listed.stderr
    entries = json.loads(run("runs", tmp_path / "runs", "--json", "--sort", "steps").stdout)
    assert [(entry["path"], entry["steps"]) for entry in entries] == [("first", 4), ("second", 8), ("broken", None)]
    (tmp_path / "nothing").mkdir()
    nothing = run("runs", tmp_path / "nothing")
    assert (nothing.exit_code, nothing.stdout, nothing.stderr) == (0, "", "no adapters here\n")
    assert json.loads(run("runs", tmp_path / "nothing", "--json").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["report", "none", "--output", "r.html"], "none: no adapter here"),
        (["report", "--output", "r.html"], "Missing argument"),
        (["report", "a", "--output", "r.html", "--answers", "none.jsonl"], "--answers none.jsonl: no such file"),
        (["runs", "none"], "none: no such folder"),
    ],
)
def test_what_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2 and told in done.stderr
    assert list(tmp_path.iterdir()) == []
