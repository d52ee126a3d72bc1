"""What an adapter adds to the projections of its base, as PEFT and mlx-lm write it: s·B·A each, and DoRA's magnitudes.

    PEFT    base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight  (rank, in)   lora_B (out, rank)
    mlx-lm  model.layers.0.self_attn.o_proj.lora_a                          (in, rank)   lora_b (rank, out)

PEFT scales by alpha / rank or alpha / √rank, mlx-lm by a number of its own. With DoRA, PEFT's
`lora_magnitude_vector` and mlx-lm's `m` (out,) mean the same. No number is read here but those that are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError, VerificationError
from edgetune.formats.adapter import MLX_WEIGHTS
from edgetune.formats.json_file import read_object
from edgetune.formats.peft_config import foreign_fields, is_positive, pattern_problems, scaling_of, short
from edgetune.formats.safetensors_file import FLOATS, StoredTensor, read_floats, read_header
from edgetune.importing.sources import Source

_AGAIN = "copy the adapter again, or save it anew"
_MODULE = r"(model\.layers\.\d{1,6}\.(?:self_attn|mlp)\.\w{1,40})"
_PEFT_NAME = re.compile(
    # In memory, PEFT puts an adapter's name before `weight`; some save it so.
    rf"(?:base_model\.model\.)?{_MODULE}\.lora_(A(?=.*\.weight$)|B(?=.*\.weight$)|magnitude_vector)"
    r"(?:\.(?!weight$)([^.]{1,100}))?(?:\.weight)?"
)
_MLX_NAME = re.compile(rf"{_MODULE}\.(?:lora_(a|b)|(m))")
_MATRICES = {"A": "A", "a": "A", "B": "B", "b": "B", "m": "magnitudes", "magnitude_vector": "magnitudes"}
_SHOWN = 3
_TUNED = {"lora": False, "dora": True}
"""mlx-lm's `fine_tune_type`, and whether there are magnitudes."""


@dataclass(frozen=True)
class Update:
    """What is added to one projection: scaling · B · A, and its magnitudes."""

    module: str
    """Path of the projection in the checkpoint, such as `model.layers.0.self_attn.q_proj`."""
    scaling: float
    weights: Path
    is_transposed: bool
    """A is stored as (in, rank) and B as (rank, out)."""
    stored_a: StoredTensor
    stored_b: StoredTensor
    stored_magnitudes: StoredTensor | None

    @property
    def rank(self) -> int:
        """How many rows A has."""
        return self.stored_a.shape[-1 if self.is_transposed else 0]

    @property
    def in_features(self) -> int:
        """What the projection takes."""
        return self.stored_a.shape[0 if self.is_transposed else -1]

    @property
    def out_features(self) -> int:
        """What the projection gives."""
        return self.stored_b.shape[-1 if self.is_transposed else 0]

    def a(self) -> NDArray[np.float32]:
        """A (rank, in_features)."""
        return self._read(self.stored_a)

    def b(self) -> NDArray[np.float32]:
        """B (out_features, rank)."""
        return self._read(self.stored_b)

    def magnitudes(self) -> NDArray[np.float32]:
        """DoRA's m (out_features,)."""
        if self.stored_magnitudes is None:
            raise ValueError(f"{self.module} has no magnitudes")
        return self._read(self.stored_magnitudes)

    def _read(self, tensor: StoredTensor) -> NDArray[np.float32]:
        values = read_floats(self.weights, tensor)
        if not np.isfinite(values).all():
            raise VerificationError(f"{self.weights}: NaN or infinity in an update of {self.module}; train it anew")
        return np.ascontiguousarray(values.T) if self.is_transposed else values


@dataclass(frozen=True)
class Updates:
    """An adapter of another tool."""

    tool: str
    """Who wrote it: `PEFT` or `mlx-lm`."""
    base: str
    """What it was trained on, as far as it says so."""
    dora: bool
    """Whether every update has magnitudes."""
    rank_stabilised: bool
    """Whether alpha was divided by the root of the rank."""
    of: list[Update]


def read_updates(source: Source) -> Updates:
    """Read an adapter's configuration and the names and shapes of its tensors.

    Raises:
        IncompatibleError: It is more than LoRA or DoRA of projections, or contradicts itself; names all that is wrong.
        VerificationError: A file is broken.
    """
    config = read_object(source.config, _AGAIN)
    if "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config):
        return _of_mlx(config, source)
    return _of_peft(config, source)


def _of_peft(config: Mapping[str, Any], source: Source) -> Updates:
    if source.weights is None:
        raise VerificationError(f"{source.shown}: PEFT's configuration beside mlx-lm's tensors; {_AGAIN}")
    problems = [*foreign_fields(config), *pattern_problems(config)]
    scaling, dora = scaling_of(config), config.get("use_dora") or False
    if scaling is None and not pattern_problems(config):
        problems.append(
            f"r is {short(config.get('r'))}, lora_alpha {short(config.get('lora_alpha'))} and use_rslora "
            f"{short(config.get('use_rslora'))}, expected a whole number, a number above 0 and true or false"
        )
    if not isinstance(dora, bool):
        problems.append(f"use_dora is {short(dora)}, expected true or false")
    tensors = read_header(source.weights, _AGAIN)
    problems += [*_foreign_tensors(tensors, _PEFT_NAME), *_several_names(tensors)]
    if problems or scaling is None:
        raise _refused(source, problems)
    found = _Found(source.weights, tensors, _PEFT_NAME, is_transposed=False)
    updates = _updates(source, found, dora is True, scaling.of)
    base = config.get("base_model_name_or_path")
    return Updates("PEFT", base if isinstance(base, str) else "", dora is True, scaling.rank_stabilised, updates)


def _of_mlx(config: Mapping[str, Any], source: Source) -> Updates:
    if source.mlx_weights is None:
        raise VerificationError(f"{source.shown}: mlx-lm's configuration and no {MLX_WEIGHTS}; {_AGAIN}")
    kind, scaling = str(config.get("fine_tune_type", "lora")), _mlx_scaling(config.get("lora_parameters"))
    problems = [] if kind in _TUNED else [f"fine_tune_type is {short(kind)}, expected 'lora' or 'dora'"]
    problems += [scaling] if isinstance(scaling, str) else []
    tensors = read_header(source.mlx_weights, _AGAIN)
    problems += _foreign_tensors(tensors, _MLX_NAME)
    if problems or isinstance(scaling, str):
        raise _refused(source, problems)
    dora, everywhere = _TUNED[kind], scaling
    found = _Found(source.mlx_weights, tensors, _MLX_NAME, is_transposed=True)
    updates = _updates(source, found, dora, lambda _: everywhere)
    base = config.get("model")
    return Updates("mlx-lm", base if isinstance(base, str) else "", dora, False, updates)


def _mlx_scaling(parameters: object) -> tuple[int, float] | str:
    """Rank and scaling of all projections; or what is wrong with them."""
    given = parameters if isinstance(parameters, dict) else {}
    rank, scale = given.get("rank"), given.get("scale")
    if type(rank) is not int or rank < 1 or not is_positive(scale):
        return f"lora_parameters are {short(parameters)}, expected a whole number as rank and a scale above 0"
    if "alpha" in given:
        return (
            f"lora_parameters have alpha {short(given['alpha'])}: early releases of mlx-lm scaled by scale · alpha / "
            "rank, later ones by scale alone; take alpha out, and let scale be what the adapter was trained with"
        )
    return rank, scale


@dataclass(frozen=True)
class _Found:
    """The tensors of a file."""

    weights: Path
    tensors: Mapping[str, StoredTensor]
    names: re.Pattern[str]
    """How the tool calls those of LoRA."""
    is_transposed: bool


def _updates(
    source: Source, found: _Found, dora: bool, scaling: Callable[[str], tuple[int, float]]
) -> list[Update]:
    """Put A, B and magnitudes of each projection together.

    Raises:
        IncompatibleError: One is missing, or their shapes or types are not what they should be; names all of it.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    problems, updates = [], []
    for name, tensor in found.tensors.items():
        if said := found.names.fullmatch(name):
            part = _MATRICES[said[2] or said[3]]
            if parts.setdefault(said[1], {}).setdefault(part, tensor) is not tensor:
                problems.append(f"{said[1]} has {part} twice, as {name} and under another name")
    expected = {"A", "B", "magnitudes"} if dora else {"A", "B"}
    for module, given in parts.items():
        if lacking := sorted(expected - given.keys()):
            problems.append(f"{module} has no {' and no '.join(lacking)}")
            continue
        if surplus := sorted(given.keys() - expected):
            problems.append(f"{module} has {' and '.join(surplus)}, and the configuration says that there is no DoRA")
            continue
        rank, factor = scaling(module)
        pair, magnitudes = (given["A"], given["B"]), given.get("magnitudes")
        update = Update(module, factor, found.weights, found.is_transposed, *pair, magnitudes)
        problems += _shape_problems(update, rank)
        updates.append(update)
    if not parts:
        problems.append("there are no tensors of LoRA")
    if problems:
        raise _refused(source, problems)
    return updates


def _shape_problems(update: Update, rank: int) -> list[str]:
    """What of the tensors of an update does not go together."""
    module, magnitudes = update.module, update.stored_magnitudes
    types = {tensor.dtype for tensor in (update.stored_a, update.stored_b, magnitudes) if tensor is not None}
    if foreign := sorted(types - set(FLOATS)):
        return [f"{module} is of type {', '.join(foreign)}, expected {', '.join(FLOATS)}"]
    if {len(update.stored_a.shape), len(update.stored_b.shape)} != {2}:
        return [f"{module} has A {list(update.stored_a.shape)} and B {list(update.stored_b.shape)}, no matrices"]
    ranks = {update.rank, update.stored_b.shape[0 if update.is_transposed else -1]}
    if ranks != {rank}:
        return [f"{module} has matrices of rank {' and '.join(map(str, sorted(ranks)))}, its configuration says {rank}"]
    if magnitudes is not None and magnitudes.shape != (update.out_features,):
        return [f"{module} has magnitudes {list(magnitudes.shape)}, expected [{update.out_features}]"]
    return []


def _foreign_tensors(found: Mapping[str, StoredTensor], names: re.Pattern[str]) -> list[str]:
    """Tensors of something else than projections, such as embeddings, biases or whole modules."""
    foreign = [name for name in found if not names.fullmatch(name)]
    return [f"{len(foreign)} tensors are no A or B of a projection: {_listed(foreign)}"] if foreign else []


def _several_names(found: Mapping[str, StoredTensor]) -> list[str]:
    named = {match[3] or "" for name in found if (match := _PEFT_NAME.fullmatch(name))}
    told = _listed([name or "one without a name" for name in sorted(named)])
    return [f"holds several adapters: {told}; save one alone"] if len(named) > 1 else []


def _refused(source: Source, problems: list[str]) -> IncompatibleError:
    shown = problems[:_SHOWN] + ([f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
    return IncompatibleError("\n".join([f"{source.shown} cannot be imported:", *shown]))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(name[:120] for name in names[:_SHOWN])}{more}"
