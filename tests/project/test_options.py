"""An option is written down once: in its field, which says all of it, and in no module of the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin

import pytest

from edgetune import config as module
from edgetune.cli import VERBS
from edgetune.cli.values import fields_of, type_of
from edgetune.config import Option, alternatives, hints_of, option_of
from support.repository import ROOT

COMMAND_LINE = sorted((ROOT / "edgetune" / "cli").rglob("*.py"))
MOST_PARAMETERS = 12
CONFIGS: dict[str, type] = {
    name: kind
    for name, kind in vars(module).items()
    if isinstance(kind, type) and is_dataclass(kind) and kind is not Option
}
FIELDS = [(kind, each.name) for kind in CONFIGS.values() for each in fields(kind)]
MESSAGES = ("row_sources", "input_file")
"""Functions that are told the name of an option for what they say of its value."""
READ_BEFORE_CLICK = {"__init__.py": {"--json"}}
"""A command line that click cannot read has to be answered as JSON, too."""


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parameters_of(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [each.arg for each in (*named, arguments.vararg, arguments.kwarg) if each is not None]


def configs_taken(tree: ast.Module) -> list[type]:
    """The dataclasses whose options the commands of a module have."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "options_of"]
    return [CONFIGS[ast.unparse(call.args[0])] for call in calls]


def written_again(source: str, file: str) -> Iterator[str]:
    """Each option that a module of the command line names, as a parameter or a flag, though its dataclass does."""
    tree = ast.parse(source)
    own = {each.name for kind in configs_taken(tree) for each in fields(kind)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield from (f"{file}: parameter {name} of {node.name}" for name in parameters_of(node) if name in own)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CONFIGS and node.keywords:
            yield f"{file}: {ast.unparse(node)}"
    in_messages = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in MESSAGES
        for inner in ast.walk(node)
    }
    # A module without commands of its own names none at all.
    flags = {flag(name) for name in (own or {name for _, name in FIELDS})} - READ_BEFORE_CLICK.get(file, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in flags and id(node) not in in_messages:
            yield f"{file}: {node.value}"


def test_all_configs_and_modules_are_seen() -> None:
    assert {"PrepareConfig", "TrainConfig", "ExportConfig", "GenerateConfig", "EvaluateConfig"} <= CONFIGS.keys()
    assert len(FIELDS) >= 70
    assert len(COMMAND_LINE) >= 20
    taken = {kind for path in COMMAND_LINE for kind in configs_taken(ast.parse(path.read_text()))}
    assert {base for kind in taken for base in kind.__mro__ if is_dataclass(base)} == set(CONFIGS.values())


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_field_says_all_that_its_option_needs(kind: type, name: str) -> None:
    each, hint = fields_of(kind)[name], hints_of(kind)[name]
    said = option_of(each)
    assert re.fullmatch(r"\S.*\.", said.help), "one sentence"
    # Of a field that has a value for each of some names, the values are bounded.
    if {int, float} & set(alternatives(hint)) or get_origin(hint) is dict:
        assert said.least is not None, "a number has a lower bound"
    else:
        assert (said.least, said.most) == (None, None)
    assert not said.is_size or hint is str
    assert said.off is None or each.default is True
    assert said.only is None or said.only in VERBS
    if each.default is not None:
        assert type_of(hint, said).convert(each.default, None, None) == each.default
    others = {other for former in said.former_values.values() for other in former}
    needed = set() if said.needs is None else {said.needs}
    assert {*said.excludes, *others, *needed} <= {other.name for other in fields(kind)} - {name}
    assert said.former_values.keys().isdisjoint(get_args(hint))
    assert set(said.former_names).isdisjoint(other.name for other in fields(kind))


@pytest.mark.parametrize("kind", CONFIGS.values(), ids=lambda kind: kind.__name__)
def test_every_option_stands_in_the_documentation(kind: type) -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    missing = [flag(each.name) for each in fields(kind) if not re.search(rf"{flag(each.name)}(?![\w-])", pages)]
    assert missing == []


@pytest.mark.parametrize("path", COMMAND_LINE, ids=lambda path: path.name)
def test_no_function_of_the_command_line_has_many_parameters(path: Path) -> None:
    found = {
        node.name: len(parameters_of(node))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: count for name, count in found.items() if count > MOST_PARAMETERS} == {}


@pytest.mark.parametrize("path", COMMAND_LINE, ids=lambda path: path.name)
def test_no_option_is_written_again_in_the_command_line(path: Path) -> None:
    assert list(written_again(path.read_text(), path.name)) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("options_of(TrainConfig)\ndef command(queries: int): ...", ["x.py: parameter queries of command"]),
        ("options_of(TrainConfig)\ndef command(*, queries: int): ...", ["x.py: parameter queries of command"]),
        ("options_of(TrainConfig)\nclick.option('--queries')", ["x.py: --queries"]),
        ("click.option('--queries')", ["x.py: --queries"]),
        ("TrainConfig(queries=queries)", ["x.py: TrainConfig(queries=queries)"]),
        ("options_of(EvaluateConfig)\nclick.option('--adapter')", []),
        ("options_of(PrepareConfig)\nrow_sources({'--calibration': config.calibration})", []),
        ("options_of(TrainConfig)\nf'--queries {count} are too few'", []),
    ],
)
def test_what_is_written_again_is_found(source: str, found: list[str]) -> None:
    assert list(written_again(source, "x.py")) == found
