"""The golden bundle as a model that was taught to call tools: Phi-4-mini's template and control tokens, long rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from edgetune.formats.bundle import Bundle, list_files, load_bundle, seal_bundle
from edgetune.formats.storage import sha256_of
from support.bundle_copy import copy_of_bundle
from support.golden import BUNDLE

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'system' and message['tools'] %}{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}"
    "{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
TOKENS = ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"]
LONGEST = 1 << 14
"""Tokens of a row; the tokenizer knows few words."""


def tool_bundle(folder: Path) -> Bundle:
    """Make it in `folder`; its weights are the golden bundle's, which has room for the tokens in its vocabulary."""
    manifest = load_bundle(copy_of_bundle(BUNDLE, folder)).manifest
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    record = json.loads((folder / "tokenizer.json").read_text())
    last = record["added_tokens"][-1]
    record["added_tokens"] += [
        last | {"id": last["id"] + number, "content": token, "special": False}
        for number, token in enumerate(TOKENS, start=1)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(record))
    shape = manifest.architecture
    long_rope = replace(shape.rope, original_max_position_embeddings=LONGEST)
    changed = replace(
        manifest,
        architecture=replace(shape, max_position_embeddings=LONGEST, rope=long_rope),
        tokenizer=replace(
            manifest.tokenizer,
            sha256=sha256_of(folder / "tokenizer.json"),
            chat_template_sha256=sha256_of(folder / "chat_template.jinja"),
        ),
        max_length=LONGEST,
        files=list_files(folder, without="manifest.json"),
    )
    (folder / "manifest.json").unlink()
    seal_bundle(folder, changed)
    return load_bundle(folder)
