"""What model builders see of a checkpoint: its weights and its tokenizer, described in the layout that they read.

Builders read descriptions that may name Python files in the folder (`auto_map`), and they are of transformers 4, while
many checkpoints are saved with transformers 5. So they get a folder of links in the checkpoint's place, whose
descriptions name no code and are in transformers 4's layout.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgetune.formats.json_file import read_object
from edgetune.host.checkpoint import FAMILY_CLASS, SIDE_FILES, TOKENIZER, TOKENIZER_CONFIG, Checkpoint
from edgetune.host.rope_config import with_older_rope_keys

_FROM_FILE = "PreTrainedTokenizerFast"
"""transformers 4's class that takes `tokenizer.json` as it is."""
_OLDER_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", _FROM_FILE)
"""What the Phi-3 family's checkpoints name, and transformers 4 knows."""
_NEWER_MARK = "backend"
"""A key that transformers 5 writes into every `tokenizer_config.json`."""
_ADDED = "added_tokens_decoder"
_TOKENIZER_KEYS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", _ADDED, "additional_special_tokens",
    "bos_token", "chat_template", "clean_up_tokenization_spaces", "cls_token", "eos_token", "errors", "legacy",
    "mask_token", "model_max_length", "pad_token", "padding_side", "sep_token", "sp_model_kwargs", "tokenizer_class",
    "unk_token", "use_default_system_prompt",
)  # fmt: skip
"""What transformers 4 reads of `tokenizer_config.json`. Others name code, or have a layout that it stumbles over."""


def builder_view(checkpoint: Checkpoint, folder: Path) -> Path:
    """Make `folder` a view of the checkpoint: links to weights and tokenizer, and descriptions of its own.

    An adapter that lies beside the weights is left out; transformers would load it as well.

    Args:
        checkpoint: The checked checkpoint; it is left as it is.
        folder: The folder to make.

    Returns:
        `folder`.
    """
    folder.mkdir()
    for file in checkpoint.weight_files:
        _link(file, folder / file.name)
    for name in SIDE_FILES:
        if (checkpoint.path / name).is_file():
            _link(checkpoint.path / name, folder / name)
    _write(folder / "config.json", _config(checkpoint))
    if (checkpoint.path / TOKENIZER_CONFIG).is_file():
        described = read_object(checkpoint.path / TOKENIZER_CONFIG, "copy or fetch the checkpoint again")
        _write(folder / TOKENIZER_CONFIG, _tokenizer_config(described))
    _copy_tokenizer(checkpoint.path / TOKENIZER, folder / TOKENIZER)
    return folder


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = with_older_rope_keys({key: value for key, value in checkpoint.config.items() if key != "auto_map"})
    longest = checkpoint.architecture.max_position_embeddings
    # GenAI's builder takes the factors of longrope if, and only if, these two differ.
    if config["rope_scaling"] is None:
        config["original_max_position_embeddings"] = longest
    elif config["original_max_position_embeddings"] == longest:
        config["original_max_position_embeddings"] = longest + 1  # no row is that long: the short factors hold for all
    return config | {"max_position_embeddings": longest, "architectures": [FAMILY_CLASS]}


def _tokenizer_config(described: dict[str, Any]) -> dict[str, Any]:
    known = {key: described[key] for key in _TOKENIZER_KEYS if described.get(key) is not None}
    if _NEWER_MARK not in described and known.get("tokenizer_class", _FROM_FILE) in _OLDER_CLASSES:
        return known
    # transformers 5 leaves out what would keep the older classes from adding tokens of their own accord.
    return {key: value for key, value in known.items() if key != _ADDED} | {"tokenizer_class": _FROM_FILE}


def _copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer without the truncation and padding of whatever text it was last used for."""
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    if tokenizer.get("truncation") is None and tokenizer.get("padding") is None:
        _link(source, target)
    else:
        _write(target, tokenizer | {"truncation": None, "padding": None})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source.resolve())
    except OSError:  # Windows wants a privilege for that
        shutil.copyfile(source, target)
