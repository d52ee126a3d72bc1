"""`edgetune init`: a commented file with every option of a stage, which `--config` takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

import click

from edgetune.cli.command import Command
from edgetune.cli.config_file import KINDS
from edgetune.cli.options import options_of
from edgetune.config import HelpGroup, InitConfig, Option, PrepareConfig, TrainConfig, alternatives, hints_of, option_of
from edgetune.formats.storage import atomic_file
from edgetune.text.printable import printable

EXAMPLES = """
edgetune init train
edgetune init prepare --output small.toml
"""
STAGES: dict[str, type] = {"prepare": PrepareConfig, "train": TrainConfig}
"""The commands that take `--config`, and what their options are fields of."""
_WIDTH = 100
"""Characters of a comment's line."""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("stage", type=click.Choice(list(STAGES)))
@options_of(InitConfig)
def command(stage: str, config: InitConfig) -> None:
    """Write every option of STAGE into a TOML file, each with its default and what it does.

    All of them are comments: what is taken out of its comment is given, and flags override it.
    """
    path = config.output or Path(f"{stage}.toml")
    with atomic_file(path, replace=config.force) as file:
        file.write(text_of(stage).encode("utf-8"))
    click.echo(printable(f"{path}: take away the # before what you want to change, then {_use(stage, path)}"))


def text_of(stage: str) -> str:
    """The file's text."""
    kind = STAGES[stage]
    hints = hints_of(kind)
    parts = [f"# Options of `edgetune {stage}`; take away the # before what you want to change."]
    for group in get_args(HelpGroup):
        found = [each for each in fields(kind) if option_of(each).group == group]
        if found:
            parts.append(f"# --- {group}")
            parts += ["\n".join(_lines(each, hints[each.name])) for each in found]
    return "\n\n".join(parts) + "\n"


def _lines(of: Field[Any], hint: Any) -> Iterator[str]:
    said = option_of(of)
    taken = _taken(hint, said)
    for line in wrap(f"{said.help}{f' ({taken})' if taken else ''}", _WIDTH - 2, break_on_hyphens=False):
        yield f"# {line}"
    value = "" if of.default is None else _toml(of.default)
    yield f"#{of.name.replace('_', '-')} = {value}".rstrip()


def _taken(hint: Any, said: Option) -> str:
    """Which values there are, in a few words; empty where the default says it."""
    if len(kinds := alternatives(hint)) > 1:
        return " or ".join(_taken(kind, said) for kind in reversed(kinds))
    if get_origin(hint) is Literal:
        return ", ".join(json.dumps(choice) for choice in get_args(hint))
    if get_origin(hint) is dict:
        return f"a table such as {{ down_proj = {32 if get_args(hint)[1] is int else 32.0} }}"
    if hint is bool:
        return ""
    least, most = (_bound(bound) for bound in (said.least, said.most))
    bounds = f" from {least} to {most}" if least and most else f", {least} at least" if least else ""
    return f"{'a size in quotes' if said.is_size else KINDS[hint]}{bounds}"


def _bound(bound: float | None) -> str:
    if bound is None:
        return ""
    return f"{bound:g}" if isinstance(bound, float) and not math.isclose(bound, round(bound)) else f"{round(bound):,}"


def _toml(value: object) -> str:
    """A default in TOML; what JSON and TOML write alike is all that occurs."""
    return json.dumps(value)


def _use(stage: str, path: Path) -> str:
    arguments = {"prepare": "CHECKPOINT --output BUNDLE", "train": "BUNDLE --data ROWS --output ADAPTER"}
    return f"edgetune {stage} {arguments[stage]} --config {path}"
