"""DoRA in a model: merged, and kept beside the base, it answers as PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.config import Base, ExportConfig
from edgetune.evaluation import measure
from edgetune.exporting import export
from edgetune.exporting.gains import adapter_gains
from edgetune.formats.adapter import read_adapter, write_adapter
from edgetune.formats.bundle import Bundle
from edgetune.formats.genai import adapter_file
from edgetune.formats.row_norms import read_row_norms
from edgetune.generation import generate_ids
from edgetune.generation.measure import Measured
from edgetune.model.lora import MAGNITUDE
from edgetune.text.pulse import Pulse, silent
from support import oracle
from support.prepared_bundles import Prepared
from support.random_rows import lengths_of, rows_of
from support.tiny_phi3 import checkpoint, greedy, torch_model, weights
from support.tiny_step import adapter_of

ADAPTER = adapter_file("adapter")
BASES: tuple[Base, ...] = ("int4", "fp32")
VARIANT = "grouped-query"
PROMPT = [int(token) for token in np.random.default_rng(5).integers(10, 440, 10)]


def save(bundle: Bundle, folder: Path) -> Path:
    """An adapter of which every number differs from the first one's."""
    folder.mkdir()
    of = bundle.manifest
    write_adapter(
        folder, base=of.base, tokenizer=of.tokenizer, lora=of.lora, parameters=adapter_of(bundle), provenance={}
    )
    return folder


def peft_of(bundle: Bundle, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(torch_model(VARIANT, bundle.path), adapter).eval()


@pytest.mark.parametrize("base", BASES)
def test_peft_loads_what_was_written_and_its_own_is_read(with_dora: Prepared, tmp_path: Path, base: Base) -> None:
    bundle = with_dora(VARIANT, base)
    of, rows = bundle.manifest, rows_of(1, lengths_of(VARIANT, 1))
    model = peft_of(bundle, save(bundle, tmp_path / "own"))
    in_memory = oracle.peft_model(checkpoint(VARIANT), bundle, adapter_of(bundle))
    ids = torch.tensor([rows[0].input_ids])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, in_memory(input_ids=ids).logits, rtol=0, atol=1e-5)
    ours = measure(bundle, rows[:1], adapter_of(bundle)).loss
    assert ours == pytest.approx(oracle.loss(model, rows[:1]).item(), rel=1e-4)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    again = read_adapter(tmp_path / "peft", of.lora, of.base, of.tokenizer, read_row_norms(bundle))
    assert again.keys() == of.lora.shapes().keys()
    for name, value in adapter_of(bundle).items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("base", BASES)
def test_merged_and_kept_answer_as_peft_does(with_dora: Prepared, tmp_path: Path, base: Base) -> None:
    bundle = with_dora(VARIANT, base)
    adapter = save(bundle, tmp_path / "adapter")
    expected = greedy(peft_of(bundle, adapter), PROMPT, 24)
    assert greedy(torch_model(VARIANT, bundle.path), PROMPT, 24) != expected
    for name, config in {"merged": ExportConfig(), "kept": ExportConfig(merge=False)}.items():
        export(bundle, adapter, tmp_path / name, config)
        assert generate_ids(tmp_path / name, PROMPT, 24) == expected, name


@pytest.mark.parametrize("base", BASES)
def test_merged_weights_are_pefts(with_dora: Prepared, tmp_path: Path, base: Base) -> None:
    bundle = with_dora(VARIANT, base)
    adapter = save(bundle, tmp_path / "adapter")
    export(bundle, adapter, tmp_path / "model")
    merged = peft_of(bundle, adapter).merge_and_unload()
    found = weights(tmp_path / "model")
    for number, layer in enumerate(merged.model.layers):
        prefix = f"model.layers.{number}"
        gate, up = layer.mlp.gate_up_proj.weight.detach().chunk(2)
        expected = {
            "attn.qkv_proj": layer.self_attn.qkv_proj.weight,
            "attn.o_proj": layer.self_attn.o_proj.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.mlp.down_proj.weight,
        }
        for name, weight in expected.items():
            assert oracle.relative(found[f"{prefix}.{name}"], weight.detach().numpy()) <= 1e-5, name


def test_of_an_int4_merge_only_the_update_is_rounded(with_dora: Prepared, tmp_path: Path) -> None:
    """With B zero a row on the grid stays on it, whatever its gain."""
    bundle = with_dora(VARIANT, "int4")
    of, parameters = bundle.manifest, adapter_of(bundle)
    for slot in of.lora.slots:
        parameters[slot.b][...] = 0
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, base=of.base, tokenizer=of.tokenizer, lora=of.lora, parameters=parameters, provenance={})
    export(bundle, folder, tmp_path / "model", ExportConfig(precision="int4", unmeasured=True))
    before, after = weights(bundle.path), weights(tmp_path / "model")
    slot = next(slot for slot in of.lora.slots if slot.name == "model.layers.0.self_attn.qkv_proj")
    gain = parameters[slot.magnitude] / read_row_norms(bundle)[slot.name]
    name = "model.layers.0.attn.qkv_proj"
    assert oracle.relative(after[name], gain[:, None] * before[name]) <= 1e-6


@pytest.mark.parametrize("base", BASES)
def test_kept_model_has_the_loss_of_the_evaluation_graph(with_dora: Prepared, tmp_path: Path, base: Base) -> None:
    bundle = with_dora(VARIANT, base)
    rows = rows_of(1, lengths_of(VARIANT, 1))
    export(bundle, save(bundle, tmp_path / "adapter"), tmp_path / "model", ExportConfig(merge=False))
    model = Measured(tmp_path / "model", bundle.manifest.architecture.rope)
    pulse = Pulse(silent, "{}")
    alone, adapted = model.answer_loss(rows, pulse), model.answer_loss(
        rows, pulse, adapter=tmp_path / "model" / ADAPTER
    )
    assert alone == pytest.approx(measure(bundle, rows, None).loss, rel=3e-4)
    assert adapted == pytest.approx(measure(bundle, rows, adapter_of(bundle)).loss, rel=3e-4)
    assert abs(adapted - alone) > 5e-3


def test_gains_of_the_first_adapter_are_ones(with_dora: Prepared) -> None:
    bundle = with_dora(VARIANT, "int4")
    parameters = adapter_of(bundle)
    norms = read_row_norms(bundle)
    for slot in bundle.manifest.lora.slots:
        parameters[slot.b][...] = 0
        parameters[slot.magnitude][...] = norms[slot.name]
    assert len(parameters) == 3 * len(norms)
    assert sum(name.endswith(MAGNITUDE) for name in parameters) == len(norms)
    for name, gain in adapter_gains(bundle, parameters).items():
        assert np.abs(gain - 1).max() <= 1e-6, name
