"""The table of runtimes, and that each is what its abilities say."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from edgetune.config import RuntimeName
from edgetune.errors import MissingDependencyError
from edgetune.runtimes import RUNTIMES, find_runtime
from edgetune.runtimes.contract import ForwardRuntime, Runtime


def functions(of: object) -> dict[str, list[str]]:
    """Public functions and the names of their parameters."""
    found = inspect.getmembers(of, lambda member: inspect.isfunction(member) or inspect.ismethod(member))
    return {
        name: [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
        for name, function in found
        if not name.startswith("_")
    }


def test_the_table_has_the_names_that_can_be_asked_for() -> None:
    assert set(get_args(RuntimeName)) - {"auto"} == RUNTIMES.keys()


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_has_what_its_protocol_asks_for(name: RuntimeName) -> None:
    runtime = find_runtime(name)
    assert functions(Runtime).keys() == {"abilities", "version", "open_session"}
    assert functions(Runtime).items() <= functions(runtime).items()
    try:
        forward = runtime.abilities().forward
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert (functions(ForwardRuntime).items() <= functions(runtime).items()) == forward
