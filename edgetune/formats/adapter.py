"""Adapter folders in PEFT's own format, so that PEFT reads what edgetune trained and edgetune what PEFT saved.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. One that edgetune wrote also holds
`edgetune.json`, the contract with its base: SHA-256 of base, tokenizer and chat template, the LoRA slots, and every
file with its hash.
A folder without a contract is judged by its configuration and its tensors alone: LoRA without bias, with the bundle's
ranks and scaling, on exactly its projections, in float32, float16 or bfloat16. Pickle is never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError, UsageError, VerificationError
from edgetune.formats.bundle import is_there, list_files, load_manifest, verify_files
from edgetune.formats.json_file import read_object
from edgetune.formats.manifest import ADAPTER_FORMAT, FORMAT_VERSION, AdapterManifest, BaseModel, RowEncoding, Tokenizer
from edgetune.formats.manifest_json import write_manifest
from edgetune.formats.peft_config import (
    PATTERNS,
    PROJECTIONS,
    Scaling,
    foreign_fields,
    is_pattern,
    is_positive,
    pattern_problems,
    peft_config,
    prepare_line,
    scaling_of,
    short,
    shortest,
)
from edgetune.formats.safetensors_file import FLOATS, StoredTensor, read_floats, read_header
from edgetune.formats.storage import recover, write_file
from edgetune.model.lora import Lora, Parameters, RowNorms, Slot, initial_parameters, require_slots

MANIFEST = "edgetune.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
"""What mlx-lm calls its tensors, which `edgetune import` reads."""
RECORD = "metrics.jsonl"
"""A line an optimizer step; `edgetune.training.record` writes it."""
MOST_LINE_BYTES = 400
"""Of a line of the record; the first, with one key more, may take that of another."""
VALIDATION_DATA = "validation_data"
"""Provenance key: the rows that the training was validated on, as seen from the folder that the adapter lies in."""
VALIDATION_GIVEN = "validation_data_given"
"""Provenance key: the same rows, as seen from the folder that the training was started in."""
VALIDATION_SHA256 = "validation_data_sha256"
"""Provenance key: their SHA-256."""

PREFIX = "base_model.model."
"""What PEFT puts before a module's path in the checkpoint."""
_A = ".lora_A.weight"
_SHOWN = 5
_FLOAT_BYTES = 4
_HEADER, _FILE, _PROVENANCE = 128, 4096, 1 << 15
"""Bytes that a tensor takes beside its name and values, a short file, and what is said of how an adapter came to be."""


def most_bytes(lora: Lora, steps: int = 0) -> dict[str, int]:
    """Bytes that each file of an adapter takes at most, for the room that is kept for it.

    Args:
        lora: Its slots.
        steps: How many its record has lines for.
    """
    shapes = lora.shapes()
    names = sum(len(PREFIX) + len(name) for name in shapes)
    values = _FLOAT_BYTES * lora.parameters
    return {
        WEIGHTS: values + names + _HEADER * len(shapes) + _FILE,
        CONFIG: _FILE,
        MANIFEST: names + _HEADER * len(shapes) + _PROVENANCE,
        RECORD: MOST_LINE_BYTES * (steps + 1),
    }


def write_adapter(
    folder: Path,
    *,
    base: BaseModel,
    tokenizer: Tokenizer,
    lora: Lora,
    parameters: Parameters,
    provenance: Mapping[str, str],
    encoding: RowEncoding = RowEncoding(),
) -> AdapterManifest:
    """Write the three files of an adapter; the contract comes last and covers every file that lies in `folder`.

    Args:
        folder: A folder under construction (`storage.atomic_folder`).
        base: The base the adapter was trained on.
        tokenizer: The tokenizer its rows went through.
        lora: The bundle's ranks, scaling and slots.
        parameters: The values, of the shapes that `lora` lists; written as float32, bit for bit. Where those of whole
            layers are not there, PEFT is told which to take (`layers_to_transform`).
        provenance: How the adapter came to be; for people.
        encoding: How its rows were encoded, and prompts are to be.

    Raises:
        VerificationError: A parameter is not finite.
    """
    from safetensors.numpy import save

    _require_finite(parameters, "the trained adapter")
    everything, lora = lora, lora.of_layers({slot.layer for slot in lora.slots if slot.a in parameters})
    tensors = {PREFIX + name: np.ascontiguousarray(parameters[name], np.float32) for name in lora.shapes()}
    write_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    peft = peft_config(base, lora, all_layers=lora.layers() == everything.layers())
    config = json.dumps(peft, indent=2, sort_keys=True, ensure_ascii=False)
    write_file(folder / CONFIG, f"{config}\n".encode())
    manifest = AdapterManifest(
        format=ADAPTER_FORMAT,
        format_version=FORMAT_VERSION,
        base=base,
        tokenizer=tokenizer,
        lora=lora,
        provenance=dict(provenance),
        files=list_files(folder, without=MANIFEST),
        encoding=encoding,
    )
    write_file(folder / MANIFEST, write_manifest(manifest))
    return manifest


def read_adapter(
    path: Path, lora: Lora, base: BaseModel, tokenizer: Tokenizer, norms: RowNorms = MappingProxyType({})
) -> dict[str, NDArray[np.float32]]:
    """Read an adapter that edgetune or PEFT wrote, if it fits the bundle.

    Args:
        path: The adapter folder.
        lora: The bundle's slots, ranks and scaling.
        base: The bundle's base.
        tokenizer: The bundle's tokenizer.
        norms: The bundle's row norms, where it has DoRA (`edgetune.formats.row_norms`).

    Returns:
        float32 values under the names, in the order and of the shapes of `Lora.shapes`; in layers that the adapter
        leaves out (`layers_to_transform`) those that change nothing yet.

    Raises:
        UsageError: There is no adapter at `path`.
        IncompatibleError: It belongs to another base or tokenizer, or has other ranks, scaling or slots; names all
            that differs.
        VerificationError: A file was changed, cut off, holds pickle or numbers that are not finite; or the bundle has
            no slots.
    """
    require_slots(lora)
    recover(path)
    if not is_there(path / CONFIG):
        raise UsageError(f"{path}: no adapter here (no {CONFIG}); give the folder that `edgetune train` or PEFT saved")
    if is_there(path / MANIFEST):
        check_contract(path, base, tokenizer, lora)
    weights = path / WEIGHTS
    require_weights(path)
    config = read_object(path / CONFIG, "save the adapter again")
    trained, found = _trained(config, lora), read_header(weights, "copy it again")
    problems = [*_config_problems(config, lora), *_tensor_problems(found, trained)]
    if problems:
        title = f"{path} does not fit a bundle of {base.name} with {described(lora)}:"
        modules = {name.removesuffix(_A).rpartition(".")[2] for name in found if name.endswith(_A)}
        advice = _advice(config, modules, lora)
        rank = config.get("r")
        if type(rank) is int and rank <= lora.rank and not foreign_fields(config):
            # Other scaling, lower ranks and fewer projections or layers.
            advice.insert(0, f"what can be re-shaped to fit: edgetune import {path} --bundle BUNDLE --output ADAPTER")
        raise IncompatibleError("\n".join([title, *problems, *advice]))
    parameters = {name: read_floats(weights, found[PREFIX + name]) for name in trained.shapes()}
    _require_finite(parameters, str(weights))
    return parameters if trained is lora else initial_parameters(lora, 0, norms) | parameters


def require_weights(path: Path) -> None:
    """See that an adapter's folder has tensors that can be read.

    Raises:
        VerificationError: It has none, or those of another tool.
    """
    if (path / WEIGHTS).is_file():
        return
    if (path / MLX_WEIGHTS).is_file():
        advice = f"edgetune import {path} --bundle BUNDLE --output ADAPTER makes an adapter of it"
        raise VerificationError(f"{path}: no {WEIGHTS}, and {MLX_WEIGHTS} is mlx-lm's: {advice}")
    pickled = " (adapter_model.bin is pickle, which can run code)" if (path / "adapter_model.bin").exists() else ""
    raise VerificationError(
        f"{path}: no {WEIGHTS}{pickled}; save the adapter with PEFT's save_pretrained(safe_serialization=True)"
    )


def row_encoding(path: Path) -> RowEncoding:
    """How an adapter's rows were encoded: as its contract says, or the default where it has none.

    Raises:
        IncompatibleError: The contract is of a format version that this edgetune does not read.
        VerificationError: The contract was changed.
    """
    source = path / MANIFEST
    return load_manifest(source, AdapterManifest).encoding if source.is_file() else RowEncoding()


def _trained(config: Mapping[str, Any], lora: Lora) -> Lora:
    """The slots of the layers that PEFT's `layers_to_transform` names: all of them when it names none."""
    layers = config.get("layers_to_transform")
    if layers is None:
        return lora
    return lora.of_layers(layers if isinstance(layers, list) else [layers])


def check_contract(path: Path, base: BaseModel, tokenizer: Tokenizer, lora: Lora | None = None) -> None:
    """See that an adapter's contract is with this base, and that its files are what the contract says.

    Args:
        path: The folder of an adapter that has one.
        base: The bundle's base.
        tokenizer: The bundle's tokenizer.
        lora: The bundle's slots, where the adapter's have to be the same.

    Raises:
        IncompatibleError: It belongs to another base or tokenizer, or has other slots; names all that differs.
        VerificationError: A file was changed, or is not listed.
    """
    source = path / MANIFEST
    manifest = load_manifest(source, AdapterManifest)
    problems = []
    if manifest.base.sha256 != base.sha256:
        problems.append(
            f"the adapter was trained on {manifest.base.name} ({manifest.base.sha256[:16]}…), "
            f"the bundle holds {base.name} ({base.sha256[:16]}…)"
        )
    if manifest.tokenizer.sha256 != tokenizer.sha256:
        problems.append(
            f"the adapter's tokenizer is {manifest.tokenizer.sha256[:16]}…, the bundle's {tokenizer.sha256[:16]}…"
        )
    if manifest.tokenizer.chat_template_sha256 != tokenizer.chat_template_sha256:
        theirs, ours = manifest.tokenizer.chat_template_sha256 or "none", tokenizer.chat_template_sha256 or "none"
        problems.append(f"the adapter's chat template is {theirs[:16]}, the bundle's {ours[:16]}")
    advice = []
    if lora is not None and not manifest.lora.computes_as(lora.of_layers(manifest.lora.layers())):
        problems.append(f"the adapter has {described(manifest.lora)}, the bundle {described(lora)}")
        advice = _advice(peft_config(manifest.base, manifest.lora), set(manifest.lora.target_modules), lora)
    if problems:
        fix = "use the bundle it was trained with, or train it anew"
        raise IncompatibleError("\n".join([f"{path} does not fit the bundle:", *problems, fix, *advice]))
    if unlisted := {CONFIG, WEIGHTS} - {entry.path for entry in manifest.files}:
        raise VerificationError(f"{source}: does not list {', '.join(sorted(unlisted))}; copy the folder again")
    verify_files(path, manifest.files)


def described(lora: Lora) -> str:
    """Ranks, scaling and slots, for messages."""
    modules = ", ".join(sorted(lora.target_modules))
    return f"{lora.in_words()}, {len(lora.slots)} slots on {modules}"


def _advice(config: Mapping[str, Any], modules: set[str], lora: Lora) -> list[str]:
    """How to get a bundle with an adapter's ranks, alphas and slots, or why there can be none; nothing if this fits."""
    if not modules:
        return []
    if unknown := sorted(modules - set(PROJECTIONS)):
        return [
            f"the adapter is on {short(sorted(modules))}, and no `edgetune prepare` line gives slots on "
            f"{short(unknown)}; train it again on some of {', '.join(PROJECTIONS)}"
        ]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= lora.highest_rank or not is_positive(alpha):
        return [
            f"no `edgetune prepare` line takes r {short(rank)} and lora_alpha {short(alpha)}; train it again with a "
            f"whole number from 1 to {lora.highest_rank} and a number above 0"
        ]
    patterns = {key: config.get(key) or {} for key in PATTERNS}
    for key, pattern in patterns.items():
        if not is_pattern(key, pattern) or not pattern.keys() <= modules:
            return [
                f"no `edgetune prepare` line takes {key} {short(pattern)}; train it again with a pattern of the "
                "projections' names, such as down_proj"
            ]
    asked = Lora(
        rank,
        alpha,
        sorted(modules),
        [],
        rank_stabilised=bool(config.get("use_rslora")),
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
        dora=config.get("use_dora") is True,
    )
    if asked.dora == lora.dora and set(lora.target_modules) == modules and all(
        (asked.rank_of(module), asked.scaling_of(module)) == (lora.rank_of(module), lora.scaling_of(module))
        for module in modules
    ):
        return []
    return [f"a bundle of the adapter's rank, alpha and projections: {prepare_line(asked)}"]


def _config_problems(config: Mapping[str, Any], lora: Lora) -> list[str]:
    problems = [*foreign_fields(config), *_scale_problems(config, lora)]
    modules = config.get("target_modules")
    # A pattern names modules only together with a model: then the tensors' names decide alone.
    if isinstance(modules, list):
        names = sorted({str(module).rpartition(".")[2] for module in modules})
        if names != sorted(lora.target_modules):
            problems.append(f"target_modules are {short(names)}, the bundle's {sorted(lora.target_modules)}")
    dora = config.get("use_dora", False)
    if dora not in (None, False, True) or bool(dora) != lora.dora:
        kind = "those of DoRA, with magnitudes" if lora.dora else "plain LoRA, no DoRA"
        problems.append(f"use_dora is {short(dora)}, and the bundle's slots are {kind}")
    return [f"{CONFIG}: {problem}" for problem in problems]


def _scale_problems(config: Mapping[str, Any], lora: Lora) -> list[str]:
    """What of an adapter's ranks and scaling is not the bundle's; nothing where both compute the same."""
    scaling = scaling_of(config)
    if scaling is not None and all(_computes(lora, slot, scaling) for slot in lora.slots):
        return []
    ours = {"r": lora.rank, "lora_alpha": shortest(lora.alpha), "use_rslora": lora.rank_stabilised}
    patterns: dict[str, Any] = {"rank_pattern": lora.rank_pattern, "alpha_pattern": lora.alpha_pattern}
    given = {**config, "use_rslora": config.get("use_rslora") or False}
    given |= {key: config.get(key) or {} for key in PATTERNS}
    return pattern_problems(config) + [
        f"{key} is {short(value)}, the bundle's is {expected}"
        for key, expected in (ours | patterns).items()
        if isinstance(value := given.get(key), bool) != isinstance(expected, bool) or value != expected
    ]


def _computes(lora: Lora, slot: Slot, scaling: Scaling) -> bool:
    rank, factor = scaling.of(slot.name)
    return rank == lora.rank_of(slot.module) and math.isclose(factor, lora.scaling_of(slot.module), rel_tol=1e-6)


def _tensor_problems(found: Mapping[str, StoredTensor], lora: Lora) -> list[str]:
    """What the header says against the slots; no number is read, so that the file's size costs nothing."""
    expected = {PREFIX + name: shape for name, shape in lora.shapes().items()}
    types = {name: found[name].dtype for name in expected if name in found}
    problems = [
        *_listed("tensors are missing", [name for name in expected if name not in found]),
        *_listed("tensors have no slot in the bundle", [name for name in found if name not in expected]),
        *_listed(
            "tensors are of another shape",
            [
                f"{name} {list(found[name].shape)}, expected {list(shape)}"
                for name, shape in expected.items()
                if name in found and found[name].shape != shape
            ],
        ),
        *_listed(
            f"tensors are of another type than {', '.join(FLOATS)}",
            [f"{name} {dtype}" for name, dtype in types.items() if dtype not in FLOATS],
        ),
    ]
    return [f"{WEIGHTS}: {problem}" for problem in problems]


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"] if names else []


def _require_finite(parameters: Parameters, source: str) -> None:
    wrong = [name for name, value in parameters.items() if not np.isfinite(value).all()]
    if wrong:
        raise VerificationError(f"{source}: NaN or infinity in {_listed('tensors', wrong)[0]}; train the adapter anew")
