"""A Phi-3 checkpoint written by hand, without torch; and what an attacker could put beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.host.checkpoint import Checkpoint, open_checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
SHAPES = {
    "model.embed_tokens.weight": (64, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.self_attn.qkv_proj.weight": (64 + 2 * 32, 64),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
    "model.layers.0.post_attention_layernorm.weight": (64,),
    "model.layers.0.mlp.gate_up_proj.weight": (2 * 96, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.norm.weight": (64,),
    "lm_head.weight": (64, 64),
}
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:b7492726c01287bf6e13c3d74c65ade3d436d50da1cf5bb6925bc962419d6610\nsize 4972489328\n"
)
"""What lies in the place of a file that Git LFS has not fetched."""
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"


def tensors() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    generator = np.random.default_rng(0)
    return {name: (0.1 * generator.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def write_checkpoint(folder: Path, **config: Any) -> Path:
    """Write the checkpoint; `config` changes its configuration."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG | config)
    save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.add_special_tokens(TOKENS[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", described | {"unk_token": "<unk>", "chat_template": TEMPLATE})
    return folder


def opened(folder: Path, *, blocks: bool = True) -> Checkpoint:
    return open_checkpoint(str(folder), download=False, blocks=blocks)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def shard(folder: Path) -> None:
    """Cut the weights into two files with an index."""
    from safetensors.numpy import save_file

    (folder / "model.safetensors").unlink()
    values = tensors()
    places: dict[str, str] = {}
    for number, names in enumerate([list(values)[:4], list(values)[4:]], 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: values[name] for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def plant_code(folder: Path, marker: Path) -> None:
    """Make every `auto_map` that transformers knows point to code that writes `marker` when it is imported."""
    code = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\n"
    classes = {
        "configuration_evil": "from transformers import Phi3Config as EvilConfig",
        "modeling_evil": "from transformers import Phi3ForCausalLM as EvilModel",
        "tokenization_evil": "from transformers import PreTrainedTokenizerFast as EvilTokenizer",
    }
    for name, line in classes.items():
        (folder / f"{name}.py").write_text(f"{code}{line}\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name, mapped in {
        "config.json": {
            "AutoConfig": "configuration_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.EvilModel",
            "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"],
        },
        "tokenizer_config.json": {
            "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]
        },
    }.items():
        content = json.loads((folder / name).read_text())
        write_json(folder / name, content | {"auto_map": mapped})


def as_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` with the keys that transformers 5 writes in the place of transformers 4's."""
    newer = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    partial, scaling = config.get("partial_rotary_factor", 1.0), config.get("rope_scaling")
    parameters = {"rope_theta": config.get("rope_theta", 10000.0), "partial_rotary_factor": partial}
    if scaling is None:
        parameters["rope_type"] = "default"
    else:
        original = config.get("original_max_position_embeddings", 4096)
        longrope = {"rope_type": "longrope", "type": scaling.get("type", "longrope")}
        parameters |= {**scaling, **longrope, "original_max_position_embeddings": original}
    if "torch_dtype" in config:
        newer["dtype"] = config["torch_dtype"]
    return newer | {"rope_parameters": parameters, "transformers_version": "5.24.0"}
