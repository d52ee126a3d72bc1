"""These tests run by `make test-hosts` alone: twenty runs of several processes take minutes."""

from support.printed_table import pytest_terminal_summary, table

__all__ = ["pytest_terminal_summary", "table"]
