"""The files of an ONNX Runtime GenAI model folder, and opening one that a bundle is or an export wrote."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from edgetune.errors import UsageError, VerificationError
from edgetune.formats.bundle import MANIFEST as BUNDLE_MANIFEST
from edgetune.formats.bundle import Bundle, is_there, load_bundle, load_manifest, verify_files
from edgetune.formats.json_file import read_object
from edgetune.formats.manifest import BundleManifest, ModelManifest, RowEncoding
from edgetune.formats.storage import recover
from edgetune.model.blocks import BLOCK_SIZE

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
CONFIG = "genai_config.json"
MANIFEST = "edgetune.json"

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
    def encoding(self) -> RowEncoding:
        """How prompts are encoded."""
        return self.manifest.encoding if isinstance(self.manifest, ModelManifest) else RowEncoding()

    @property
    def adapter(self) -> Path | None:
        """The `.onnx_adapter` that is active unless another is asked for."""
        name = self.manifest.adapter if isinstance(self.manifest, ModelManifest) else None
        return None if name is None else self.path / name


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
    if isinstance(manifest, ModelManifest) and manifest.adapter is not None and manifest.adapter not in listed:
        raise VerificationError(f"{path / MANIFEST}: adapter {manifest.adapter!r:.80} is not a listed file")
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
