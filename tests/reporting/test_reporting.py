"""A report is written wholly or not at all, in the place of an earlier one and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.errors import DataError, UsageError, VerificationError
from edgetune.reporting import MOST_RUNS, require_place, write_report
from support.written_runs import lines_of_run, write_run


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_run(tmp_path / "adapter", lines_of_run())


def test_a_report_replaces_an_earlier_one(adapter: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", lines_of_run(4))
    output = tmp_path / "report.html"
    write_report([adapter], output)
    first = output.read_bytes()
    written = write_report([adapter, other], output)
    assert (written.path, written.runs, written.bytes) == (output, 2, len(output.read_bytes()))
    assert output.read_bytes() != first
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "other", "report.html"}


def test_the_same_adapters_give_the_same_page(adapter: Path, tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write_report([adapter], tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_what_is_no_report_stays(adapter: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html>mine</html>")
    for output, told in (
        (page, "is there and is no report of edgetune"),
        (adapter / "edgetune.json", "is there and is no report"),
        (adapter, "is a folder; give the name of a file"),
        (tmp_path / "none" / "report.html", "is no folder; make it first"),
        (tmp_path / "half\udcff.html", "not valid Unicode"),
    ):
        with pytest.raises(UsageError, match=told):
            write_report([adapter], output)
        with pytest.raises(UsageError, match=told):
            require_place(output)
    assert page.read_text() == "<html>mine</html>"


def test_what_cannot_be_shown_leaves_no_report(adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    broken = write_run(tmp_path / "broken", b"{}\n")
    answers = tmp_path / "answers.jsonl"
    answers.write_text("{}\n")
    with pytest.raises(VerificationError):
        write_report([adapter, broken], output)
    with pytest.raises(DataError):
        write_report([adapter], output, answers=answers)
    for adapters in ([], [adapter] * (MOST_RUNS + 1)):
        with pytest.raises(UsageError, match=f"{len(adapters)} adapters were given; a report shows 1 to {MOST_RUNS}"):
            write_report(adapters, output)
    assert not output.exists()


def test_every_run_of_a_full_page_has_its_own_colour(adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    write_report([adapter] * MOST_RUNS, output)
    page = output.read_text()
    assert f"--c{MOST_RUNS - 1}:" in page and f"--c{MOST_RUNS}:" not in page
    assert f'class="line s{MOST_RUNS - 1}"' in page
