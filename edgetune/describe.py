"""What a folder is: a bundle, an adapter or a GenAI model, with sizes, hashes and contracts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from edgetune.errors import UsageError, VerificationError
from edgetune.formats.adapter import CONFIG as ADAPTER_CONFIG
from edgetune.formats.adapter import MANIFEST as ADAPTER_MANIFEST
from edgetune.formats.adapter import WEIGHTS as ADAPTER_WEIGHTS
from edgetune.formats.adapter import require_weights
from edgetune.formats.bundle import MANIFEST, is_there, list_files, load_bundle, load_manifest, verify_files
from edgetune.formats.genai import CONFIG as GENAI_CONFIG
from edgetune.formats.genai import MANIFEST as MODEL_MANIFEST
from edgetune.formats.genai import open_model
from edgetune.formats.json_file import read_object
from edgetune.formats.manifest import AdapterManifest, BaseModel, File, Graph, ModelManifest, Tokenizer
from edgetune.formats.peft_config import PATTERNS, is_pattern
from edgetune.formats.safetensors_file import read_header
from edgetune.formats.storage import recover
from edgetune.importing.image import OCI_MARK
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora

Kind = Literal["image", "bundle", "adapter", "shipped", "unsealed", "model", "checkpoint", "folder", "file", "nothing"]


_MARKS: dict[str, Kind] = {
    OCI_MARK: "image",
    MANIFEST: "bundle",
    ADAPTER_CONFIG: "adapter",
    "target.json": "shipped",
    "loss.onnx": "unsealed",
    GENAI_CONFIG: "model",
    "config.json": "checkpoint",
}
"""The file that makes a folder what it is; the first that is there decides (a bundle is a GenAI model as well)."""

KIND_NAMES: dict[Kind, str] = {
    "image": "a container image",
    "bundle": "an edgetune bundle",
    "adapter": "a LoRA adapter",
    "shipped": "what an app ships, made by `edgetune ship`",
    "unsealed": f"a bundle that has lost its {MANIFEST}",
    "model": "an ONNX Runtime GenAI model",
    "checkpoint": "a Hugging Face checkpoint",
    "folder": "a folder without anything that edgetune knows",
    "file": "a file, not a folder",
    "nothing": "not there",
}
"""How messages call each kind."""

_ADVICE: dict[Kind, str] = {
    "image": "; `edgetune import` takes the adapter out of one",
    "checkpoint": "; `edgetune prepare` makes a bundle of it",
    "unsealed": "; copy it again from its source",
}
"""What to do with it."""
_COPY_AGAIN = "copy the folder again from its source"


@dataclass(frozen=True)
class AdapterShape:
    """The trainable parameters in figures."""

    rank: int
    alpha: float
    target_modules: list[str]
    slots: int
    """Projections that carry an adapter."""
    parameters: int
    """Numbers in all A and B matrices."""
    rank_stabilised: bool
    """Whether alpha is divided by the root of the rank."""
    rank_pattern: dict[str, int]
    """Ranks of projections that have another one, as PEFT writes it."""
    alpha_pattern: dict[str, float]
    """Their alphas, in the same way."""
    dora: bool
    """Whether slots have magnitudes."""

    def in_words(self) -> str:
        """Ranks, alphas and the kind of slot."""
        fields = (self.rank_stabilised, self.rank_pattern, self.alpha_pattern, self.dora)
        return Lora(self.rank, self.alpha, [], [], *fields).in_words()


@dataclass(frozen=True)
class Description:
    """What `edgetune inspect` says. What a folder does not tell is None or empty."""

    kind: Kind
    path: Path
    verified: bool
    """Every file was found to be what the folder's manifest says; False when there is no manifest to compare with."""
    size: int
    """Bytes of all files."""
    files: list[File]
    base: BaseModel | None = None
    weights: str | None = None
    """How a model stores its weights: `int4` or `fp32`; those of a bundle are its base's."""
    architecture: Architecture | None = None
    tokenizer: Tokenizer | None = None
    lora: AdapterShape | None = None
    max_length: int | None = None
    """Longest row, in tokens: of training for a bundle, of prompt and answer for a model."""
    graphs: list[Graph] = field(default_factory=list)
    gradient_coverage: dict[str, int] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)
    """`.onnx_adapter` files of a model."""
    losses: dict[str, float] = field(default_factory=dict)
    """Answer losses that were measured when a model was exported."""
    provenance: dict[str, str] = field(default_factory=dict)


def kind_of(path: Path) -> Kind:
    """Recognise a folder by the files in it; nothing is read."""
    recover(path)
    if not path.is_dir():
        return "file" if path.exists() else "nothing"
    return next((kind for mark, kind in _MARKS.items() if is_there(path / mark)), "folder")


def describe(path: Path) -> Description:
    """Verify a folder and say what it is.

    Raises:
        UsageError: It is neither bundle, adapter nor model.
        IncompatibleError: A format or version that this edgetune does not read.
        VerificationError: A file is missing, changed, or not readable as what it should be.
    """
    kind = kind_of(path)
    if kind not in _DESCRIBERS:
        advice = _ADVICE.get(kind, "")
        raise UsageError(f"{path} is {KIND_NAMES[kind]}; expected a bundle, an adapter or a model{advice}")
    return _DESCRIBERS[kind](path)


def _describe_bundle(path: Path) -> Description:
    manifest = load_bundle(path).manifest
    return Description(
        kind="bundle",
        path=path,
        verified=True,
        size=sum(file.size for file in manifest.files),
        files=manifest.files,
        base=manifest.base,
        architecture=manifest.architecture,
        tokenizer=manifest.tokenizer,
        lora=_shape(manifest.lora),
        max_length=manifest.max_length,
        graphs=manifest.graphs,
        gradient_coverage=manifest.gradient_coverage,
        provenance=manifest.provenance,
    )


def _describe_adapter(path: Path) -> Description:
    if not is_there(path / ADAPTER_MANIFEST):
        return _describe_peft(path)
    manifest = load_manifest(path / ADAPTER_MANIFEST, AdapterManifest)
    verify_files(path, manifest.files)
    return replace(describe_contract(path, manifest), verified=True)


def describe_contract(path: Path, manifest: AdapterManifest) -> Description:
    """What an adapter's contract says of it; its files are not looked at."""
    return Description(
        kind="adapter",
        path=path,
        verified=False,
        size=sum(file.size for file in manifest.files),
        files=manifest.files,
        base=manifest.base,
        tokenizer=manifest.tokenizer,
        lora=_shape(manifest.lora),
        provenance=manifest.provenance,
    )


def _describe_peft(path: Path) -> Description:
    """An adapter that PEFT saved: its configuration and the shapes in its weights are all there is."""
    config = read_object(path / ADAPTER_CONFIG, _COPY_AGAIN)
    require_weights(path)
    tensors = read_header(path / ADAPTER_WEIGHTS, "copy it again from its source")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules") or []
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        message = f"{path / ADAPTER_CONFIG}: r and lora_alpha are {rank!r:.40} and {alpha!r:.40}, expected numbers"
        raise VerificationError(f"{message}; only LoRA adapters of PEFT are known")
    patterns = {key: config.get(key) or {} for key in PATTERNS}
    for key, pattern in patterns.items():
        if not is_pattern(key, pattern):
            message = f"{path / ADAPTER_CONFIG}: {key} is {pattern!r:.40}, expected numbers by names of modules"
            raise VerificationError(f"{message}; {_COPY_AGAIN}")
    # PEFT takes a pattern in the place of names as well.
    names = targets if isinstance(targets, list) else [targets]
    if not all(isinstance(name, str) for name in names):
        message = f"{path / ADAPTER_CONFIG}: target_modules are {targets!r:.40}, expected names"
        raise VerificationError(f"{message}; {_COPY_AGAIN}")
    files = list_files(path, without="")
    name = config.get("base_model_name_or_path")
    return Description(
        kind="adapter",
        path=path,
        verified=False,
        size=sum(file.size for file in files),
        files=files,
        base=BaseModel(name, sha256="", weights="") if isinstance(name, str) else None,
        lora=AdapterShape(
            rank=rank,
            alpha=alpha,
            target_modules=names,
            slots=sum(".lora_A." in tensor for tensor in shapes),
            parameters=sum(_count(shape) for shape in shapes.values()),
            rank_stabilised=config.get("use_rslora") is True,
            dora=config.get("use_dora") is True,
            **patterns,
        ),
    )


def _describe_model(path: Path) -> Description:
    manifest = open_model(path).manifest if is_there(path / MODEL_MANIFEST) else None
    if not isinstance(manifest, ModelManifest):
        return _describe_genai(path, list_files(path, without=""))
    return replace(
        _describe_genai(path, manifest.files),
        verified=True,
        base=manifest.base,
        weights=manifest.weights,
        tokenizer=manifest.tokenizer,
        lora=_shape(manifest.lora),
        losses=manifest.losses,
        provenance=manifest.provenance,
    )


def _describe_genai(path: Path, files: list[File]) -> Description:
    """Any GenAI model with a decoder: what its configuration and the graph itself tell."""
    from edgetune.formats.signature import read_signature

    source = path / GENAI_CONFIG
    config = read_object(source, _COPY_AGAIN)
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    file = decoder.get("filename") if isinstance(decoder, dict) else None
    if not isinstance(model, dict) or not isinstance(file, str):
        raise VerificationError(f"{source}: no model.decoder.filename; write it again with `edgetune export`")
    if Path(file).name != file or not (path / file).is_file():
        raise VerificationError(f"{source}: model.decoder.filename is {file!r}, expected a file in {path}")
    signature = read_signature(path / file)
    length = model.get("context_length")
    return Description(
        kind="model",
        path=path,
        verified=False,
        size=sum(entry.size for entry in files),
        files=files,
        max_length=length if isinstance(length, int) else None,
        graphs=[Graph("decoder", file, signature.inputs, signature.outputs)],
        adapters=[entry.path for entry in files if entry.path.endswith(".onnx_adapter")],
    )


_DESCRIBERS: dict[Kind, Callable[[Path], Description]] = {
    "bundle": _describe_bundle,
    "adapter": _describe_adapter,
    "model": _describe_model,
}


def _shape(lora: Lora) -> AdapterShape:
    return AdapterShape(
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=lora.target_modules,
        slots=len(lora.slots),
        parameters=lora.parameters,
        rank_stabilised=lora.rank_stabilised,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        dora=lora.dora,
    )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
