"""PEFT's LoraConfig, as `adapter_config.json` has it: what edgetune writes into it, and what another's says.

Written and read without PEFT, which no device has. What changes the result of a saved plain LoRA or DoRA is understood
or refused; what only steered its training is passed over.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from edgetune.config import MODULES_OF_TARGETS
from edgetune.formats.manifest import BaseModel
from edgetune.model.lora import Lora

PROJECTIONS = MODULES_OF_TARGETS["all-linear"]
"""What `prepare --targets` can name, in its order."""
PATTERNS = ("rank_pattern", "alpha_pattern")
"""Fields that give some modules another rank or alpha."""
_COMPARED = ("r", "lora_alpha", "use_rslora", *PATTERNS, "target_modules", "use_dora")
"""Fields that say ranks, what an update is scaled with, and where and of which kind it is."""
_PLAIN_KEY = re.compile(r"\^?[A-Za-z0-9_.]{1,255}")
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; the others (PiSSA, OLoRA, …) rewrite its weights."""
_SILENT_FIELDS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
        "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_core",
        "peft_version", "qalora_group_size", "revision", "task_type",
    }
)  # fmt: skip
"""Fields that do not change what a saved plain LoRA computes, given its tensors."""
_SHOWN = 80
"""Characters of a value that messages show."""


@dataclass(frozen=True)
class Scaling:
    """Ranks of modules, and what their B·A is multiplied with."""

    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scaling of a module, by its path in the checkpoint."""
        rank = _of_pattern(self.rank_pattern, module, self.rank)
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        return rank, Lora(rank, alpha, [], [], self.rank_stabilised).scaling_of(module)


def peft_config(base: BaseModel, lora: Lora, *, all_layers: bool = True) -> dict[str, Any]:
    """What an adapter's configuration says: fields that every PEFT since 0.10 reads; others stay at its defaults."""
    return {
        "alpha_pattern": {module: shortest(alpha) for module, alpha in lora.alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        # None where it goes without saying.
        "layers_to_transform": None if all_layers and not lora.layers()[0] else lora.layers(),
        "lora_alpha": shortest(lora.alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": lora.rank_pattern,
        "revision": None,
        "target_modules": sorted(lora.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": lora.rank_stabilised,
    }


def scaling_of(config: Mapping[str, Any]) -> Scaling | None:
    """Ranks and scaling of a configuration; None where it has no such numbers."""
    rank, alpha, rslora = config.get("r"), config.get("lora_alpha"), config.get("use_rslora") or False
    patterns = {key: config.get(key) or {} for key in PATTERNS}
    are_patterns = all(is_pattern(key, pattern) for key, pattern in patterns.items())
    if not are_patterns or type(rank) is not int or rank < 1 or not is_positive(alpha) or not isinstance(rslora, bool):
        return None
    return Scaling(rank, alpha, rslora, patterns["rank_pattern"], patterns["alpha_pattern"])


def pattern_problems(config: Mapping[str, Any]) -> list[str]:
    """Patterns that are none of plain names."""
    return [
        f"{key} is {short(pattern)}, expected numbers above 0 by the names of modules or the ends of names"
        for key in PATTERNS
        if not is_pattern(key, pattern := config.get(key) or {})
    ]


def foreign_fields(config: Mapping[str, Any]) -> list[str]:
    """What a configuration has beyond LoRA and DoRA of projections, whatever their ranks and scaling."""
    left = {key: value for key, value in config.items() if key not in _SILENT_FIELDS and key not in _COMPARED}
    problems = []
    if (kind := left.pop("peft_type", None)) != "LORA":
        problems.append(f"peft_type is {short(kind)}, expected 'LORA'")
    if (init := left.pop("init_lora_weights", None)) not in _PLAIN_INITS:
        problems.append(
            f"init_lora_weights is {short(init)}, which rewrites the base's weights; convert the adapter "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    if left.get("bias") == "none":
        del left["bias"]
    return problems + [
        f"{key} is {short(value)}; edgetune takes LoRA without it" for key, value in sorted(left.items()) if value
    ]


def prepare_line(asked: Lora) -> str:
    """The command that makes a bundle with such slots.

    Args:
        asked: Ranks, scaling and kind; of its target modules, all can be prepared.
    """
    modules = set(asked.target_modules)
    targets = next((name for name, of in MODULES_OF_TARGETS.items() if modules == set(of)), "")
    patterns: dict[str, Mapping[str, float]] = {
        "rank-pattern": asked.rank_pattern,
        "alpha-pattern": asked.alpha_pattern,
    }
    flags = "".join(
        f" --{key} {module}={shortest(value)}" for key, pattern in patterns.items() for module, value in pattern.items()
    )
    kind = f"{' --rslora' if asked.rank_stabilised else ''}{' --dora' if asked.dora else ''}"
    return (
        f"edgetune prepare CHECKPOINT --rank {asked.rank} --alpha {shortest(asked.alpha)}{kind}{flags} "
        f"--targets {targets or ','.join(name for name in PROJECTIONS if name in modules)} --output BUNDLE"
    )


def is_pattern(key: str, value: object) -> TypeGuard[dict[str, Any]]:
    """Whether it is a pattern of PEFT's whose keys are plain names, as ends of modules' names or whole ones.

    Others are regular expressions, which take as long as whoever wrote them likes.
    """
    fits = (lambda each: type(each) is int and each >= 1) if key == "rank_pattern" else is_positive
    return isinstance(value, dict) and all(_PLAIN_KEY.fullmatch(name) and fits(each) for name, each in value.items())


def is_positive(value: object) -> TypeGuard[float]:
    """Whether it is a number above 0, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def shortest(number: float) -> float:
    """A number as people write it: 16, not 16.0."""
    return int(number) if float(number).is_integer() else number


def short(value: object) -> str:
    """A value of another's, for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _of_pattern(pattern: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """What a pattern says of a module: the first key that is its name or an end of it (`get_pattern_key` of PEFT)."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise
