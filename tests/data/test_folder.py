"""A folder named as the data gives its `train`, `valid` and `test`, on the command line and from Python."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.config import TrainConfig
from edgetune.data.folder import Split, rows_file, training_files
from edgetune.data.source import STDIN
from edgetune.errors import UsageError
from edgetune.evaluation import evaluate
from edgetune.training import train
from support.golden import BUNDLE, TRAIN, VALID
from support.recorder import Recorder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "rows"
    made.mkdir()
    shutil.copy(TRAIN, made / "train.jsonl")
    (made / "valid.jsonl.gz").write_bytes(gzip.compress(VALID.read_bytes()))
    return made


def test_the_folder_is_measured_on_its_valid_rows(folder: Path, tmp_path: Path) -> None:
    config, listener = TrainConfig("onnxruntime", steps=1), Recorder()
    found = train(BUNDLE, folder, tmp_path / "a", config, observer=listener)
    named = train(BUNDLE, TRAIN, tmp_path / "b", config, valid=VALID)
    assert found.last_validation_loss == named.last_validation_loss is not None
    assert f"{folder / 'valid.jsonl.gz'} is measured on, as --valid would name it" in listener.notices
    first = TRAIN.read_text().splitlines(keepends=True)[:2]
    (tmp_path / "other.jsonl").write_text("".join(first))
    other = train(BUNDLE, folder, tmp_path / "c", config, valid=tmp_path / "other.jsonl")
    assert other.last_validation_loss != found.last_validation_loss


def test_every_command_that_reads_rows_takes_the_folder(folder: Path, tmp_path: Path) -> None:
    shown = run("preview", BUNDLE, "--data", folder, "--json")
    assert len(shown.stdout.splitlines()) == len(TRAIN.read_text().splitlines())
    shutil.copy(TRAIN, folder / "test.jsonl")
    measured = run("eval", BUNDLE, "--data", folder, "--json", "--quiet")
    assert json.loads(measured.stdout)["rows"] == evaluate(BUNDLE, TRAIN).rows, "test, not valid"
    trained = run("train", BUNDLE, "--data", folder, "--output", tmp_path / "a", "--steps", "1", "--json")
    assert json.loads(trained.stdout)["last_validation_loss"] is not None
    planned = run("plan", BUNDLE, "--data", folder, "--steps", "1", "--json")
    assert planned.exit_code == 0


@pytest.mark.parametrize("splits", [("train",), ("test", "valid")])
def test_a_folder_without_such_rows_is_named_with_what_it_lacks(tmp_path: Path, splits: tuple[Split, ...]) -> None:
    expected = " or ".join(f"{split}.jsonl" for split in splits)
    with pytest.raises(UsageError, match=rf"--data .* is a folder; expected a JSONL file, .* folder with {expected}"):
        rows_file(tmp_path, *splits, option="--data")


def test_a_file_or_a_pipe_is_what_it_is(tmp_path: Path) -> None:
    assert training_files(STDIN, None) == (STDIN, None)
    assert training_files(tmp_path / "absent", tmp_path / "other") == (tmp_path / "absent", tmp_path / "other")
