"""An adapter's contract says how its rows were encoded, and what measures it encodes rows alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.config import EvaluateConfig, TrainConfig
from edgetune.evaluation import evaluate
from edgetune.formats.adapter import MANIFEST, row_encoding
from edgetune.formats.manifest import AdapterManifest, RowEncoding
from edgetune.formats.manifest_json import read_manifest, write_manifest
from edgetune.preview import preview
from edgetune.training import train
from support.golden import BUNDLE
from support.recorder import Recorder

PROMPTS = [{"prompt": "is the <|end|> lamp on? ", "completion": "yes"}, {"prompt": "is it? ", "completion": "no"}]
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in PROMPTS
]
CONFIG = TrainConfig(runtime="onnxruntime", steps=2, learning_rate=1e-2)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(encoding: RowEncoding) -> EvaluateConfig:
    return EvaluateConfig(raw_prompts=encoding.raw_prompts, content_as_text=encoding.content_as_text)


@pytest.mark.parametrize("content_as_text", [False, True])
@pytest.mark.parametrize("raw_prompts", [False, True])
@pytest.mark.parametrize("rows", [PROMPTS, CONVERSATIONS])
def test_the_contract_says_how_rows_were_encoded(
    tmp_path: Path, rows: list[dict[str, object]], raw_prompts: bool, content_as_text: bool
) -> None:
    data, listener = write(tmp_path / "rows.jsonl", rows), Recorder()
    config = replace(CONFIG, raw_prompts=raw_prompts, content_as_text=content_as_text)
    train(BUNDLE, data, tmp_path / "adapter", config, valid=data, observer=listener)
    # A conversation is none of raw prompts, whatever was asked for.
    expected = RowEncoding(raw_prompts=raw_prompts and rows is PROMPTS, content_as_text=content_as_text)
    assert row_encoding(tmp_path / "adapter") == expected
    found = json.loads((tmp_path / "adapter" / MANIFEST).read_text())
    assert ("encoding" in found) == (expected != RowEncoding())
    chat = not expected.raw_prompts
    assert any("control tokens" in notice for notice in listener.notices) == (chat and not content_as_text)
    # Measuring with the adapter encodes as training did, and so does what is told to.
    with_adapter = evaluate(BUNDLE, data, adapter=tmp_path / "adapter")
    base = {encoding: evaluate(BUNDLE, data, config_of(encoding)) for encoding in (expected, RowEncoding())}
    assert with_adapter.trained_tokens == base[expected].trained_tokens
    told = evaluate(BUNDLE, data, config_of(expected), adapter=tmp_path / "adapter")
    assert with_adapter == told
    assert (base[expected].loss == base[RowEncoding()].loss) == (expected == RowEncoding())
    shown = [len(row.input_ids) for row in preview(BUNDLE, data, encoding=expected)]
    assert (shown == [len(row.input_ids) for row in preview(BUNDLE, data)]) == (expected == RowEncoding())


def test_a_contract_without_the_key_is_read_as_before(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", CONVERSATIONS)
    train(BUNDLE, data, tmp_path / "adapter", CONFIG)
    written = (tmp_path / "adapter" / MANIFEST).read_bytes()
    manifest = read_manifest(written, AdapterManifest, MANIFEST)
    assert (manifest.encoding, write_manifest(manifest)) == (RowEncoding(), written)
    other = write_manifest(replace(manifest, encoding=RowEncoding(content_as_text=True)))
    assert read_manifest(other, AdapterManifest, MANIFEST).encoding == RowEncoding(content_as_text=True)
