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
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgetune.config import MODULES_OF_TARGETS
from edgetune.errors import IncompatibleError, UsageError, VerificationError
from edgetune.formats.bundle import is_there, list_files, load_manifest, verify_files
from edgetune.formats.json_file import read_object
from edgetune.formats.manifest import ADAPTER_FORMAT, FORMAT_VERSION, AdapterManifest, BaseModel, RowEncoding, Tokenizer
from edgetune.formats.manifest_json import write_manifest
from edgetune.formats.safetensors_file import FLOATS, StoredTensor, as_float32, read_header
from edgetune.formats.storage import recover, write_file
from edgetune.model.lora import Lora, Parameters, RowNorms, Slot, _require_slots, initial_parameters

MANIFEST = "edgetune.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
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

_PROJECTIONS = MODULES_OF_TARGETS["all-linear"]
PATTERNS = ("rank_pattern", "alpha_pattern")
"""Fields that give some modules another rank or alpha."""
_SCALE_KEYS = ("r", "lora_alpha", "use_rslora", *PATTERNS)
"""Fields that say ranks, and what an update is scaled with."""
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
"""Fields of PEFT's LoraConfig that do not change what a saved plain LoRA computes, given its tensors."""


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
    peft = _peft_config(base, lora, all_layers=lora.layers() == everything.layers())
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


def _peft_config(base: BaseModel, lora: Lora, *, all_layers: bool = True) -> dict[str, Any]:
    """PEFT's LoraConfig: the fields that every release since 0.10 reads; the others stay at its defaults."""
    return {
        "alpha_pattern": {module: _shortest(alpha) for module, alpha in lora.alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        # None where it goes without saying.
        "layers_to_transform": None if all_layers and not lora.layers()[0] else lora.layers(),
        "lora_alpha": _shortest(lora.alpha),
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


def _shortest(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


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
    _require_slots(lora)
    recover(path)
    if not is_there(path / CONFIG):
        raise UsageError(f"{path}: no adapter here (no {CONFIG}); give the folder that `edgetune train` or PEFT saved")
    if is_there(path / MANIFEST):
        _check_contract(path, lora, base, tokenizer)
    weights = path / WEIGHTS
    if not weights.is_file():
        pickled = " (adapter_model.bin is pickle, which can run code)" if (path / "adapter_model.bin").exists() else ""
        raise VerificationError(
            f"{path}: no {WEIGHTS}{pickled}; save the adapter with PEFT's save_pretrained(safe_serialization=True)"
        )
    config = read_object(path / CONFIG, "save the adapter again")
    trained, found = _trained(config, lora), read_header(weights, "copy it again")
    problems = [*_config_problems(config, lora), *_tensor_problems(found, trained)]
    if problems:
        title = f"{path} does not fit a bundle of {base.name} with {_described(lora)}:"
        modules = {name.removesuffix(_A).rpartition(".")[2] for name in found if name.endswith(_A)}
        advice = _advice(config, modules, lora)
        raise IncompatibleError("\n".join([title, *problems, *advice]))
    parameters = _read_tensors(weights, trained)
    _require_finite(parameters, str(weights))
    return parameters if trained is lora else initial_parameters(lora, 0, norms) | parameters


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


def _check_contract(path: Path, lora: Lora, base: BaseModel, tokenizer: Tokenizer) -> None:
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
    if not manifest.lora.computes_as(lora.of_layers(manifest.lora.layers())):
        problems.append(f"the adapter has {_described(manifest.lora)}, the bundle {_described(lora)}")
    if problems:
        fix = "use the bundle it was trained with, or train it anew"
        advice = _advice(_peft_config(manifest.base, manifest.lora), set(manifest.lora.target_modules), lora)
        raise IncompatibleError("\n".join([f"{path} does not fit the bundle:", *problems, fix, *advice]))
    if unlisted := {CONFIG, WEIGHTS} - {entry.path for entry in manifest.files}:
        raise VerificationError(f"{source}: does not list {', '.join(sorted(unlisted))}; copy the folder again")
    verify_files(path, manifest.files)


def _described(lora: Lora) -> str:
    modules = ", ".join(sorted(lora.target_modules))
    return f"{lora.in_words()}, {len(lora.slots)} slots on {modules}"


def _advice(config: Mapping[str, Any], modules: set[str], lora: Lora) -> list[str]:
    """How to get a bundle with an adapter's ranks, alphas and slots, or why there can be none; nothing if this fits."""
    if not modules:
        return []
    if unknown := sorted(modules - set(_PROJECTIONS)):
        return [
            f"the adapter is on {_short(sorted(modules))}, and no `edgetune prepare` line gives slots on "
            f"{_short(unknown)}; train it again on some of {', '.join(_PROJECTIONS)}"
        ]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= lora.highest_rank or not _is_positive(alpha):
        return [
            f"no `edgetune prepare` line takes r {_short(rank)} and lora_alpha {_short(alpha)}; train it again with a "
            f"whole number from 1 to {lora.highest_rank} and a number above 0"
        ]
    patterns = {key: config.get(key) or {} for key in PATTERNS}
    for key, pattern in patterns.items():
        if not is_pattern(key, pattern) or not pattern.keys() <= modules:
            return [
                f"no `edgetune prepare` line takes {key} {_short(pattern)}; train it again with a pattern of the "
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
    targets = next((name for name, of in MODULES_OF_TARGETS.items() if modules == set(of)), "")
    flags = "".join(
        f" --{key.replace('_', '-')} {module}={value:g}" for key in PATTERNS for module, value in patterns[key].items()
    )
    rslora = " --rslora" if asked.rank_stabilised else ""
    return [
        "a bundle of the adapter's rank, alpha and projections: "
        f"edgetune prepare CHECKPOINT --rank {rank} --alpha {alpha:g}{rslora}{' --dora' if asked.dora else ''}{flags} "
        f"--targets {targets or ','.join(name for name in _PROJECTIONS if name in modules)} --output BUNDLE"
    ]


def is_pattern(key: str, value: object) -> TypeGuard[dict[str, Any]]:
    """Whether it is a pattern of PEFT's whose keys are plain names, as ends of modules' names or whole ones.

    Others are regular expressions, which take as long as whoever wrote them likes.
    """
    fits = (lambda each: type(each) is int and each >= 1) if key == "rank_pattern" else _is_positive
    return isinstance(value, dict) and all(_PLAIN_KEY.fullmatch(name) and fits(each) for name, each in value.items())


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _config_problems(config: Mapping[str, Any], lora: Lora) -> list[str]:
    left = {key: value for key, value in config.items() if key not in _SILENT_FIELDS}
    problems = []
    if (kind := left.pop("peft_type", None)) != "LORA":
        problems.append(f"{CONFIG}: peft_type is {_short(kind)}, expected 'LORA'")
    problems += _scale_problems({key: left.pop(key, None) for key in _SCALE_KEYS}, lora)
    modules = left.pop("target_modules", None)
    # A pattern names modules only together with a model: then the tensors' names decide alone.
    if isinstance(modules, list):
        names = sorted({str(module).rpartition(".")[2] for module in modules})
        if names != sorted(lora.target_modules):
            problems.append(f"{CONFIG}: target_modules are {_short(names)}, the bundle's {sorted(lora.target_modules)}")
    if (init := left.pop("init_lora_weights", None)) not in _PLAIN_INITS:
        problems.append(
            f"{CONFIG}: init_lora_weights is {_short(init)}, which rewrites the base's weights; convert the adapter "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    dora = left.pop("use_dora", False)
    if dora not in (None, False, True) or bool(dora) != lora.dora:
        kind = "those of DoRA, with magnitudes" if lora.dora else "plain LoRA, no DoRA"
        problems.append(f"{CONFIG}: use_dora is {_short(dora)}, and the bundle's slots are {kind}")
    if left.get("bias") == "none":
        del left["bias"]
    problems += [
        f"{CONFIG}: {key} is {_short(value)}; edgetune takes LoRA without it"
        for key, value in sorted(left.items())
        if value
    ]
    return problems


def _scale_problems(given: Mapping[str, Any], lora: Lora) -> list[str]:
    """What of an adapter's ranks and scaling is not the bundle's; nothing where both compute the same."""
    rank, alpha, rslora = given["r"], given["lora_alpha"], given["use_rslora"] or False
    patterns = {key: given[key] or {} for key in PATTERNS}
    told = [
        f"{CONFIG}: {key} is {_short(pattern)}, expected numbers above 0 by the names of modules or the ends of names"
        for key, pattern in patterns.items()
        if not is_pattern(key, pattern)
    ]
    if not told and type(rank) is int and rank >= 1 and _is_positive(alpha) and isinstance(rslora, bool):
        ranks, alphas = (patterns[key] for key in PATTERNS)
        if all(
            _computes(lora, slot, _of_pattern(ranks, slot.name, rank), _of_pattern(alphas, slot.name, alpha), rslora)
            for slot in lora.slots
        ):
            return []
    ours = {"r": lora.rank, "lora_alpha": _shortest(lora.alpha), "use_rslora": lora.rank_stabilised}
    theirs = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    own_patterns: dict[str, Any] = {"rank_pattern": lora.rank_pattern, "alpha_pattern": lora.alpha_pattern}
    return told + [
        f"{CONFIG}: {key} is {_short(value)}, the bundle's is {expected}"
        for key, expected in (ours | own_patterns).items()
        if isinstance(value := (theirs | patterns)[key], bool) != isinstance(expected, bool) or value != expected
    ]


def _computes(lora: Lora, slot: Slot, rank: int, alpha: float, rslora: bool) -> bool:
    asked = Lora(rank, alpha, [], [], rslora)
    scaling, expected = asked.scaling_of(slot.module), lora.scaling_of(slot.module)
    return rank == lora.rank_of(slot.module) and math.isclose(scaling, expected, rel_tol=1e-6)


def _of_pattern(pattern: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """What a pattern says of a module: the first key that is its name or an end of it (`get_pattern_key` of PEFT)."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


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


def _read_tensors(weights: Path, lora: Lora) -> dict[str, NDArray[np.float32]]:
    """Values of a file whose header was found to fit, and whose size is thereby bounded."""
    from safetensors import deserialize

    tensors = dict(deserialize(weights.read_bytes()))  # type: ignore[no-untyped-call]
    values: dict[str, NDArray[np.float32]] = {}
    for name, shape in lora.shapes().items():
        tensor = tensors[PREFIX + name]
        values[name] = as_float32(tensor["data"], tensor["dtype"]).reshape(shape)
    return values


def _require_finite(parameters: Parameters, source: str) -> None:
    wrong = [name for name, value in parameters.items() if not np.isfinite(value).all()]
    if wrong:
        raise VerificationError(f"{source}: NaN or infinity in {_listed('tensors', wrong)[0]}; train the adapter anew")
