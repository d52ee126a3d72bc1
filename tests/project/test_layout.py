"""Tests lie where the room is that they test, and take nothing from each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.imports import imports_in
from support.repository import ROOT

OTHERS = {
    "across_rooms": "what several rooms do together, such as a run that is killed and the next one",
    "arm": "under an emulator, with Debian's packages: `make test-arm`",
    "benchmarks": "of `benchmarks/`, which is no part of the package",
    "hosts": "of hosts with several processes, with DeepSpeed: `make test-hosts`",
    "javascript": "of the JavaScript examples, with the scripts that answer them in Node",
    "native": "of the C++ sample, with Debian's packages: `make test-native`",
    "on_device": "where nothing but a device's packages is installed: `make test-device`",
    "project": "of the repository itself: documents, packaging, and rules of the code",
    "support": "what tests share; it holds none",
}
"""Folders that are no room, and what they are for."""


def problems(tests: Path, package: Path) -> Iterator[str]:
    """What is not where it belongs."""
    rooms = {path.name for path in package.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    yield from (f"{name} is a room: it needs no reason" for name in sorted(rooms & OTHERS.keys()))
    for path in sorted(tests.rglob("*")):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        name = path.relative_to(tests).as_posix()
        room = name.split("/")[0] if "/" in name else ""
        if room and room not in rooms | OTHERS.keys():
            yield f"{name}: {room} is no room of {package.name}, and no folder with a reason"
        elif path.suffix == ".py":
            yield from (f"{name} {problem}" for problem in problems_of(path, name, room, package))


def problems_of(path: Path, name: str, room: str, package: Path) -> Iterator[str]:
    """Of one Python file."""
    source = path.read_text(encoding="utf-8")
    for entry in imports_in(source, name, set()):
        if entry.top in ("tests", "conftest") or any(part.startswith("test_") for part in entry.module.split(".")):
            yield f"imports {entry.module}: what tests share is in tests/support"
    holds = any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and node.name.startswith("Test" if isinstance(node, ast.ClassDef) else "test_")
        for node in ast.parse(source).body
    )
    if room == "support" or path.name == "conftest.py":
        if holds or path.name.startswith("test_"):
            yield "holds tests"
    elif not path.name.startswith("test_"):
        yield "is no test file: what tests share is in tests/support"
    elif not holds:
        yield "holds no test"
    elif room not in OTHERS and path.stem.removeprefix("test_") not in modules_of(package, room):
        yield f"has the name of no module of {package.name}/{room}"


def modules_of(package: Path, room: str) -> set[str]:
    """Names of the modules and folders of a room, and its own; without a room, of the modules that have none."""
    if not room:
        return {path.stem for path in package.glob("*.py")}
    folder = package / room
    return {room, *(path.stem for path in folder.rglob("*.py")), *(path.parent.name for path in folder.rglob("*.py"))}


def test_every_test_is_where_its_room_is() -> None:
    assert list(problems(ROOT / "tests", ROOT / "edgetune")) == []


def test_every_reason_is_needed() -> None:
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("*.py")}
    assert OTHERS.keys() <= folders


TEST = "def test_it() -> None: ..."


@pytest.mark.parametrize(
    ("file", "source", "told"),
    [
        ("room/test_thing.py", TEST, None),
        ("room/test_below.py", TEST, None),
        ("room/test_folder.py", TEST, None),
        ("room/test_room.py", "class TestIt: ...", None),
        ("test_verb.py", TEST, None),
        ("project/test_rules.py", TEST, None),
        ("support/maker.py", "from support.thing import make\ndef make_test() -> None: ...", None),
        ("conftest.py", "import support.thing", None),
        ("javascript/answers.js", "", None),
        ("test_thing.py", TEST, "has the name of no module"),
        ("room/test_verb.py", TEST, "has the name of no module"),
        ("room/test_thing.py", "", "holds no test"),
        ("room/helper.py", "", "is no test file"),
        ("rooom/test_thing.py", TEST, "rooom is no room"),
        ("device/expected.json", "", "device is no room"),
        ("support/maker.py", TEST, "holds tests"),
        ("support/maker.py", "class TestIt: ...", "holds tests"),
        ("support/test_maker.py", "", "holds tests"),
        ("conftest.py", TEST, "holds tests"),
        ("room/test_thing.py", f"from test_other import rows\n{TEST}", "imports test_other"),
        ("room/test_thing.py", f"from tests.room.test_other import rows\n{TEST}", "imports tests.room.test_other"),
        ("room/test_thing.py", "def test_it() -> None:\n    import room.test_other", "imports room.test_other"),
        ("support/maker.py", "from importlib import import_module\nimport_module('test_it')", "imports test_it"),
        ("room/test_thing.py", f"from conftest import prepared\n{TEST}", "imports conftest"),
    ],
)
def test_the_rule_itself(tmp_path: Path, file: str, source: str, told: str | None) -> None:
    package, tests = tmp_path / "package", tmp_path / "tests"
    for module in ("verb.py", "room/__init__.py", "room/thing.py", "room/folder/below.py"):
        (package / module).parent.mkdir(parents=True, exist_ok=True)
        (package / module).touch()
    (tests / file).parent.mkdir(parents=True, exist_ok=True)
    (tests / file).write_text(source, encoding="utf-8")
    found = list(problems(tests, package))
    if told is None:
        assert found == []
    else:
        (problem,) = found
        assert problem.startswith(file) and told in problem
