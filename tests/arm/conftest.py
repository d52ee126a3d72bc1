"""These tests run by `make test-arm` alone: making the board takes a minute and the network."""

from __future__ import annotations

import pytest

from support.arm_board import Board, NoBoardError
from support.printed_table import pytest_terminal_summary, table
from support.repository import ROOT

__all__ = ["board", "pytest_terminal_summary", "table"]


@pytest.fixture(scope="session")
def board() -> Board:
    """The emulated board."""
    board = Board(ROOT / ".venv-arm64")
    try:
        board.make()
    except NoBoardError as error:
        pytest.skip(f"no emulated Arm board here: {error}")
    return board
