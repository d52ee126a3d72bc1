"""These tests run by `make test-arm` alone: making the board takes a minute and the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.board import Board, NoBoardError

_table: list[str] = []
"""Lines that the tests found worth telling."""


@pytest.fixture(scope="session")
def board() -> Board:
    """The emulated board."""
    board = Board(Path(__file__).parents[2] / ".venv-arm64")
    try:
        board.make()
    except NoBoardError as error:
        pytest.skip(f"no emulated Arm board here: {error}")
    return board


@pytest.fixture(scope="session")
def table() -> list[str]:
    """What is appended is printed at the end."""
    return _table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    for line in _table:
        terminalreporter.write_line(line)
