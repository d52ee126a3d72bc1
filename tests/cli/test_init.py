"""The commented file of a stage: what is in it is what the command takes."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.cli.config_file import read_config
from edgetune.cli.init import STAGES, text_of
from edgetune.config import PrepareConfig, TrainConfig, option_of

each_stage = pytest.mark.parametrize("stage", STAGES)


def init(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["init", *map(str, arguments)])


def settings_of(text: str) -> str:
    """What remains when every setting that has a value is taken out of its comment."""
    return "\n".join(line[1:] for line in text.splitlines() if re.match(r"#[a-z-]+ = .", line))


@each_stage
def test_the_file_changes_nothing_as_it_is(stage: str) -> None:
    assert tomllib.loads(text_of(stage)) == {}


@each_stage
def test_every_option_is_there_with_its_default(stage: str, tmp_path: Path) -> None:
    text, kind = text_of(stage), STAGES[stage]
    names = re.findall(r"(?m)^#([a-z-]+) =", text)
    assert sorted(names) == sorted(each.name.replace("_", "-") for each in fields(kind))
    (tmp_path / "all.toml").write_text(settings_of(text), encoding="utf-8")
    read = {name: setting.value for name, setting in read_config(tmp_path / "all.toml", kind).items()}
    assert kind(**read) == kind()
    assert set(read) == {each.name for each in fields(kind) if each.default is not None}


@each_stage
def test_options_lie_under_the_headings_of_the_help(stage: str) -> None:
    text = text_of(stage)
    headings = re.findall(r"(?m)^# --- (\w+)$", text)
    help_text = CliRunner().invoke(main, [stage, "--help"]).stdout
    shown = [heading.lower() for heading in re.findall(r"(?m)^(\w+) options:$", help_text)]
    assert headings == shown
    for heading, part in zip(headings, text.split("# --- ")[1:], strict=True):
        for name in re.findall(r"(?m)^#([a-z-]+) =", part):
            (of,) = (each for each in fields(STAGES[stage]) if each.name == name.replace("-", "_"))
            assert option_of(of).group == heading


@each_stage
def test_no_line_is_long(stage: str) -> None:
    assert max(map(len, text_of(stage).splitlines())) <= 100


def test_it_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = init("train")
    assert (done.exit_code, (tmp_path / "train.toml").read_text(encoding="utf-8")) == (0, text_of("train"))
    assert done.stdout == (
        "train.toml: take away the # before what you want to change, then "
        "edgetune train BUNDLE --data ROWS --output ADAPTER --config train.toml\n"
    )
    (tmp_path / "train.toml").write_text("batch-size = 2\n")
    again = init("train")
    assert (again.exit_code, "already exists" in again.stderr) == (2, True)
    assert (tmp_path / "train.toml").read_text() == "batch-size = 2\n"
    assert init("train", "--force", "--output", "train.toml").exit_code == 0
    assert (tmp_path / "train.toml").read_text(encoding="utf-8") == text_of("train")
    assert init("export").exit_code == 2


def test_prepare_takes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as well, which flags write name by name."""
    seen: list[PrepareConfig] = []

    def fake(checkpoint: str, output: Path, config: PrepareConfig, **_: object) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("edgetune.preparation.prepare", fake)
    config = tmp_path / "prepare.toml"
    config.write_text('rank = 16\nbase = "int8"\nrank-pattern = { down_proj = 32 }\n[alpha-pattern]\nqkv_proj = 4\n')
    command = ["prepare", str(tmp_path), "--output", str(tmp_path / "bundle"), "--config", str(config), "--rank", "4"]
    CliRunner().invoke(main, command)
    expected = PrepareConfig(rank=4, base="int8", rank_pattern={"down_proj": 32}, alpha_pattern={"qkv_proj": 4.0})
    assert seen == [expected]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("rank-pattern = 3", "expected a table such as { down_proj = 32 }"),
        ("rank-pattern = { down_proj = 1.5 }", "rank-pattern.down_proj is 1.5, expected a whole number"),
        ("rank-pattern = { down_proj = 0 }", "0 is not in the range x>=1"),
    ],
)
def test_a_table_is_held_to_its_bounds(tmp_path: Path, line: str, told: str) -> None:
    config = tmp_path / "prepare.toml"
    config.write_text(f"\n{line}\n")
    done = CliRunner().invoke(main, ["prepare", str(tmp_path), "--output", "x", "--config", str(config)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {config}:2: ") and told in done.stderr


def test_every_option_of_training_has_a_heading() -> None:
    assert [each.name for each in fields(TrainConfig) if option_of(each).group == "other"] == []
