"""Pages for a reader in a hurry: a short README, commands with their output, short decisions, a small glossary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.repository import ROOT

DOCS = ROOT / "docs"
MOST_WORDS = 700
"""Of README.md, as `wc -w` counts them."""
FIRST_LINES = 25
"""Of a page: within them stands what to type, and what comes out."""
MOST_DECISION_LINES = 20
"""Of a decision whose measurements are told in a notebook; empty lines do not count."""
MOST_TERMS = 25
LEAST_PAGES = 12
"""Fewer pages about commands would mean that they are not recognised."""

_COMMAND = re.compile(r"^ *(?:(?:\$ )?(?:edgetune|make)|\$ python) +\S", re.MULTILINE)
_BLOCK = re.compile(r"^```[^\n]*\n(.*?)(?:^```|\Z)|^((?: {4}[^\n]*\n?)+)", re.MULTILINE | re.DOTALL)
_FIGURE = re.compile(r"\d[\d,]*(?:\.\d+)?")
_ROW = re.compile(r"^\| *([^|]+?) *\|(.*)\|$", re.MULTILINE)


def blocks_of(text: str) -> list[str]:
    """Fenced and indented blocks, the last of which may lack its end; lines that a backslash continues are joined."""
    return [re.sub(r"\\\n\s*", "", fenced or indented) for fenced, indented in _BLOCK.findall(text)]


def begins_with_command_and_output(page: str) -> bool:
    """Whether a block near the beginning types something after `$` and shows what comes out."""
    first = "".join(page.splitlines(keepends=True)[:FIRST_LINES])
    for block in blocks_of(first):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        typed = [line.startswith("$ ") for line in lines]
        if any(typed) and not all(typed[typed.index(True) :]):
            return True
    return False


COMMAND_PAGES = [
    page
    for page in sorted(DOCS.glob("*.md"))
    if any(_COMMAND.search(block) for block in blocks_of(page.read_text(encoding="utf-8")))
]


def section(page: Path, heading: str) -> str:
    text = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    assert text, f"no {heading!r} in {page}"
    return text.partition("\n## ")[0]


def rows_of(text: str) -> list[tuple[str, str]]:
    """First cell and rest of every row of the tables, without their heads."""
    rows = [(first, rest) for first, rest in _ROW.findall(text)]
    heads = [number - 1 for number, (first, _) in enumerate(rows) if set(first) <= set("- ")]
    return [row for number, row in enumerate(rows) if number not in heads and number - 1 not in heads]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_the_first_commands_of_the_readme_work_in_a_fresh_clone() -> None:
    first, *_ = blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))
    commands = [line.partition("#")[0].strip() for line in first.splitlines()]
    assert commands == ["make demo", "make test"]


def test_the_readme_installs_from_a_checkout_or_a_wheel() -> None:
    """No package index has edgetune, so that its name alone installs nothing."""
    lines = [line.strip() for block in blocks_of(section(ROOT / "README.md", "Install")) for line in block.splitlines()]
    installs = [line.partition("#")[0].strip() for line in lines if line.startswith("pip")]
    assert installs[:2] == ["pip wheel --no-deps .", "pip install ./edgetune-*.whl"]
    assert all("--find-links" in line for line in installs[2:])


def test_no_page_installs_what_no_index_has() -> None:
    pages = [ROOT / "README.md", DOCS / "flow.svg", *DOCS.glob("*.md")]
    assert [page.name for page in pages if re.search(r"pip install edgetune\b", page.read_text(encoding="utf-8"))] == []


def test_the_readme_has_one_table_of_figures_and_all_are_among_the_figures() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    [table] = [table for table in tables if "tokens/s" in table]
    figures = {figure for _, rest in rows_of(table) for figure in _FIGURE.findall(rest.rpartition("`")[2])}
    assert len(figures) >= 10
    assert figures <= set(_FIGURE.findall((DOCS / "figures.md").read_text(encoding="utf-8")))


def test_pages_about_commands_are_recognised() -> None:
    assert len(COMMAND_PAGES) >= LEAST_PAGES


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_what_to_type_and_what_comes_out(page: Path) -> None:
    assert begins_with_command_and_output(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("# A\n\n```\n$ edgetune doctor\ndevice\n```\n", True),
        ("# A\n\n    $ edgetune doctor\n    device\n", True),
        ("# A\n\n```\n$ edgetune doctor \\\n    --json\n```\n", False),
        ("# A\n\n```\nedgetune doctor\ndevice\n```\n", False),
        ("# A\n\n```\n$ edgetune doctor\n$ edgetune preview b\n```\n", False),
        ("# A\n" + "\n" * FIRST_LINES + "```\n$ edgetune doctor\ndevice\n```\n", False),
    ],
)
def test_what_begins_with_command_and_output(page: str, expected: bool) -> None:
    assert begins_with_command_and_output(page) == expected


@pytest.mark.parametrize("name", ["0017-forward-only.md", "0019-what-bounds-a-step.md"])
def test_a_decision_is_short_and_leads_to_its_notebook(name: str) -> None:
    text = (DOCS / "decisions" / name).read_text(encoding="utf-8")
    assert sum(bool(line.strip()) for line in text.splitlines()) <= MOST_DECISION_LINES
    assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Consequences"))
    assert f"(../../benchmarks/notebooks/{name})" in text
    assert (ROOT / "benchmarks" / "notebooks" / name).is_file()


def test_the_glossary_is_small_and_each_word_has_one_meaning() -> None:
    words = [word for word, _ in rows_of(section(DOCS / "glossary.md", "Words"))]
    retired = [word for word, _ in rows_of(section(DOCS / "glossary.md", "Retired words"))]
    assert 1 <= len(words) <= MOST_TERMS
    assert len({word.casefold() for word in words}) == len(words)
    assert retired
