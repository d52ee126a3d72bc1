"""Runtimes of which only the abilities are known, and the memory that they say they take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, cast

import pytest

from edgetune.errors import MissingDependencyError
from edgetune.runtimes.contract import Abilities, Runtime
from edgetune.runtimes.footprint import Footprint

FOOTPRINT = Footprint(
    precision="fp32",
    storage_bytes=4,
    base_bytes=10_000_000,
    attention_state_bytes=40.0,
    attention_score_bytes=8.0,
    kept_score_bytes=5.0,
    mlp_state_bytes=20.0,
    hidden_state_bytes=10.0,
    graph_weight_bytes=0.0,
    logit_bytes=12.0,
    together=False,
    apart_share=0.0,
    shapes_held=1,
    shape_bytes=0,
    cache_bytes=0,
    weight_bytes=4.0,
    forward_share=0.5,
    backward_bytes=1_000_000,
    dequantise_products=90.0,
)
INT8 = replace(FOOTPRINT, precision="int8", weight_bytes=2.0)


@dataclass
class FakeRuntime:
    """Has abilities, or is not installed."""

    whole: bool = True
    exact: Footprint | None = FOOTPRINT
    int8: Footprint | None = None
    preferred: bool = True
    installed: bool = True

    def abilities(self) -> Abilities:
        if not self.installed:
            raise MissingDependencyError("it is not installed")
        return Abilities(self.whole, self.exact, self.int8, self.preferred)

    @property
    def RUNTIME(self) -> Runtime:  # noqa: N802, as a module of runtimes has it
        return Runtime(self.abilities, lambda: "fake", cast(Any, None), open_forward=cast(Any, lambda: None))


@contextmanager
def runtimes(**named: FakeRuntime) -> Iterator[None]:
    """Have these, under their names, and no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgetune.runtimes.RUNTIMES", {name: name for name in named})
        patch.setattr("edgetune.runtimes.import_module", lambda name: cast(ModuleType, named[name]))
        yield
