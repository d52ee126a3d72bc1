"""A bundle so small that an emulated NPU trains it on the demo rows within a minute."""

from __future__ import annotations

from pathlib import Path

from edgetune.config import PrepareConfig
from edgetune.formats.bundle import Bundle
from support.prepared_bundles import prepare_checkpoint
from support.repository import ROOT
from support.tiny_phi3 import save_tokenizer

ROWS = ROOT / "examples" / "device_assistant"
VOCABULARY = 768
CONFIG = PrepareConfig(rank=4, alpha=8.0, max_length=64)


def assistant_bundle(folder: Path) -> Bundle:
    """Make it in `folder`, with a tokenizer that knows the words of the rows."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    checkpoint = folder.with_name(f"{folder.name}-checkpoint")
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Phi3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed_tokens" not in name:
            parameter.data.mul_(6)
    model.save_pretrained(checkpoint)
    save_tokenizer(checkpoint, (ROWS / "train.jsonl").read_text().splitlines(), VOCABULARY)
    return prepare_checkpoint(checkpoint, folder, CONFIG)
