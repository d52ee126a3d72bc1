"""`edgetune devices`: the profiles of boards, phones and computers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.command import Command, Group
from edgetune.cli.options import options_of
from edgetune.cli.output import cell, console, print_json
from edgetune.config import ResultConfig
from edgetune.text.byte_size import bytes_text
from edgetune.text.printable import printable

if TYPE_CHECKING:
    from edgetune.devices.presence import Presence
    from edgetune.devices.profile import Profile

EXAMPLES = """
edgetune devices list
edgetune devices show raspberry-pi-5
edgetune devices check
edgetune devices check ./my-board.toml --json
"""


@click.group(cls=Group, epilog=EXAMPLES)
def command() -> None:
    """List, show and check device profiles: what a device has, and what may run where on it.

    A profile is a TOML file. Those of edgetune have names; everywhere a name is taken, the path of one will do.
    """


@command.command("list", cls=Command)
@options_of(ResultConfig, "printing")
def list_devices(printing: ResultConfig) -> None:
    """List the devices that edgetune knows."""
    from edgetune.devices.profile import load_profiles

    profiles = load_profiles()
    if printing.json:
        print_json([_plain(profile) for profile in profiles])
        return
    from rich.table import Table

    table = Table("name", "class", "processor", "memory", "runtimes", "whole step", "layered", "forward only")
    for each in profiles:
        memory = each.hardware.memory
        places = (each.placement.whole_step, each.placement.layered, each.placement.forward_only)
        table.add_row(
            cell(each.name, "bold"),
            cell(each.kind),
            cell(each.hardware.architecture),
            "" if memory is None else bytes_text(memory.value),
            cell(", ".join(each.runtime.names)),
            *map(cell, places),
        )
    console().print(table)


@command.command("show", cls=Command)
@click.argument("device")
@options_of(ResultConfig, "printing")
def show(device: str, printing: ResultConfig) -> None:
    """Show all that a profile says, with the source of each figure."""
    from edgetune.devices.profile import load_profile

    profile = load_profile(device)
    if printing.json:
        print_json(_plain(profile))
    else:
        _show_table(_plain(profile), "")


@command.command("check", cls=Command)
@click.argument("device", required=False)
@options_of(ResultConfig, "printing")
def check(device: str | None, printing: ResultConfig) -> None:
    """Check profiles: is each right, is this machine that hardware, is its provider here?

    Ends with exit code 0 when the profiles are right, wherever the hardware is.
    """
    from edgetune.devices.presence import check as check_profile
    from edgetune.devices.profile import load_profile, load_profiles

    profiles = load_profiles() if device is None else [load_profile(device)]
    found = [check_profile(profile) for profile in profiles]
    if printing.json:
        print_json([asdict(presence) for presence in found])
        return
    for presence in found:
        _show_presence(presence)


def _show_presence(presence: Presence) -> None:
    mark, colour = ("✓", "green") if presence.here else ("–", "yellow")
    where = "this machine" if presence.here else "not this machine"
    click.echo(f"{click.style(mark, fg=colour)} {printable(f'{presence.name}: {where} ({presence.why})')}")
    if presence.unknown_runtimes:
        _say(f"    runtime {', '.join(presence.unknown_runtimes)}: not in this edgetune")
    if presence.packages_missing:
        _say(f"    missing: {', '.join(presence.packages_missing)}")
    _say(f"    {presence.provider}: {'here' if presence.provider_found else 'not here'}")
    if presence.install is not None:
        _say(f"    to install: {presence.install}")


def _say(text: str, name: str = "", indent: str = "") -> None:
    """A line of what a profile says, with its name in front where it has one."""
    click.echo(indent + (click.style(printable(name), bold=True) if name else "") + printable(text))


def _plain(profile: Profile) -> dict[str, Any]:
    """The profile's fields, as the file names the first of them."""
    plain = asdict(profile)
    return {"class" if key == "kind" else key: value for key, value in plain.items()}


def _show_table(table: dict[str, Any], indent: str) -> None:
    for key, value in table.items():
        name = key.replace("_", "-")
        if value is None or value in ({}, ()):
            continue
        if isinstance(value, dict) and value.keys() & {"value", "text"}:
            figure = value.get("value", value.get("text"))
            text = bytes_text(int(str(figure))) if key in ("memory", "flash", "largest_file") else f"{figure}"
            _say(f": {text}", name, indent)
            _say(f"  {value['source']}", indent=indent)
        elif isinstance(value, dict):
            _say("", name, indent)
            _show_table(value, f"{indent}  ")
        elif name == "notes":
            for note in value:
                _say(note["text"], indent=indent)
                _say(f"  {note['source']}", indent=indent)
        else:
            _say(f": {_text(value)}", name, indent)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(" × ".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)
    return str(value)
