"""The list of runs: what stands in it, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.config import RunsConfig, RunsOrder
from edgetune.errors import UsageError
from edgetune.reporting.listing import list_runs
from support.described_folders import make_adapter
from support.written_runs import PROVENANCE, lines_of_run, write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, steps, loss, date in (("a", 20, 4.0, "2026-03-01"), ("b", 10, 6.0, "2026-03-03"), ("c", 30, 5.0, "")):
        provenance = {**PROVENANCE, "finished": f"{date}T00:00:00+00:00" if date else ""}
        write_run(tmp_path / "deep" / name, lines_of_run(steps, loss), provenance)
    make_adapter(tmp_path / "bare")
    write_run(tmp_path / "broken", b"{}\n")
    return tmp_path


ORDERS: list[tuple[RunsOrder, str]] = [
    ("date", "b a bare broken c"),
    ("name", "bare broken a b c"),
    ("steps", "b a c bare broken"),
    ("loss", "a c b bare broken"),
    ("validation", "a c b bare broken"),
    ("time", "b a c bare broken"),
]


@pytest.mark.parametrize(("sort", "names"), ORDERS)
def test_the_newest_or_the_least_comes_first_and_what_is_not_known_last(
    folder: Path, sort: RunsOrder, names: str
) -> None:
    entries = list_runs(folder, RunsConfig(sort))
    assert [entry.path.name for entry in entries] == names.split()


def test_a_line_says_what_the_record_does(folder: Path) -> None:
    lines = lines_of_run(20, 4.0)
    (entry,) = (each for each in list_runs(folder) if each.path.name == "a")
    told = entry.record()
    assert told == {
        "path": "deep/a",
        "problem": None,
        "finished": "2026-03-01T00:00:00+00:00",
        "base": "tiny-phi3",
        "method": "backpropagation",
        "rank": "rank 4, alpha 8",
        "steps": 20,
        "unfinished": False,
        "loss": lines[-1]["loss"],
        "first_validation_loss": 5.0,
        "last_validation_loss": lines[-1]["validation_loss"],
        "best_validation_loss": lines[-1]["validation_loss"],
        "seconds": 5.0,
        "runtime": "onnxruntime",
        "plan": "fp32, weights resident",
        "stopped": None,
    }
    words = entry.words()
    assert words["validation"] == f"5.0000 → {lines[-1]['validation_loss']:.4f}"
    assert (words["date"], words["time"]) == ("2026-03-01 00:00 UTC", "5.0 s")


def test_a_lowest_loss_that_is_not_the_last_is_told(tmp_path: Path) -> None:
    lines = lines_of_run(20, 4.0)
    lines[-1]["validation_loss"] = 9.0
    write_run(tmp_path / "a", lines)
    (entry,) = list_runs(tmp_path / "a")
    assert entry.words()["validation"] == f"5.0000 → 9.0000, lowest {lines[9]['validation_loss']:.4f}"
    assert entry.path == tmp_path / "a", "the folder itself"


def test_what_is_not_known_is_a_dash_and_null(folder: Path) -> None:
    for name, where in (("bare", "–"), ("broken", "cannot be read")):
        (entry,) = (each for each in list_runs(folder) if each.path.name == name)
        assert entry.words()["loss"] == entry.words()["steps"] == entry.words()["validation"] == "–"
        assert entry.words()["runtime, plan"] == where
        assert entry.record()["seconds"] is entry.record()["loss"] is None
        assert bool(entry.record()["problem"]) == (name == "broken")


def test_an_order_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sort is 'size', expected one of date, name"):
        list_runs(tmp_path, RunsConfig("size"))  # type: ignore[arg-type]


def test_a_run_that_left_no_adapter_yet_is_listed(folder: Path) -> None:
    for name in ("later", "a"):
        states = folder / "deep" / f".{name}.run"
        states.mkdir()
        for step in (3, 12):
            (states / f"step-{step:08d}.safetensors").touch()
    (folder / ".empty.run").mkdir()
    found = {entry.path.name: entry for entry in list_runs(folder)}
    assert found.keys() == {"a", "b", "c", "bare", "broken", "later"}
    assert (found["later"].record()["steps"], found["later"].record()["unfinished"]) == (12, True)
    assert found["later"].words()["date"] == "unfinished"
    assert not found["a"].record()["unfinished"], "which is there, and may be trained further"
