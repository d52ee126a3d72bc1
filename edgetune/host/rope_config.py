"""The rotary embedding that a checkpoint's `config.json` describes, in the layouts of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from edgetune.errors import IncompatibleError
from edgetune.model.rope import Rope

_LONGROPE = ("longrope", "su", "yarn")
"""What Phi-3's configs call longrope; the last two are older names, and transformers reads them so as well."""
_SECTIONS = ("rope_scaling", "rope_parameters")
"""The objects that describe the embedding: transformers 4 writes the first, transformers 5 the second."""
_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""What transformers 4 writes beside its object, and transformers 5 into its own."""
_OF_LONGROPE = ("short_factor", "long_factor", "factor", "attention_factor")
_LARGEST = 1e30
"""Far above any number that means something, far below what overflows when such numbers are multiplied."""


def with_older_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The same `config.json` with its rotary embedding in the keys of transformers 4, whichever layout it came in.

    The model builders and exporters read these alone, and would take `rope_parameters` for no description at all.

    Args:
        config: The parsed file; absent keys have `Phi3Config`'s defaults.

    Returns:
        A copy without `rope_parameters`. `rope_scaling` is null, or an object of exactly `type` (`longrope`),
        `short_factor` and `long_factor`; `rope_theta`, `partial_rotary_factor` and `original_max_position_embeddings`
        are numbers.

    Raises:
        IncompatibleError: Another kind of rotary embedding, two statements that contradict each other, or values that
            do not fit together.
    """
    stated = _statements(config)
    theta = float(_number(stated, "rope_theta", 10000.0))
    partial = _number(stated, "partial_rotary_factor", 1.0)
    original = int(_number(stated, "original_max_position_embeddings", 4096))
    dim = _rotated(config, partial)
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    older |= {"rope_theta": theta, "partial_rotary_factor": partial, "original_max_position_embeddings": original}
    if stated.get("rope_type") is None:
        return older | {"rope_scaling": None}
    if original < 2:
        raise IncompatibleError(
            f"config.json: original_max_position_embeddings is {original}, expected at least 2 with longrope"
        )
    stretch = _number(config, "max_position_embeddings", 4096) / original
    attention = _attention_factor(stretch, original)
    for key, expected in (("factor", max(stretch, 1.0)), ("attention_factor", attention)):
        if not math.isclose(_number(stated, key, expected), expected, rel_tol=1e-6):
            raise IncompatibleError(
                f"config.json: longrope's {key} is {stated[key]:g}, but ONNX Runtime GenAI takes the {expected:g} that "
                "follows from max_position_embeddings and original_max_position_embeddings; no other works"
            )
    factors = {key: _factors(stated, key, dim // 2) for key in ("short_factor", "long_factor")}
    return older | {"rope_scaling": {"type": "longrope", **factors}}


def rope_from_config(config: dict[str, Any]) -> Rope:
    """The rotary embedding that a Hugging Face `config.json` of a Phi-3 model describes, in either layout.

    Args:
        config: The parsed file; absent keys have `Phi3Config`'s defaults.

    Raises:
        IncompatibleError: As `with_older_rope_keys`.
    """
    older = with_older_rope_keys(config)
    dim, theta = _rotated(older, older["partial_rotary_factor"]), older["rope_theta"]
    original, scaling = older["original_max_position_embeddings"], older["rope_scaling"]
    if scaling is None:
        return Rope(dim, theta, 1.0, None, None, original)
    # Phi-3 states the stretch by the two lengths.
    attention = _attention_factor(_number(older, "max_position_embeddings", 4096) / original, original)
    return Rope(dim, theta, attention, scaling["short_factor"], scaling["long_factor"], original)


def _statements(config: dict[str, Any]) -> dict[str, Any]:
    """What the file says of its rotary embedding, each thing once; `rope_type` is `longrope` or absent."""
    found: dict[str, tuple[str, Any]] = {}
    for place, key, value in _said(config):
        where, before = found.setdefault(key, (place, value))
        if before != value:
            raise IncompatibleError(
                f"config.json contradicts itself: {where} is {before!r:.60}, {place} is {value!r:.60}; "
                "remove the one that the model was not trained with"
            )
    stated = {key: value for key, (_, value) in found.items()}
    if stated.get("rope_type") is None and (extra := [key for key in _OF_LONGROPE if key in stated]):
        place, _ = found[extra[0]]
        raise IncompatibleError(f"config.json: {place} belongs to longrope, and no rope_type says that it is longrope")
    return stated


def _said(config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every statement: where it stands, what it is about, and what it says."""
    for key in _BESIDE:
        if config.get(key) is not None:
            yield key, key, config[key]
    for section in _SECTIONS:
        described = config.get(section)
        if described is None:
            continue
        if not isinstance(described, dict):
            raise IncompatibleError(f"config.json: {section} must be an object or null, found {described!r:.60}")
        stated = {key: value for key, value in described.items() if value is not None}
        for key in ("rope_type", "type"):
            if (kind := stated.pop(key, None)) is not None and (name := _kind(section, kind, stated)) is not None:
                yield f"{section}.{key}", "rope_type", name
        for key, value in stated.items():
            if key not in (*_BESIDE, *_OF_LONGROPE):
                raise IncompatibleError(f"config.json: {section} has {key!r:.40}, which is not supported")
            yield f"{section}.{key}", key, value


def _kind(section: str, name: object, stated: dict[str, Any]) -> str | None:
    """`longrope` under any of its names, None for no scaling at all."""
    if name == "default":
        return None
    # YaRN itself has a factor in the place of the two lists.
    if name in _LONGROPE and (name != "yarn" or "short_factor" in stated):
        return "longrope"
    raise IncompatibleError(f"config.json: {section} is of type {name!r:.40}; Phi-3 models have none or longrope")


def _rotated(config: dict[str, Any], partial: float) -> int:
    heads = _number(config, "num_attention_heads", 32)
    head_dim = _number(config, "head_dim", _number(config, "hidden_size", 3072) // heads)
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise IncompatibleError(
            f"config.json rotates {dim} of {head_dim:g} dimensions of a head; expected an even part"
        )
    return dim


def _attention_factor(stretch: float, original: int) -> float:
    """The scale on cos and sin (LongRoPE, Ding et al. 2024); 1 where nothing is stretched."""
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise IncompatibleError(f"config.json: {key} must be a number above 0, found {value!r:.40}")
    return value


def _factors(stated: dict[str, Any], key: str, count: int) -> list[float]:
    values = stated.get(key)
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)}" if isinstance(values, list) else f"{values!r:.40}"
        raise IncompatibleError(f"config.json: longrope's {key} must be a list of {count} numbers, found {found}")
    return [float(_number({key: value}, key, 0.0)) for value in values]
