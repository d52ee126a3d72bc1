"""Imports go one way, from room to room: what stands below knows nothing of what stands above."""

from __future__ import annotations

import ast
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import edgetune
from support.imports import imports_in
from support.repository import ROOT

PACKAGE = ROOT / "edgetune"

FLOORS: list[set[str]] = [
    {"errors"},
    {"text", "machine"},
    {"config", "model"},
    {"formats"},
    {"data", "importing", "side_environment"},
    {"host"},
    {"runtimes"},
    {"devices", "generation"},
    {"planning"},
    {
        "preparation", "split", "training", "evaluation", "preview", "exporting", "ship", "jobs", "describe", "doctor",
    },
    {"reporting"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
"""The rooms, and the modules that have none, from the ground up. Those of one floor do not know each other."""
LEAST_MODULES = 30
"""Fewer would mean that the walk below misses some."""
MOST_WITHOUT_A_ROOM = 12

RUFF = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
BANNED = set(RUFF["flake8-tidy-imports"]["banned-api"])
HOST_PATTERNS = [pattern for pattern, rules in RUFF["per-file-ignores"].items() if "TID251" in rules]


def unit_of(module: str) -> str:
    """`edgetune.data.rows` → `data`; `edgetune` → nothing."""
    return module.partition(".")[2].partition(".")[0]


def floor(unit: str) -> int:
    (number,) = (number for number, units in enumerate(FLOORS) if unit in units)
    return number


def wrong_direction(importer: str, imported: str) -> bool:
    """Whether a unit of the package imports one that it must not.

    The package's own `__init__` stands beside `cli`: it offers the verbs to Python. What it has itself is everybody's.
    """
    if importer == imported or not imported:
        return False
    return floor(imported) >= floor(importer or "cli")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_host(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in HOST_PATTERNS)


FILES = sorted(PACKAGE.rglob("*.py"))
KNOWN = {module_name(path) for path in FILES}
IMPORTS = {path: list(imports_in(path.read_text(), path.relative_to(ROOT).as_posix(), KNOWN)) for path in FILES}


def test_every_module_is_looked_at() -> None:
    assert len(FILES) >= LEAST_MODULES
    assert any(len(path.relative_to(PACKAGE).parts) > 1 for path in FILES)


def test_every_room_has_a_floor_and_few_modules_have_no_room() -> None:
    units = {unit_of(name) for name in KNOWN} - {""}
    assert units == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(units), "a room is on two floors"
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_WITHOUT_A_ROOM


def test_imports_go_downwards_and_those_of_one_floor_do_not_know_each_other() -> None:
    wrong = [
        str(entry)
        for path, entries in IMPORTS.items()
        for entry in entries
        if entry.top == "edgetune" and wrong_direction(unit_of(module_name(path)), unit_of(entry.module))
    ]
    assert wrong == []


def test_the_package_itself_takes_nothing_from_what_it_offers() -> None:
    """Rooms import each other by their own names: `from edgetune import train` would lead around the floors."""
    offered = set(edgetune.__all__) - {"__version__"}
    wrong = [
        f"{path.name}:{node.lineno} takes {alias.name} from edgetune"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "edgetune"
        for alias in node.names
        if alias.name in offered
    ]
    assert wrong == []


def shadowed(source: str, package: str, modules: set[str]) -> set[str]:
    """Names that a package's `__init__` binds, and that the import of a module of its own binds anew."""
    bound: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = {alias.asname or alias.name for alias in node.names}
            # The module itself, or what is bound after the module was imported.
            origin = node.module if isinstance(node, ast.ImportFrom) else None
            bound |= {name for name in names if origin not in (package, f"{package}.{name}")}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
    return bound & modules


def test_no_name_of_a_package_is_that_of_a_module_in_it() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:  # which offers verbs by the names of their rooms, each when it is asked for
            modules = {each.stem for each in path.parent.glob("*.py")} | {
                each.name for each in path.parent.iterdir() if (each / "__init__.py").is_file()
            }
            assert shadowed(path.read_text(encoding="utf-8"), module_name(path), modules) == set(), path
    source = "from a import other\nfrom a.b import rows\ndef read(): ..."
    assert shadowed(source, "a", {"rows", "read", "other"}) == {"rows", "read"}


def test_device_code_never_imports_what_a_device_does_not_have() -> None:
    wrong = [
        str(entry)
        for entries in IMPORTS.values()
        for entry in entries
        if entry.top in BANNED and not is_host(entry.file)
    ]
    assert wrong == []


def test_the_host_packages_are_the_banned_ones() -> None:
    assert {"torch", "transformers", "optimum", "olive", "peft", "onnx"} <= BANNED
    assert is_host("edgetune/preparation/graphs/forward.py")
    assert not is_host("edgetune/training/loop.py")


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("cli", "training", False),
        ("training", "cli", True),
        ("training", "evaluation", True),
        ("training", "runtimes", False),
        ("runtimes", "training", True),
        ("runtimes", "data", False),
        ("formats", "runtimes", True),
        ("formats", "model", False),
        ("model", "config", True),
        ("runtimes", "devices", True),
        ("errors", "config", True),
        ("training", "training", False),
        ("errors", "", False),
        ("", "training", False),
        ("", "cli", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, wrong: bool) -> None:
    assert wrong_direction(importer, imported) is wrong


@pytest.mark.parametrize(
    "source",
    [
        "import torch.nn",
        "def f():\n    from torch import nn",
        "from importlib import import_module\nimport_module('torch')",
        "import importlib\nimportlib.import_module('torch.nn')",
        "if TYPE_CHECKING:\n    import torch",
    ],
)
def test_imports_are_found_wherever_they_hide(source: str) -> None:
    assert "torch" in {entry.top for entry in imports_in(source, "example.py", set())}


def test_importing_a_child_of_the_package_names_the_child() -> None:
    found = imports_in("from edgetune.formats import manifest", "example.py", {"edgetune.formats.manifest"})
    assert [entry.module for entry in found] == ["edgetune.formats.manifest"]
