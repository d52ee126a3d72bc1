"""Adapter folders in PEFT's own format, so that PEFT reads what edgetune trained and edgetune what PEFT saved.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. One that edgetune wrote also holds
`edgetune.json`, the contract with its base: SHA-256 of base, tokenizer and chat template, the LoRA slots, and every
file with its hash.
A folder without a contract is judged by its configuration and its tensors alone: plain LoRA (scaling alpha / rank, no
bias) on exactly the bundle's projections, in float32, float16 or bfloat16. Pickle is never opened.
"""

from __future__ import annotations

import json
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
from edgetune.formats.safetensors_file import StoredTensor, read_header
from edgetune.formats.storage import recover, write_file
from edgetune.model.lora import Lora, Parameters, RowNorms, _require_slots, initial_parameters

MANIFEST = "edgetune.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "metrics.jsonl"
"""A line an optimizer step; `edgetune.training.record` writes it."""
MOST_LINE_BYTES = 320
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
        lora: Rank, alpha and the slots that were trained; where they leave whole layers out, PEFT is told which to take
            (`layers_to_transform`).
        parameters: The values, of the shapes that `lora` lists; written as float32, bit for bit.
        provenance: How the adapter came to be; for people.
        encoding: How its rows were encoded, and prompts are to be.

    Raises:
        VerificationError: A parameter is not finite.
    """
    from safetensors.numpy import save

    _require_finite(parameters, "the trained adapter")
    tensors = {PREFIX + name: np.ascontiguousarray(parameters[name], np.float32) for name in lora.shapes()}
    write_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    config = json.dumps(_peft_config(base, lora), indent=2, sort_keys=True, ensure_ascii=False)
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


def _peft_config(base: BaseModel, lora: Lora) -> dict[str, Any]:
    """PEFT's LoraConfig: the fields that every release since 0.10 reads; the others stay at its defaults."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        # None where it goes without saying: the layers begin with the first one.
        "layers_to_transform": lora.layers() if lora.layers()[0] else None,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(lora.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": False,
    }


def read_adapter(
    path: Path, lora: Lora, base: BaseModel, tokenizer: Tokenizer, norms: RowNorms = MappingProxyType({})
) -> dict[str, NDArray[np.float32]]:
    """Read an adapter that edgetune or PEFT wrote, if it fits the bundle.

    Args:
        path: The adapter folder.
        lora: The bundle's slots, rank and alpha.
        base: The bundle's base.
        tokenizer: The bundle's tokenizer.
        norms: The bundle's row norms, where it has DoRA (`edgetune.formats.row_norms`).

    Returns:
        float32 values under the names, in the order and of the shapes of `Lora.shapes`; in layers that the adapter
        leaves out (`layers_to_transform`) those that change nothing yet.

    Raises:
        UsageError: There is no adapter at `path`.
        IncompatibleError: It belongs to another base or tokenizer, or has another rank, alpha or slots; names all
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
        advice = _advice(config.get("r"), config.get("lora_alpha"), modules, lora, dora=config.get("use_dora") is True)
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
    shapes = lora.of_layers(manifest.lora.layers()).shapes()
    if (manifest.lora.rank, manifest.lora.alpha, manifest.lora.shapes()) != (lora.rank, lora.alpha, shapes):
        problems.append(f"the adapter has {_described(manifest.lora)}, the bundle {_described(lora)}")
    if problems:
        fix = "use the bundle it was trained with, or train it anew"
        other = manifest.lora
        advice = _advice(other.rank, other.alpha, set(other.target_modules), lora, dora=other.dora)
        raise IncompatibleError("\n".join([f"{path} does not fit the bundle:", *problems, fix, *advice]))
    if unlisted := {CONFIG, WEIGHTS} - {entry.path for entry in manifest.files}:
        raise VerificationError(f"{source}: does not list {', '.join(sorted(unlisted))}; copy the folder again")
    verify_files(path, manifest.files)


def _described(lora: Lora) -> str:
    modules = ", ".join(sorted(lora.target_modules))
    kind = ", DoRA" if lora.dora else ""
    return f"rank {lora.rank}, alpha {lora.alpha:g}, {len(lora.slots)} slots on {modules}{kind}"


def _advice(rank: object, alpha: object, modules: set[str], lora: Lora, *, dora: bool) -> list[str]:
    """How to get a bundle with an adapter's rank, alpha and slots, or why there can be none; nothing if this fits."""
    if not modules:
        return []
    targets = next((name for name, of in MODULES_OF_TARGETS.items() if modules == set(of)), None)
    if targets is None:
        choices = ", or ".join(f"{', '.join(of)} ({name})" for name, of in MODULES_OF_TARGETS.items())
        return [
            f"the adapter is on {_short(sorted(modules))}, and no `edgetune prepare` line gives exactly such slots; "
            f"train it again on {choices}"
        ]
    if type(rank) is not int or not 1 <= rank <= lora.highest_rank or not _is_positive(alpha):
        return [
            f"no `edgetune prepare` line takes r {_short(rank)} and lora_alpha {_short(alpha)}; train it again with a "
            f"whole number from 1 to {lora.highest_rank} and a number above 0"
        ]
    if (rank, alpha, modules, dora) == (lora.rank, lora.alpha, set(lora.target_modules), lora.dora):
        return []
    return [
        "a bundle of the adapter's rank, alpha and projections: "
        f"edgetune prepare CHECKPOINT --rank {rank} --alpha {alpha:g} --targets {targets}{' --dora' if dora else ''} "
        "--output BUNDLE"
    ]


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _config_problems(config: Mapping[str, Any], lora: Lora) -> list[str]:
    left = {key: value for key, value in config.items() if key not in _SILENT_FIELDS}
    problems = []
    if (kind := left.pop("peft_type", None)) != "LORA":
        problems.append(f"{CONFIG}: peft_type is {_short(kind)}, expected 'LORA'")
    for key, expected in (("r", lora.rank), ("lora_alpha", lora.alpha)):
        value = left.pop(key, None)
        if isinstance(value, bool) or value != expected:
            problems.append(f"{CONFIG}: {key} is {_short(value)}, the bundle's is {expected:g}")
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
        f"{CONFIG}: {key} is {_short(value)}; edgetune takes plain LoRA, without it"
        for key, value in sorted(left.items())
        if value
    ]
    return problems


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
            f"tensors are of another type than {', '.join(_DECODERS)}",
            [f"{name} {dtype}" for name, dtype in types.items() if dtype not in _DECODERS],
        ),
    ]
    return [f"{WEIGHTS}: {problem}" for problem in problems]


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"] if names else []


def _from_bfloat16(data: bytes) -> NDArray[np.float32]:
    """bfloat16 is the upper half of a float32; numpy does not have it."""
    return (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


_DECODERS = {
    "F32": lambda data: np.frombuffer(data, "<f4").astype(np.float32),
    "F16": lambda data: np.frombuffer(data, "<f2").astype(np.float32),
    "BF16": _from_bfloat16,
}
"""Types of tensors that are taken, all of them exact in float32."""


def _read_tensors(weights: Path, lora: Lora) -> dict[str, NDArray[np.float32]]:
    """Values of a file whose header was found to fit, and whose size is thereby bounded."""
    from safetensors import deserialize

    tensors = dict(deserialize(weights.read_bytes()))  # type: ignore[no-untyped-call]
    values: dict[str, NDArray[np.float32]] = {}
    for name, shape in lora.shapes().items():
        tensor = tensors[PREFIX + name]
        values[name] = _DECODERS[tensor["dtype"]](tensor["data"]).reshape(shape)
    return values


def _require_finite(parameters: Parameters, source: str) -> None:
    wrong = [name for name, value in parameters.items() if not np.isfinite(value).all()]
    if wrong:
        raise VerificationError(f"{source}: NaN or infinity in {_listed('tensors', wrong)[0]}; train the adapter anew")
