"""Which slots a bundle is to have: the options of `prepare` that say so, parsed and checked together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from edgetune.config import MODULES_OF_TARGETS, PrepareConfig
from edgetune.errors import UsageError
from edgetune.model.architecture import Architecture, slots_of
from edgetune.model.lora import Lora, Slot

PROJECTIONS = MODULES_OF_TARGETS["all-linear"]
"""All that can have slots, in the order in which a layer computes them."""


def lora_of(config: PrepareConfig, slots: Sequence[Slot] = ()) -> Lora:
    """The ranks, the scaling and the projections that a configuration asks for.

    Args:
        config: Patterns that say what holds anyway are left out.
        slots: The slots of the model, where they are known.

    Raises:
        UsageError: A projection that there is not, or a pattern for one that is not trained; names all of them.
    """
    modules = _modules(config.targets)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    if problems := [*_strange("rank-pattern", ranks, modules), *_strange("alpha-pattern", alphas, modules)]:
        raise UsageError("\n".join(problems))
    return Lora(
        config.rank,
        config.alpha,
        modules,
        list(slots),
        rank_stabilised=config.rslora,
        rank_pattern={module: rank for module, rank in ranks.items() if rank != config.rank},
        alpha_pattern={module: float(alpha) for module, alpha in alphas.items() if alpha != config.alpha},
        dora=config.dora,
    )


def check_slots(architecture: Architecture, config: PrepareConfig) -> None:
    """Refuse a rank with which no bundle opens, before the long stages.

    Raises:
        UsageError: It is above the features of the model's widest slot; or as `lora_of` says.
    """
    modules = lora_of(config).target_modules
    lora = lora_of(config, slots_of(architecture, modules))
    ranks = {"--rank": lora.rank, **{f"--rank-pattern {name}=": rank for name, rank in lora.rank_pattern.items()}}
    for flag, rank in ranks.items():
        if rank > lora.highest_rank:
            raise UsageError(
                f"rank {rank} is more than the {lora.highest_rank} features of the model's widest slot; "
                f"give a {flag} of at most {lora.highest_rank}"
            )


def _modules(targets: str) -> list[str]:
    """The projections that `--targets` means, in the order in which a layer computes them."""
    if targets in MODULES_OF_TARGETS:
        return list(MODULES_OF_TARGETS[targets])
    asked = [name.strip() for name in targets.split(",")]
    if unknown := [name for name in asked if name not in PROJECTIONS]:
        words = ", ".join(MODULES_OF_TARGETS)
        raise UsageError(
            f"--targets {targets:.80}: no projection {', '.join(map(repr, unknown)):.80}; give {words}, or some of "
            f"{', '.join(PROJECTIONS)}, with commas between them"
        )
    return [name for name in PROJECTIONS if name in asked]


def _strange(flag: str, pattern: Mapping[str, float], modules: Sequence[str]) -> Iterator[str]:
    for name, value in pattern.items():
        if name in PROJECTIONS and name not in modules:
            yield f"--{flag} {name}={value:g}: {name} has no slots; add it to --targets, or leave the pattern out"
        elif name not in modules:
            yield (
                f"--{flag} {name:.80}={value:g}: expected one of {', '.join(modules)}; all layers share a projection's "
                "graph, so that a pattern cannot say one layer alone"
            )
