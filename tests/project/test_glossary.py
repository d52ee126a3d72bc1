"""One word, one meaning: docs/glossary.md says which words are retired, and code, help and pages hold to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgetune.cli import VERBS, main
from support.repository import ROOT

GLOSSARY = ROOT / "docs" / "glossary.md"
MOST_WORDS = 25
MODULES = sorted((ROOT / "edgetune").rglob("*.py"))
SAMPLES = sorted(
    path
    for path in (ROOT / "examples").rglob("*")
    if path.suffix in {".js", ".cpp", ".kt", ".swift"} and "node_modules" not in path.parts
)
TEXTS = sorted(
    path
    for pattern in (
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "docs/**/*.md",
        "artifacts/*.md",
        "artifacts/*.schema.json",
        "benchmarks/*.py",
        "edgetune/**/*.py",
        "examples/**/*.[jkmpcs]*",
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and path != GLOSSARY and "node_modules" not in path.parts and path.name != "package-lock.json"
)
"""What people read, but for the glossary itself and the changelog, which tells of what was."""
LEAST_MODULES, LEAST_SAMPLES, LEAST_TEXTS = 150, 20, 250
"""Fewer would mean that the walks miss some."""
_NAMES_IN_NODES = ("id", "name", "attr", "arg", "asname", "module")
"""The fields of syntax nodes that hold what something is called."""


@dataclass(frozen=True)
class Retired:
    """A meaning that a word does not have any more."""

    word: str
    names: tuple[str, ...]
    """What no module, class, function, parameter, attribute or variable is called; `*` stands for any letters."""
    sayings: tuple[str, ...]
    """What no sentence says, in the singular or the plural."""


def table_of(heading: str) -> list[list[str]]:
    """The cells of the rows of the table under a heading of the glossary."""
    section = GLOSSARY.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


def quoted(cell: str) -> tuple[str, ...]:
    """What stands in backticks."""
    return tuple(re.findall("`([^`]+)`", cell))


WORDS = table_of("Words")
RETIRED = [Retired(word, quoted(names), quoted(sayings)) for word, _, _, names, sayings in table_of("Retired words")]


SAYINGS = [saying for entry in RETIRED for saying in entry.sayings]


def names_in(path: Path, source: str) -> set[str]:
    """Every name in a module, with its own; every word in what is not Python."""
    found = {path.stem, path.parent.name}
    if path.suffix != ".py":
        return found | set(re.findall(r"\w+", source))
    for node in ast.walk(ast.parse(source)):
        for field in _NAMES_IN_NODES:
            if isinstance(name := getattr(node, field, None), str):
                found |= set(name.split("."))
    return found


def said(saying: str, text: str) -> bool:
    """Whether a text says something, across line ends and comment signs, in the singular or the plural."""
    words = r"[\s#*/>]+".join(map(re.escape, saying.split()))
    return re.search(rf"(?<![\w-]){words}(?:e?s)?(?![\w-])", text, re.IGNORECASE) is not None


def helps() -> Iterator[tuple[str, str]]:
    for verb in VERBS:
        done = CliRunner().invoke(main, [verb, "--help"])
        assert done.exit_code == 0
        yield verb, done.output


def test_the_glossary_is_short_and_in_order() -> None:
    words = [word for word, *_ in WORDS]
    assert len(words) <= MOST_WORDS
    assert words == sorted(set(words))


@pytest.mark.parametrize(("word", "link"), [(word, link) for word, _, link in WORDS])
def test_a_word_is_used_where_the_glossary_says(word: str, link: str) -> None:
    (page,) = re.findall(r"\]\(([^)#]+)[^)]*\)", link)
    assert said(word, (GLOSSARY.parent / page).read_text(encoding="utf-8"))


def test_the_walks_find_what_there_is() -> None:
    assert len(MODULES) >= LEAST_MODULES and len(SAMPLES) >= LEAST_SAMPLES and len(TEXTS) >= LEAST_TEXTS
    assert {path.suffix for path in SAMPLES} == {".js", ".cpp", ".kt", ".swift"}
    assert {".js", ".kt", ".swift", ".cpp", ".md", ".py", ".json"} <= {path.suffix for path in TEXTS}


def test_every_retired_meaning_can_be_found() -> None:
    assert [entry.word for entry in RETIRED if not entry.names + entry.sayings] == []
    for entry in RETIRED:
        for pattern in entry.names:
            name = re.sub(r"\[(\w).*?\]", r"\1", pattern).replace("*", "x")
            for planted in (f"class {name}: pass", f"def f({name}): pass", f"x.{name} = 1", f"import {name}"):
                assert any(fnmatchcase(found, pattern) for found in names_in(Path("m.py"), planted)), planted
        for saying in entry.sayings:
            wrapped = "\n    # ".join(saying.split())
            assert said(saying, f"# What {wrapped} was.")


def test_no_name_has_a_retired_meaning() -> None:
    patterns = [pattern for entry in RETIRED for pattern in entry.names]
    assert [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (*MODULES, *SAMPLES)
        for name in sorted(names_in(path, path.read_text(encoding="utf-8")))
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ] == []


def test_no_sentence_has_a_retired_meaning() -> None:
    assert [
        f"{path.relative_to(ROOT)}: {saying}"
        for path in TEXTS
        for saying in SAYINGS
        if said(saying, path.read_text(encoding="utf-8"))
    ] == []


def test_no_help_has_a_retired_meaning() -> None:
    assert [(verb, saying) for verb, text in helps() for saying in SAYINGS if said(saying, text)] == []
