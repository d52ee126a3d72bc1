"""These tests run by `make test-arm` alone: making the board takes a minute and the network."""

from __future__ import annotations

import pytest

from support.arm_board import Board, NoBoardError
from support.repository import ROOT

_table: list[str] = []
"""Lines that the tests found worth telling."""


@pytest.fixture(scope="session")
def board() -> Board:
    """The emulated board."""
    board = Board(ROOT / ".venv-arm64")
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
