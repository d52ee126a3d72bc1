"""The files of an ONNX Runtime GenAI model folder, and opening one that a bundle is or an export wrote."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

from edgetune.errors import UsageError, VerificationError
from edgetune.formats.bundle import MANIFEST as BUNDLE_MANIFEST
from edgetune.formats.bundle import Bundle, is_there, load_bundle, load_manifest, verify_files
from edgetune.formats.json_file import read_object
from edgetune.formats.manifest import BundleManifest, ModelManifest, RowEncoding
from edgetune.formats.storage import recover
from edgetune.model.blocks import BLOCK_SIZE
from edgetune.text.suggestion import did_you_mean

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
CONFIG = "genai_config.json"
MANIFEST = "edgetune.json"
ADAPTERS, ADAPTER_SUFFIX = "adapters", ".onnx_adapter"
"""Folder of kept adapters, and how their files' names end."""
BASE = "base"
"""Stands for no adapter where an adapter's name is asked for, and so is none."""

QUANTISED = {4: "_Q4", 8: "_Q8"}
"""What the builder adds to the name of a weight that it puts into blocks, by their bits."""
BLOCKS_DOMAIN = "com.microsoft"
"""Domain of `MatMulNBits`, an operator of ONNX Runtime's own."""
HALF = ".half"
"""What the name of a weight that is stored in fp16 has at its end; a `Cast` gives the weight itself."""
ACCURACY_LEVEL = 1
"""`MatMulNBits` computes in fp32, as the training graphs do (docs/decisions/0003-int4-accuracy-level.md)."""

SIDE_FILES = (
    CONFIG,
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What a folder holds beside graph and weights; a model without a chat template has no `chat_template.jinja`."""

_REQUIRED = (MODEL, WEIGHTS, CONFIG, "tokenizer.json")
_KNOWN_KEYS = {
    (): {"model", "search"},
    ("model",): {
        "bos_token_id", "context_length", "decoder", "eos_token_id", "pad_token_id", "type", "vocab_size",
    },
    ("model", "decoder"): {
        "filename", "head_size", "hidden_size", "inputs", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "outputs", "session_options",
    },
    ("model", "decoder", "session_options"): {"log_id", "provider_options"},
}  # fmt: skip
"""All that edgetune writes into `genai_config.json`. GenAI knows more, some of it loads libraries."""
_MAKE_ANEW = "make the folder anew"


def block_attributes(outputs: int, inputs: int, bits: int) -> dict[str, int]:
    """The attributes of the `MatMulNBits` that multiplies with a weight (outputs, inputs) in blocks."""
    return {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK_SIZE, "accuracy_level": ACCURACY_LEVEL}


def weight_name(stored: str) -> str:
    """The name of a weight, whatever it is stored as."""
    for suffix in (*QUANTISED.values(), HALF):
        stored = stored.removesuffix(suffix)
    return stored


def adapter_file(name: str) -> str:
    """Where a kept adapter lies in the model folder."""
    return f"{ADAPTERS}/{name}{ADAPTER_SUFFIX}"


def _adapter_name(file: str) -> str:
    return PurePosixPath(file).name.removesuffix(ADAPTER_SUFFIX)


@dataclass(frozen=True)
class Answering:
    """What of a model answers: the base, with an adapter or alone."""

    name: str
    """Of the adapter; `BASE` where there is none, also of a merged model."""
    adapter: Path | None
    """The `.onnx_adapter`."""
    encoding: RowEncoding
    """How its prompts are encoded."""


@dataclass(frozen=True)
class GenaiModel:
    """A verified model folder."""

    path: Path
    manifest: BundleManifest | ModelManifest
    context_length: int
    """Most tokens of prompt and answer together."""
    eos_token_ids: tuple[int, ...]
    """Each of them ends an answer."""

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters beside the base; the first answers unless another is asked for."""
        if not isinstance(self.manifest, ModelManifest) or self.manifest.adapter is None:
            return []
        first = _adapter_name(self.manifest.adapter)
        return [first, *(name for name in self.manifest.adapters if name != first)]

    def answering(self, name: str | None = None) -> Answering:
        """What answers.

        Args:
            name: One of the adapters, or `BASE` for the base alone; without it the first of them.

        Raises:
            UsageError: There is no adapter of this name.
        """
        names = self.adapters
        if name == BASE and (names or isinstance(self.manifest, BundleManifest)):
            return Answering(BASE, None, RowEncoding())
        if name is not None and name not in names:
            if not names:
                raise UsageError(f"{self.path} has no adapters beside its base, so there is no {name!r:.60} to choose")
            known = [*names, BASE]
            raise UsageError(
                f"{self.path} has no adapter {name!r:.60}{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
        encoding = RowEncoding()
        if isinstance(self.manifest, ModelManifest):
            encoding = self.manifest.adapters.get(name or "", self.manifest.encoding)
        if not names:
            return Answering(BASE, None, encoding)
        chosen = name or names[0]
        return Answering(chosen, self.path / self._file_of(chosen), encoding)

    def _file_of(self, adapter: str) -> str:
        first = self.manifest.adapter if isinstance(self.manifest, ModelManifest) else None
        return first if first is not None and _adapter_name(first) == adapter else adapter_file(adapter)


def open_model(model: Bundle | str | PathLike[str]) -> GenaiModel:
    """Open a bundle or an exported model, and verify it.

    Args:
        model: Its folder; or a bundle that is loaded, and so verified.

    Raises:
        UsageError: There is neither at the path.
        IncompatibleError: A format or version that this edgetune does not read.
        VerificationError: A file is missing, changed or not listed, or the configuration could do harm.
    """
    manifest: BundleManifest | ModelManifest
    path = model.path if isinstance(model, Bundle) else Path(model)
    recover(path)
    if isinstance(model, Bundle):
        manifest = model.manifest
    elif is_there(path / BUNDLE_MANIFEST):
        manifest = load_bundle(path).manifest
    elif is_there(path / MANIFEST):
        manifest = load_manifest(path / MANIFEST, ModelManifest)
        verify_files(path, manifest.files)
    elif (path / CONFIG).is_file():
        raise VerificationError(
            f"{path}: a GenAI model without {MANIFEST} to verify it against; write it with `edgetune export`"
        )
    else:
        raise UsageError(f"{path}: no model here; give a bundle, or a folder that `edgetune export` wrote")
    listed = {file.path for file in manifest.files}
    if missing := [name for name in _REQUIRED if name not in listed]:
        raise VerificationError(f"{path}: its manifest does not list {', '.join(missing)}; make the folder anew")
    if strange := [name for name in SIDE_FILES if name not in listed and (path / name).exists()]:
        raise VerificationError(f"{path}: its manifest does not list {', '.join(strange)}; remove what is foreign")
    if isinstance(manifest, ModelManifest) and manifest.adapter is not None:
        for file in (manifest.adapter, *map(adapter_file, manifest.adapters)):
            if file not in listed:
                raise VerificationError(f"{path / MANIFEST}: adapter {file!r:.80} is not a listed file")
        if manifest.adapters and _adapter_name(manifest.adapter) not in manifest.adapters:
            raise VerificationError(f"{path / MANIFEST}: adapter {manifest.adapter!r:.80} is not one of its adapters")
    config = _check_config(path / CONFIG)["model"]
    return GenaiModel(path, manifest, config["context_length"], _ends(config))


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Ids of the tokens that end an answer, in a folder whose files are verified.

    Raises:
        VerificationError: The configuration could do harm.
    """
    return _ends(_check_config(folder / CONFIG)["model"])


def _ends(model: dict[str, Any]) -> tuple[int, ...]:
    ends = model["eos_token_id"]
    return tuple(ends) if isinstance(ends, list) else (ends,)


def _check_config(path: Path) -> dict[str, Any]:
    """Refuse what could load code or leave the folder, and figures that are none."""
    config = read_object(path, _MAKE_ANEW)
    for place, known in _KNOWN_KEYS.items():
        section = _section(config, place)
        name = ".".join(place) or "the file"
        if not isinstance(section, dict):
            raise VerificationError(f"{path}: {name} is not an object; {_MAKE_ANEW}")
        if unknown := sorted(section.keys() - known):
            raise VerificationError(f"{path}: {name} has keys that edgetune does not write: {', '.join(unknown)}")
    if "decoder" not in config.get("model", {}):
        missing = "model.decoder" if "model" in config else "model"
        raise VerificationError(f"{path}: {missing} is missing; {_MAKE_ANEW}")
    decoder = config["model"]["decoder"]
    if decoder.get("filename") != MODEL:
        raise VerificationError(f"{path}: decoder.filename is {decoder.get('filename')!r:.80}, expected {MODEL!r}")
    if decoder.get("session_options", {}).get("provider_options", []) != []:
        raise VerificationError(f"{path}: provider_options are set, which can load libraries; edgetune writes none")
    length, ends = config["model"].get("context_length"), config["model"].get("eos_token_id")
    if not _is_count(length) or length < 1:
        raise VerificationError(f"{path}: context_length is {length!r:.40}, expected a positive integer")
    listed = ends if isinstance(ends, list) else [ends]
    if not listed or not all(_is_count(end) for end in listed):
        raise VerificationError(f"{path}: eos_token_id is {ends!r:.40}, expected token ids")
    return config


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _section(config: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        config = config.get(key, {}) if isinstance(config, dict) else None
    return config
