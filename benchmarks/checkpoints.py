"""Random Phi-3 checkpoints in the sizes that the benchmark measures, written layer by layer.

python benchmarks/checkpoints.py full FOLDER [--layers 8]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_WORDS = "the lamp in the kitchen is on now, turn it off and tell me the answer: hello world, what is it?"


@dataclass(frozen=True)
class Size:
    """Shape of a Phi-3 model; embedding and head apart."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    positions: int = 4096
    key_value_heads: int | None = None
    """Where several heads share keys and values."""

    @property
    def qkv(self) -> int:
        """Output channels of queries, keys and values together."""
        groups = self.heads if self.key_value_heads is None else self.key_value_heads
        return self.hidden // self.heads * (self.heads + 2 * groups)

    def shapes(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Names and shapes of the weights, grouped as the files hold them: the ends, then each layer."""
        ends = (self.vocabulary, self.hidden)
        yield {"model.embed_tokens.weight": ends, "model.norm.weight": (self.hidden,), "lm_head.weight": ends}
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            yield {
                f"{layer}.input_layernorm.weight": (self.hidden,),
                f"{layer}.self_attn.qkv_proj.weight": (self.qkv, self.hidden),
                f"{layer}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{layer}.post_attention_layernorm.weight": (self.hidden,),
                f"{layer}.mlp.gate_up_proj.weight": (2 * self.intermediate, self.hidden),
                f"{layer}.mlp.down_proj.weight": (self.hidden, self.intermediate),
            }


SIZES = {
    "small": Size(hidden=768, intermediate=2048, layers=12, heads=12, vocabulary=8192),
    "full": Size(hidden=3072, intermediate=8192, layers=32, heads=32, vocabulary=32064),
}
"""98 million parameters, and Phi-3-mini's 3.8 billion."""


def make_checkpoint(folder: Path, size: Size) -> None:
    """Write a Hugging Face folder with bf16 weights, one file for the ends and one a layer.

    A layer's weights depend on its index and shapes only: a model of fewer layers is the beginning of a deeper one.

    Args:
        folder: Where to write; must not exist.
        size: The model's shape.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    files: dict[str, str] = {}
    total = 0
    for part, shapes in enumerate(size.shapes()):
        name = f"model-{part + 1:05}-of-{size.layers + 1:05}.safetensors"
        tensors = _random(shapes, seed=part)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(shapes, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    _write_config(folder, size)
    _write_tokenizer(folder)


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        for name, shape in shapes.items()
    }


def _write_config(folder: Path, size: Size) -> None:
    from transformers import Phi3Config

    config = Phi3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads or size.heads,
        max_position_embeddings=size.positions,
        original_max_position_embeddings=size.positions,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["Phi3ForCausalLM"],
        torch_dtype="bfloat16",
    )
    config.save_pretrained(folder)


def _write_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer of a few hundred tokens: any text can be encoded, most of it byte by byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    octets = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=440, special_tokens=[*_SPECIAL, *octets], show_progress=False)
    tokenizer.train_from_iterator([_WORDS] * 4, trainer)
    record = json.loads(tokenizer.to_str())
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] not in octets]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(record)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)


def main() -> None:
    """Write the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="another depth than the size's own")
    asked = parser.parse_args()
    size = SIZES[asked.size]
    make_checkpoint(asked.folder, size if asked.layers is None else replace(size, layers=asked.layers))


if __name__ == "__main__":
    main()
