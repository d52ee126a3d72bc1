"""A table that tests fill and pytest prints at the end: a `conftest.py` imports both names."""

from __future__ import annotations

import pytest

_table: list[str] = []
"""Lines that the tests found worth telling."""


@pytest.fixture(scope="session")
def table() -> list[str]:
    """What is appended is printed at the end."""
    return _table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    for line in _table:
        terminalreporter.write_line(line)
