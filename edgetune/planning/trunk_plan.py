"""What a run leaves to the trunk of a split bundle."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.config import TrainConfig
from edgetune.data.encode import Example
from edgetune.errors import IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.formats.trunk import read_trunk_info
from edgetune.runtimes.execution import ExecutionPlan
from edgetune.text.byte_size import parse_bytes

_FLOAT = 4


def plan_of_trunk(bundle: Bundle, config: TrainConfig, examples: Sequence[Example]) -> ExecutionPlan | None:
    """What the plan says of the trunk; none where it wants no trunk.

    Args:
        bundle: It was split, if the plan is `split`.
        config: How to train.
        examples: All rows that will come.

    Raises:
        IncompatibleError: The bundle has no trunk, or a row does not fit it.
        VerificationError: The trunk's description is broken.
    """
    if config.plan != "split":
        return None
    info = read_trunk_info(bundle)
    longest = max(len(example.input_ids) for example in examples)
    if longest > info.length:
        raise IncompatibleError(
            f"the longest row has {longest} tokens, the bundle's trunk takes {info.length}; split the bundle again "
            f"with --length {longest} or more, or leave longer rows out"
        )
    tokens = sum(len(example.input_ids) for example in examples)
    states = _FLOAT * tokens * bundle.manifest.architecture.hidden_size
    return ExecutionPlan(
        "layered",
        trunk_layers=info.layers,
        trunk_cache_bytes=min(parse_bytes(config.trunk_cache), states),
        vitisai_config=config.vitisai_config,
    )
