"""A Hugging Face folder of the Phi-3 family: found, checked, and copied without anything that could run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import EdgetuneError, IncompatibleError, UsageError, VerificationError
from edgetune.formats.git_lfs import refuse_pointers
from edgetune.formats.json_file import read_object
from edgetune.formats.safetensors_file import FLOATS, non_finite, read_header
from edgetune.formats.storage import require_unicode, sha256_of
from edgetune.host.rope_config import rope_from_config
from edgetune.model.architecture import Architecture, tensor_shapes
from edgetune.model.blocks import BLOCK_SIZE

FAMILY = "phi3"
FAMILY_CLASS = "Phi3ForCausalLM"
"""What configs call the model's class."""
FETCHED = ("*.safetensors", "*.json", "*.jinja")
"""What is fetched of a hub repository: weights and descriptions, no code and no pickles."""
_AGAIN = "copy or fetch the checkpoint again"
CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SIDE_FILES = (
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
"""What model builders read beside weights, `config.json` and these two."""
_FREQUENCIES = "rotary_emb.inv_freq"
"""End of the names of tensors that older checkpoints hold, and nobody reads."""
_SHOWN = 10
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SNAPSHOT = re.compile(r"models--(?P<repository>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})")
"""How the hub's cache names the folder of a repository (its slash becomes two hyphens) at a revision."""
_GENAI_ROTARY_MULTIPLE = 16


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint."""

    path: Path
    name: str
    """Hub id, also of a folder in the hub's cache; otherwise the folder's name."""
    config: dict[str, Any]
    architecture: Architecture
    weights: list[Path]
    """The safetensors files."""
    revision: str | None = None
    """The hub's commit, 40 hexadecimal digits; None for a folder that is not in the hub's cache."""

    def sha256(self) -> str:
        """Identity of the model: SHA-256 over names and hashes of the safetensors files."""
        digest = hashlib.sha256()
        for path in self.weights:
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        return digest.hexdigest()

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, and the index that lists them where there are several."""
        return self.weights if self.weights[0].name == _SINGLE else [*self.weights, self.path / _INDEX]


def open_checkpoint(source: str, *, download: bool, blocks: bool) -> Checkpoint:
    """Find a checkpoint and check that it is of the Phi-3 family and complete.

    Args:
        source: A local folder, or a hub id that lies in the local cache.
        download: Fetch a hub id that does not.
        blocks: The frozen weights will be quantised in blocks of 32.

    Raises:
        UsageError: There is no such folder, or a hub id is not in the cache.
        IncompatibleError: Another family, a quantised checkpoint, or sizes that the runtimes cannot take.
        VerificationError: The folder is incomplete, broken, or holds pickles in the place of safetensors.
    """
    path = _locate(source, download=download)
    refuse_pointers([path / name for name in (CONFIG, _SINGLE, _INDEX, TOKENIZER, TOKENIZER_CONFIG, *SIDE_FILES)])
    config = _read_json(path / CONFIG)
    _check_family(path, config)
    architecture = read_architecture(config)
    weights = _find_weights(path)
    refuse_pointers(weights)
    _check_tensors(path, weights, architecture)
    _check_tokenizer(path, config, architecture)
    _check_sizes(architecture, blocks=blocks)
    cached, revision = _snapshot(path)
    name = (cached or path.resolve().name) if Path(source).is_dir() else source
    return Checkpoint(path, name, config, architecture, weights, revision)


def _locate(source: str, *, download: bool) -> Path:
    path = Path(source)
    if path.is_dir():
        require_unicode(path)
        _refuse_lost_links(path)
        if not (path / CONFIG).is_file():
            raise UsageError(f"{path}: no config.json; expected a Hugging Face model folder")
        return path
    if path.exists():
        raise UsageError(f"{path}: is a file; expected a Hugging Face model folder")
    if not _HUB_ID.fullmatch(source):
        raise UsageError(f"{source}: no such folder, and not a hub id such as microsoft/Phi-3-mini-4k-instruct")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's client is imported
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(FETCHED), local_files_only=not download))
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        fix = "check the network" if download else "add --download to fetch it, or give a local folder"
        raise UsageError(f"{source}: no such folder, and not in the local hub cache; {fix}") from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EdgetuneError(f"{source}: cannot be fetched: {reason}") from error


def _refuse_lost_links(path: Path) -> None:
    """Refuse what is left of a folder of the hub's cache that was copied without the blobs that its links lead to."""
    lost = sorted(
        name
        for pattern in (*FETCHED, "merges.txt")
        for name in (file.name for file in path.glob(pattern) if file.is_symlink() and not file.exists())
    )
    if lost:
        raise VerificationError(
            f"{path}: links that lead nowhere: {', '.join(lost[:_SHOWN])}; copy the folder again from its source with "
            "`cp -rL`, or fetch it from the hub with `--local-dir`"
        )


def _snapshot(path: Path) -> tuple[str | None, str | None]:
    """Hub id and revision of a folder in the hub's cache; None and None elsewhere."""
    found = _SNAPSHOT.fullmatch(str(Path(*path.resolve().parts[-3:])))
    return (found["repository"].replace("--", "/", 1), found["revision"]) if found else (None, None)


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, _AGAIN)


def _check_family(path: Path, config: dict[str, Any]) -> None:
    family = config.get("model_type")
    if family != FAMILY:
        raise IncompatibleError(
            f"{path}: model family is {family!r}, expected {FAMILY!r} "
            "(Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4-mini)"
        )
    if config.get("quantization_config"):
        raise IncompatibleError(f"{path}: the checkpoint is quantised already; expected fp32, bf16 or fp16 weights")


def _find_weights(path: Path) -> list[Path]:
    """The safetensors files that transformers reads: `model.safetensors`, or else those that the index lists."""
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    if not (path / _INDEX).is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        found = f"only {', '.join(pickles)}, which can hold code" if pickles else "neither"
        raise VerificationError(
            f"{path}: expected {_SINGLE} or {_INDEX}, found {found}; "
            "save it again with save_pretrained(safe_serialization=True)"
        )
    places = _read_json(path / _INDEX).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name or Path(name).suffix != ".safetensors" for name in names):
        raise VerificationError(f"{path / _INDEX}: expected a weight_map to safetensors files in the same folder")
    if missing := [name for name in names if not (path / name).is_file()]:
        raise VerificationError(f"{path}: {', '.join(missing)} is missing; {_AGAIN}")
    return [path / name for name in names]


def _check_tensors(path: Path, weights: list[Path], architecture: Architecture) -> None:
    found: dict[str, tuple[int, ...]] = {}
    problems = []
    for file in weights:
        for name, tensor in read_header(file).items():
            if name in found:
                problems.append(f"{name} lies in two files")
            if tensor.dtype not in FLOATS:
                problems.append(f"{name} is of type {tensor.dtype}, expected one of {', '.join(FLOATS)}")
            found[name] = tensor.shape
    if architecture.num_hidden_layers > len(found):  # a list of what a billion layers hold would fill the memory
        raise VerificationError(
            f"{path}: config.json says {architecture.num_hidden_layers:,} layers, the weights are {len(found)} tensors"
        )
    expected = tensor_shapes(architecture)
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name] != shape:
            problems.append(f"{name} has shape {list(found[name])}, config.json says {list(shape)}")
    # A tied head may be there twice.
    extra = (name for name in found if name not in expected and not name.endswith(_FREQUENCIES))
    problems += [f"{name} is not part of a Phi-3 model" for name in extra if name != "lm_head.weight"]
    if problems:
        raise VerificationError(f"{path}: {_told(problems)}")


def refuse_non_finite(checkpoint: Checkpoint) -> None:
    """Refuse weights that are NaN or infinity: every loss and every answer would be, too.

    All weights are read once, in pieces of 1 MiB.

    Raises:
        VerificationError: Naming the tensors.
    """
    wrong = [
        f"{name} ({file.name})"
        for file in checkpoint.weights
        for name in non_finite(
            file, ((name, tensor) for name, tensor in read_header(file).items() if not name.endswith(_FREQUENCIES))
        )
    ]
    if wrong:
        raise VerificationError(
            f"{checkpoint.path}: NaN or infinity in {len(wrong)} of the weights: {_told(wrong)}; nothing can be "
            "trained on such a model: take the checkpoint of an earlier step, or download it again"
        )


def _told(problems: list[str]) -> str:
    hidden = f"; … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + hidden


def _check_tokenizer(path: Path, config: dict[str, Any], architecture: Architecture) -> None:
    from tokenizers import Tokenizer

    file = path / TOKENIZER
    if not file.is_file():
        raise VerificationError(
            f"{path}: tokenizer.json is missing; "
            "write it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        tokens = Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # the only class that tokenizers raises
        raise VerificationError(f"{file}: not a tokenizer ({error}); {_AGAIN}") from error
    if (path / TOKENIZER_CONFIG).is_file():
        _read_json(path / TOKENIZER_CONFIG)
    largest, pad = max(tokens.values(), default=0), config.get("pad_token_id")
    if largest >= architecture.vocab_size:
        raise VerificationError(f"{file}: has token {largest}, config.json says vocab_size {architecture.vocab_size}")
    if pad is not None and not (type(pad) is int and 0 <= pad < architecture.vocab_size):
        raise VerificationError(f"{path / 'config.json'}: pad_token_id is {pad!r:.40}; expected a token's id or null")


def _check_sizes(architecture: Architecture, *, blocks: bool) -> None:
    """Refuse sizes that the runtimes cannot take, all of them at once."""
    problems = []
    if architecture.rope.dim % _GENAI_ROTARY_MULTIPLE:
        problems.append(
            f"{architecture.rope.dim} rotated dimensions a head, "
            f"ONNX Runtime GenAI takes multiples of {_GENAI_ROTARY_MULTIPLE}"
        )
    if architecture.num_attention_heads % architecture.num_key_value_heads:
        problems.append(
            f"num_attention_heads is {architecture.num_attention_heads}, "
            f"which is no multiple of num_key_value_heads {architecture.num_key_value_heads}"
        )
    inputs = {
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_attention_heads · head_dim": architecture.num_attention_heads * architecture.head_dim,
    }
    if blocks:
        problems += [
            f"{name} is {size}, blocks need a multiple of {BLOCK_SIZE} (use --base fp16 or fp32)"
            for name, size in inputs.items()
            if size % BLOCK_SIZE
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
    tokenizer_config = checkpoint.path / TOKENIZER_CONFIG
    template = _read_json(tokenizer_config).get("chat_template") if tokenizer_config.is_file() else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not template or not isinstance(template, str):
        return False
    target.write_text(template, encoding="utf-8")
    return True


def read_architecture(config: dict[str, Any]) -> Architecture:
    """Sizes from a Phi-3 `config.json`.

    Raises:
        VerificationError: A size is missing or not a positive number; all are named.
    """
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    optional = (
        "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings",
        "sliding_window",
    )  # fmt: skip
    given = [*required, *(key for key in optional if config.get(key) is not None)]
    wrong = [f"{key} is {config.get(key)!r:.40}" for key in given if not _is_size(config.get(key))]
    if wrong:
        raise VerificationError(f"config.json: {', '.join(wrong)}; expected whole numbers from 1 to 2^31 − 1")
    heads = config["num_attention_heads"]
    return Architecture(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings") or 4096,
        sliding_window=config.get("sliding_window"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=rope_from_config(config),
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31
