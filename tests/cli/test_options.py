"""Options made from a config dataclass: every type of field, from flags and from a file, and former spellings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner, Result

from edgetune.cli.command import Command
from edgetune.cli.options import options_of
from edgetune.config import Option, option
from edgetune.errors import UsageError


@dataclass(frozen=True)
class Kettle:
    """An option of each type."""

    cups: int = option(2, Option("Cups of water.", least=1, most=9))
    spare: int = option(0, Option("Cups that stay.", least=0))
    heat: float = option(95.0, Option("Degrees.", least=0.5))
    share: float = option(0.5, Option("Share of milk.", least=0, most=1))
    label: str | None = option(None, Option("What it is called."))
    tank: str = option("3MB", Option("Size of its memory.", is_size=True))
    log: Path | None = option(None, Option("Where it writes."))
    mode: Literal["auto", "slow", "fast"] = option(
        "auto", Option("How it boils.", former_values={"quiet": {"noise": "low"}, "cold": {"boil": False, "cups": 1}})
    )
    noise: Literal["low", "high"] = option("high", Option("How loud it is.", former_names=("loudness",)))
    boil: bool = option(True, Option("Boil the water."))
    lid: bool = option(True, Option("Close the lid.", off="lid-open", only="brew", former_names=("cover",)))
    lamp: bool = option(False, Option("Light the lamp."))
    minutes: int | None = option(None, Option("How long.", least=1, excludes=("hours",)))
    hours: float | None = option(None, Option("How long.", least=0.25))
    tea: tuple[Literal["green", "black"], ...] | None = option(None, Option("What is put in."))


@dataclass(frozen=True)
class Voice:
    """A second dataclass of the same command."""

    loud: bool = option(False, Option("Speak up."))


def invoke(arguments: str, name: str | None = None) -> tuple[Result, list[Any]]:
    got: list[Any] = []

    @click.command(cls=Command)
    @click.argument("place")
    @options_of(Kettle, command=name, with_file=True)
    @options_of(Voice, "voice")
    def command(place: str, config: Kettle, voice: Voice) -> None:
        got.extend((place, config, voice))

    return CliRunner().invoke(command, ["kitchen", *arguments.split()]), got


def kettle(arguments: str) -> Kettle:
    result, got = invoke(arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    config = got[1]
    assert isinstance(config, Kettle)
    return config


def refused(arguments: str) -> str:
    """What the command says of a command line that it does not take."""
    result, got = invoke(arguments)
    assert got == []
    if isinstance(result.exception, UsageError):
        return result.stderr + str(result.exception)
    assert result.exit_code == 2
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ("", Kettle()),
        ("--cups 9", Kettle(cups=9)),
        ("--spare 3", Kettle(spare=3)),
        ("--heat 1", Kettle(heat=1.0)),
        ("--share 0 --label tea", Kettle(share=0.0, label="tea")),
        ("--tank 4KiB", Kettle(tank="4KiB")),
        ("--log a/b.txt", Kettle(log=Path("a/b.txt"))),
        ("--mode slow --noise low", Kettle(mode="slow", noise="low")),
        ("--tea black", Kettle(tea=("black",))),
        ("--tea black --tea green --tea black", Kettle(tea=("black", "green"))),
        ("--no-boil --lid-open --lamp", Kettle(boil=False, lid=False, lamp=True)),
        ("--boil --lid", Kettle()),
        ("--minutes 3", Kettle(minutes=3)),
        ("--hours 0.5", Kettle(hours=0.5)),
    ],
)
def test_each_type_of_field_is_read_from_its_flag(arguments: str, config: Kettle) -> None:
    assert kettle(arguments) == config


def test_the_function_gets_one_object_for_each_dataclass_and_its_own_parameters() -> None:
    _, got = invoke("--loud --cups 3")
    assert got == ["kitchen", Kettle(cups=3), Voice(loud=True)]


WRONG = [
    ("cups", "0", "0 is not in the range 1<=x<=9"),
    ("cups", "10", "10 is not in the range 1<=x<=9"),
    ("spare", "-1", "-1 is not in the range x>=0"),
    ("heat", "0.0", "0.0 is not in the range x>=0.5"),
    ("heat", "nan", "nan is not a finite number"),
    ("heat", "inf", "inf is not a finite number"),
    ("share", "1.5", "1.5 is not in the range 0<=x<=1"),
    ("minutes", "0", "0 is not in the range x>=1"),
]


@pytest.mark.parametrize(("name", "value", "reason"), WRONG)
def test_a_flag_and_a_file_are_held_to_the_same_bounds(tmp_path: Path, name: str, value: str, reason: str) -> None:
    assert f"'--{name}': {reason}" in refused(f"--{name}={value}")
    file = tmp_path / "kettle.toml"
    file.write_text(f"\n{name} = {value}\n")
    assert f"{file}:2: {name}: {reason}" in refused(f"--config {file}")


def test_a_size_and_a_choice_are_checked_in_both_places(tmp_path: Path) -> None:
    file = tmp_path / "kettle.toml"
    for text, reason in [("tank = '3 apples'", "'3 apples' is no size"), ("mode = 'loud'", "mode is 'loud', expected")]:
        file.write_text(text)
        assert f"{file}:1: " in refused(f"--config {file}")
        assert reason in refused(f"--config {file}")
    assert "'7' is no size" in refused("--tank 7")
    assert "'loud' is not one of 'auto', 'slow', 'fast'." in refused("--mode loud")


def test_a_flag_overrides_the_file_even_where_it_says_the_default(tmp_path: Path) -> None:
    file = tmp_path / "kettle.toml"
    file.write_text("cups = 5\nboil = false\nlog = 'x'\n")
    assert kettle(f"--config {file}") == Kettle(cups=5, boil=False, log=Path("x"))
    assert kettle(f"--config {file} --cups 2 --boil") == Kettle(log=Path("x"))


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    assert "--minutes and --hours exclude each other; keep one of them" in refused("--minutes 3 --hours 1")
    file = tmp_path / "kettle.toml"
    file.write_text("minutes = 3\n\nhours = 1\n")
    assert f"{file}:3: minutes and hours exclude each other; keep one of them" in refused(f"--config {file}")
    for written, flag, config in [
        ("minutes = 3", "--hours 1", Kettle(hours=1.0)),
        ("hours = 1", "--minutes 3", Kettle(minutes=3)),
    ]:
        file.write_text(written)
        assert kettle(f"--config {file} {flag}") == config


def test_the_help_has_defaults_ranges_and_choices_and_nothing_former() -> None:
    text = " ".join(invoke("--help")[0].output.split())
    for shown in (
        "--cups INTEGER RANGE Cups of water. [default: 2; 1<=x<=9]",
        "--spare INTEGER RANGE Cups that stay. [default: 0; x>=0]",
        "--heat FLOAT RANGE Degrees. [default: 95.0; x>=0.5]",
        "--label TEXT What it is called. --tank",
        "--tank SIZE Size of its memory. [default: 3MB]",
        "--log PATH Where it writes. --mode",
        "--mode [auto|slow|fast] How it boils. [default: auto]",
        "--boil / --no-boil Boil the water. [default: boil]",
        "--lid / --lid-open Close the lid. [default: lid]",
        "--lamp Light the lamp. --minutes",
        "--minutes INTEGER RANGE How long. [x>=1]",
    ):
        assert shown in text
    assert "loudness" not in text
    assert "cover" not in text
    assert "quiet" not in text
    assert "cold" not in text


def test_options_stand_in_the_order_of_the_fields() -> None:
    text = invoke("--help")[0].output
    places = [text.index(f" --{name} ") for name in ("config", "cups", "spare", "heat", "mode", "noise", "boil")]
    assert places == sorted(places)


def test_an_option_of_another_command_is_not_taken() -> None:
    assert invoke("--lid-open", "brew")[0].exit_code == 0
    result, got = invoke("--lid-open", "wash")
    assert (result.exit_code, got) == (2, [])
    assert invoke("--lamp", "wash")[1][1] == Kettle(lamp=True)


FORMER = [
    ("--mode quiet", "`--mode quiet` is written `--noise low` now\n", Kettle(noise="low")),
    ("--mode cold", "`--mode cold` is written `--no-boil --cups 1` now\n", Kettle(boil=False, cups=1)),
    ("--loudness low", "`--loudness low` is written `--noise low` now\n", Kettle(noise="low")),
    ("--no-cover", "`--no-cover` is written `--lid-open` now\n", Kettle(lid=False)),
    ("--noise low --mode quiet", "`--mode quiet` is written `--noise low` now\n", Kettle(noise="low")),
]


@pytest.mark.parametrize(("arguments", "notice", "config"), FORMER)
def test_a_former_spelling_is_taken_and_told(arguments: str, notice: str, config: Kettle) -> None:
    result, got = invoke(arguments)
    assert (result.exit_code, result.stderr, got[1]) == (0, notice, config)


@pytest.mark.parametrize(
    ("text", "notice", "config"),
    [
        ("mode = 'quiet'", '`mode = "quiet"` is written `noise = "low"` now\n', Kettle(noise="low")),
        ("mode = 'cold'", '`mode = "cold"` is written `boil = false cups = 1` now\n', Kettle(boil=False, cups=1)),
        ("loudness = 'low'", '`loudness = "low"` is written `noise = "low"` now\n', Kettle(noise="low")),
    ],
)
def test_a_file_may_have_a_former_spelling_too(tmp_path: Path, text: str, notice: str, config: Kettle) -> None:
    file = tmp_path / "kettle.toml"
    file.write_text(text)
    result, got = invoke(f"--config {file}")
    assert (result.exit_code, result.stderr, got[1]) == (0, f"{file}:1: {notice}", config)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--mode quiet --noise high", "`--noise high` contradicts `--mode quiet`; leave one of them out"),
        ("--mode cold --cups 2", "`--mode cold` contradicts `--cups 2`; leave one of them out"),
        ("--noise low --loudness high", "`--loudness high` contradicts `--noise low`; leave one of them out"),
    ],
)
def test_a_former_spelling_beside_what_contradicts_it_is_refused(arguments: str, reason: str) -> None:
    assert refused(arguments).endswith(reason)


def test_a_contradiction_in_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "kettle.toml"
    file.write_text("cups = 2\n\nmode = 'cold'\n")
    reason = f'{file}:3: `mode = "cold"` contradicts `cups = 2`; leave one of them out'
    assert refused(f"--config {file}").endswith(reason)


def test_flags_override_what_a_former_spelling_in_the_file_means(tmp_path: Path) -> None:
    file = tmp_path / "kettle.toml"
    file.write_text("mode = 'quiet'\n")
    assert kettle(f"--config {file} --noise high") == Kettle(noise="high")
    file.write_text("mode = 'fast'\n")
    # The former choice takes the place of the file's, and leaves the option itself at its default.
    assert kettle(f"--config {file} --mode quiet") == Kettle(mode="auto", noise="low")


@pytest.mark.parametrize(("flag", "config"), [("auto", Kettle()), ("slow", Kettle(mode="slow"))])
def test_a_flag_overrides_a_former_choice_of_the_same_option(tmp_path: Path, flag: str, config: Kettle) -> None:
    file = tmp_path / "kettle.toml"
    file.write_text("mode = 'quiet'\n")
    result, got = invoke(f"--config {file} --mode {flag}")
    assert (result.exit_code, result.stderr, got[1]) == (0, "", config)


def test_a_former_name_is_not_suggested() -> None:
    assert "did you mean '--noise'?" in refused("--noize low")
    assert "'--loudness'" not in refused("--loudnes low")
