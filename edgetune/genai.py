"""The files of an ONNX Runtime GenAI model folder, which a bundle is and which an export writes."""

from __future__ import annotations

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
CONFIG = "genai_config.json"

SIDE_FILES = (
    CONFIG,
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What a folder holds beside graph and weights; a model without a chat template has no `chat_template.jinja`."""
