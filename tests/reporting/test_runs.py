"""Runs are read from adapters, verified, and from saved states; those below a folder are found."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edgetune.config import TrainConfig
from edgetune.errors import InterruptedRunError, LockedError, UsageError, VerificationError
from edgetune.formats.adapter import MANIFEST, RECORD, WEIGHTS
from edgetune.formats.bundle import load_manifest
from edgetune.formats.manifest import AdapterManifest, BundleManifest
from edgetune.formats.storage import locked
from edgetune.reporting.runs import find_runs, read_run
from edgetune.training import train
from edgetune.training.observer import SilentObserver, StepMetrics
from support.described_folders import make_adapter, make_bundle
from support.golden import ADAPTER, BUNDLE, TRAIN, VALID
from support.written_runs import PROVENANCE, lines_of_run, seal_again, write_run


def test_a_run_says_what_its_adapter_tells(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "adapter", lines_of_run(40)))
    assert (run.name, run.history.steps, run.stopped) == ("adapter", 40, "")
    assert run.options == {
        "method": "backpropagation", "learning_rate": "0.0002", "batch_size": "4", "shuffle": "true", "steps": ""
    }  # fmt: skip
    assert (run.method, run.rank, run.base) == ("backpropagation", "rank 4, alpha 8", "tiny-phi3")
    assert run.finished == datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    assert run.executed["machine"] == PROVENANCE["machine"]
    assert run.executed["its version"] == PROVENANCE["runtime_version"]
    assert run.hashes["base"] == "ab" * 32
    assert {RECORD, WEIGHTS, "bundle", "tokenizer", "chat template"} <= run.hashes.keys()


def test_what_training_writes_is_what_a_run_says(tmp_path: Path) -> None:
    config = TrainConfig(runtime="onnxruntime", steps=3, init_adapter=ADAPTER, batch_size=3, schedule="constant")
    result = train(BUNDLE, TRAIN, tmp_path / "adapter", config, valid=VALID)
    run = read_run(tmp_path / "adapter")
    assert run.history.steps == 3
    assert run.history.last("loss") == result.final_loss
    assert run.history.validation.first == result.first_validation_loss
    assert run.history.validation.last == result.last_validation_loss
    assert 0 < run.history.seconds <= result.seconds
    assert run.options["schedule"] == "constant" and run.options["batch_size"] == "3"
    assert run.executed["runtime"] == "onnxruntime" and run.executed["machine"]
    assert run.hashes["bundle"] == load_manifest(BUNDLE / "manifest.json", BundleManifest).manifest_sha256
    assert run.finished is not None and run.rank == "rank 4, alpha 8"


class Stops(SilentObserver):
    """Interrupts a run after its second step."""

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == 2:
            os.kill(os.getpid(), 2)


def test_a_run_that_was_interrupted_is_read_from_its_state(tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(InterruptedRunError):
        train(BUNDLE, TRAIN, output, TrainConfig(runtime="onnxruntime", steps=9), observer=Stops())
    run = read_run(output)
    assert (run.name, run.history.steps) == ("adapter", 2)
    assert run.stopped == "not finished: 2 of 9 steps are done, --resume goes on from there"
    assert run.options["batch_size"] == "4"
    assert run.executed["runtime"] == "onnxruntime"
    with locked(output), pytest.raises(LockedError):
        read_run(output)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("[1]", {"options": "[1]"}),
        ("{", {"options": "{"}),
        ("[" * 100_000, {"options": "[" * 100_000}),
        ('{"a": {"b": [1, null]}}', {"a": '{"b": [1, null]}'}),
    ],
)
def test_strange_options_are_shown_as_they_are(tmp_path: Path, options: str, told: dict[str, str]) -> None:
    assert read_run(write_run(tmp_path / "a", lines_of_run(2), {**PROVENANCE, "options": options})).options == told


@pytest.mark.parametrize("date", ["", "yesterday", "0001-01-01T00:00:00+14:00", "2026-03-04T05:06:07", "9" * 5000])
def test_a_date_that_is_none_is_not_known(tmp_path: Path, date: str) -> None:
    assert read_run(write_run(tmp_path / "a", lines_of_run(2), {**PROVENANCE, "finished": date})).finished is None


def test_what_has_no_run_is_refused(tmp_path: Path) -> None:
    bare = make_adapter(tmp_path / "bare")
    from_peft = write_run(tmp_path / "peft", lines_of_run(2))
    (from_peft / MANIFEST).unlink()
    for path, told in (
        (tmp_path / "none", "no adapter here"),
        (make_bundle(tmp_path / "bundle"), "no adapter here"),
        (bare, "holds no metrics.jsonl"),
        (from_peft, "PEFT's have none"),
    ):
        with pytest.raises(UsageError, match=told):
            read_run(path)


def test_a_changed_record_or_weight_is_refused(tmp_path: Path) -> None:
    for name in (RECORD, WEIGHTS):
        folder = write_run(tmp_path / name, lines_of_run(2))
        changed = bytearray((folder / name).read_bytes())
        changed[10] ^= 1
        (folder / name).write_bytes(changed)
        with pytest.raises(VerificationError, match="was changed"):
            read_run(folder)


def test_runs_below_a_folder_are_found_and_broken_ones_named(tmp_path: Path) -> None:
    write_run(tmp_path / "b", lines_of_run(2))
    write_run(tmp_path / "deep" / "er" / "a", lines_of_run(3))
    write_run(tmp_path / ".hidden" / "a", lines_of_run(3))
    write_run(tmp_path / "b" / "inside", lines_of_run(3))
    make_adapter(tmp_path / "bare")
    make_bundle(tmp_path / "bundle")
    write_run(tmp_path / "broken", b"{}\n")
    write_run(tmp_path / "linked", lines_of_run(2))
    (tmp_path / "linked" / RECORD).rename(tmp_path / "elsewhere")
    (tmp_path / "linked" / RECORD).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "around").symlink_to(tmp_path, target_is_directory=True)
    newer = write_run(tmp_path / "newer", lines_of_run(2))
    seal_again(newer, load_manifest(newer / MANIFEST, AdapterManifest), format_version=99)
    found = {each.path.relative_to(tmp_path).as_posix(): each for each in find_runs(tmp_path)}
    assert list(found) == ["b", "bare", "broken", "deep/er/a", "linked", "newer"]
    problems = {name: each.problem for name, each in found.items() if each.run is None}
    assert problems.keys() == {"broken", "linked", "newer"}
    assert "step is None" in problems["broken"]
    assert "is a link" in problems["linked"]
    assert "format version 99" in problems["newer"]
    assert [each.run.history.steps for each in found.values() if each.run] == [2, 0, 3]
    with pytest.raises(UsageError, match="no such folder"):
        list(find_runs(tmp_path / "none"))
