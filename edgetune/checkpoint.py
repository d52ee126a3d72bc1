"""A Hugging Face folder of the Phi-3 family: found, checked, and copied without anything that could run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import EdgetuneError, IncompatibleError, UsageError, VerificationError
from edgetune.manifest import Architecture
from edgetune.rope import rope_from_config
from edgetune.storage import sha256_of

FAMILY = "phi3"
FETCHED = ("*.safetensors", "*.json", "*.jinja")
"""What is fetched of a hub repository: weights and descriptions, no code and no pickles."""
_HUB_ID = r"^[\w.-]+/[\w.-]+$"
_INT4_BLOCK = 32
_GENAI_ROTARY_MULTIPLE = 16


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint."""

    path: Path
    name: str
    """Folder name or hub id."""
    config: dict[str, Any]
    architecture: Architecture
    weights: list[Path]
    """The safetensors files."""

    def sha256(self) -> str:
        """Identity of the model: SHA-256 over names and hashes of the safetensors files."""
        digest = hashlib.sha256()
        for path in self.weights:
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        return digest.hexdigest()

    def without_code(self, folder: Path) -> Path:
        """Make `folder` a view of the checkpoint: links to weights and tokenizer, a config that names no code.

        Model builders read configs that may point to Python files in the folder (`auto_map`); this view has neither.
        """
        folder.mkdir()
        for path in self.path.iterdir():
            if path.suffix in (".safetensors", ".json", ".jinja") and path.name != "config.json":
                (folder / path.name).symlink_to(path.resolve())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in self.config.items() if k != "auto_map"}))
        tokenizer_config = folder / "tokenizer_config.json"
        if tokenizer_config.exists():
            content = json.loads(tokenizer_config.read_text())
            content.pop("auto_map", None)
            tokenizer_config.unlink()
            tokenizer_config.write_text(json.dumps(content, ensure_ascii=False))
        return folder


def open_checkpoint(source: str, *, download: bool, int4: bool) -> Checkpoint:
    """Find a checkpoint and check that it is of the Phi-3 family and complete.

    Args:
        source: A local folder, or a hub id that lies in the local cache.
        download: Fetch a hub id that does not.
        int4: The frozen weights will be quantised in blocks of 32.

    Raises:
        UsageError: There is no such folder, or a hub id is not in the cache.
        IncompatibleError: Another family, a quantised checkpoint, or sizes that the runtimes cannot take.
        VerificationError: The folder is incomplete, broken, or holds pickles in the place of safetensors.
    """
    path = _locate(source, download=download)
    config = _read_json(path / "config.json")
    _check_family(path, config)
    architecture = read_architecture(config)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        found = f"only {', '.join(pickles)}, which can hold code" if pickles else "no weights"
        raise VerificationError(
            f"{path}: expected model.safetensors, found {found}; "
            "save it again with save_pretrained(safe_serialization=True)"
        )
    if not (path / "tokenizer.json").is_file():
        raise VerificationError(
            f"{path}: tokenizer.json is missing; "
            "write it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    _check_tensors(path, weights, architecture)
    _check_sizes(architecture, int4=int4)
    return Checkpoint(path, source.rstrip("/") if path.name not in source else path.name, config, architecture, weights)


def read_architecture(config: dict[str, Any]) -> Architecture:
    """Sizes from a Phi-3 `config.json`.

    Raises:
        VerificationError: A size is missing or not a positive number; all are named.
    """
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    wrong = [f"{key} is {config.get(key)!r}" for key in required if not _is_size(config.get(key))]
    if wrong:
        raise VerificationError(f"config.json: {', '.join(wrong)}; expected positive integers")
    heads = config["num_attention_heads"]
    return Architecture(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings", 4096),
        sliding_window=config.get("sliding_window"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=rope_from_config(config),
    )


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this architecture holds; a tied head has none of its own."""
    a = architecture
    queries = a.num_attention_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (a.hidden_size,)
        shapes[f"{prefix}.self_attn.qkv_proj.weight"] = (
            queries + 2 * a.num_key_value_heads * a.head_dim,
            a.hidden_size,
        )
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (a.hidden_size, queries)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (a.hidden_size,)
        shapes[f"{prefix}.mlp.gate_up_proj.weight"] = (2 * a.intermediate_size, a.hidden_size)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (a.hidden_size, a.intermediate_size)
    shapes["model.norm.weight"] = (a.hidden_size,)
    if not a.tie_word_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _locate(source: str, *, download: bool) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{path}: no config.json; expected a Hugging Face model folder")
        return path
    if path.exists():
        raise UsageError(f"{path}: is a file; expected a Hugging Face model folder")
    import re

    if not re.match(_HUB_ID, source):
        raise UsageError(f"{source}: no such folder, and not a hub id such as microsoft/Phi-3-mini-4k-instruct")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return Path(snapshot_download(source, allow_patterns=list(FETCHED), local_files_only=not download))
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        fix = "check the network" if download else "add --download to fetch it, or give a local folder"
        raise UsageError(f"{source}: no such folder, and not in the local hub cache; {fix}") from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EdgetuneError(f"{source}: cannot be fetched: {reason}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise VerificationError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise VerificationError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _check_family(path: Path, config: dict[str, Any]) -> None:
    family = config.get("model_type")
    if family != FAMILY:
        raise IncompatibleError(
            f"{path}: model family is {family!r}, expected {FAMILY!r} "
            "(Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4-mini)"
        )
    if config.get("quantization_config"):
        raise IncompatibleError(f"{path}: the checkpoint is quantised already; expected fp32, bf16 or fp16 weights")


def _check_tensors(path: Path, weights: list[Path], architecture: Architecture) -> None:
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in weights:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    found[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise VerificationError(f"{file}: not a valid safetensors file ({error})") from error
    problems = []
    for name, shape in tensor_shapes(architecture).items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name] != shape:
            problems.append(f"{name} has shape {list(found[name])}, config.json says {list(shape)}")
    if problems:
        hidden = f"; … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise VerificationError(f"{path}: {'; '.join(problems[:10])}{hidden}")


def _check_sizes(architecture: Architecture, *, int4: bool) -> None:
    problems = []
    if architecture.rope.dim % _GENAI_ROTARY_MULTIPLE:
        problems.append(
            f"{architecture.rope.dim} rotated dimensions a head, "
            f"ONNX Runtime GenAI takes multiples of {_GENAI_ROTARY_MULTIPLE}"
        )
    inputs = {
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_attention_heads · head_dim": architecture.num_attention_heads * architecture.head_dim,
    }
    if int4:
        problems += [
            f"{name} is {size}, int4 blocks need a multiple of {_INT4_BLOCK} (use --base fp32)"
            for name, size in inputs.items()
            if size % _INT4_BLOCK
        ]
    if problems:
        raise IncompatibleError("; ".join(problems))


def copy_chat_template(checkpoint: Checkpoint, folder: Path) -> bool:
    """Write the model's chat template to `chat_template.jinja`; False when it has none.

    A list of named templates is reduced to the one called `default`.
    """
    source = checkpoint.path / "chat_template.jinja"
    target = folder / "chat_template.jinja"
    if source.is_file():
        shutil.copyfile(source, target)
        return True
    tokenizer_config = checkpoint.path / "tokenizer_config.json"
    template = _read_json(tokenizer_config).get("chat_template") if tokenizer_config.is_file() else None
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if not template:
        return False
    target.write_text(template, encoding="utf-8")
    return True
