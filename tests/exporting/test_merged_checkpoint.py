"""Merged Hugging Face folders against PEFT's own merge, tensor by tensor and in logits."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Phi3ForCausalLM

from edgetune.cli.failures import exit_code_of
from edgetune.config import ExportConfig
from edgetune.errors import EdgetuneError, IncompatibleError, UsageError
from edgetune.exporting import export, merged_checkpoint
from edgetune.formats.adapter import write_adapter
from edgetune.formats.bundle import Bundle, load_bundle, seal_bundle
from edgetune.formats.safetensors_file import read_header
from edgetune.host.checkpoint import open_checkpoint
from edgetune.model.lora import Lora, initial_parameters
from support.bundle_copy import copy_of_bundle
from support.prepared_bundles import Prepared
from support.small_checkpoint import plant_code
from support.tiny_phi3 import WIDE, bundle, checkpoint, greedy, lora
from support.tiny_step import adapter_of

Patterned = replace(
    lora("longrope"), rank_stabilised=True, rank_pattern={"down_proj": 6}, alpha_pattern={"o_proj": 3.0}
)
CASES: dict[str, tuple[str, torch.dtype, str, Lora]] = {
    "float32": ("multi-head", torch.float32, "5GB", lora("multi-head")),
    "bfloat16, in shards, tied": ("partial", torch.bfloat16, "200KB", lora("partial")),
    "float16, rsLoRA, patterns": ("longrope", torch.float16, "5GB", Patterned),
}
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
IDS = torch.tensor([[int(token) for token in np.random.default_rng(5).integers(10, 440, 10)]])


def config_of(source: Path, **changes: Any) -> ExportConfig:
    return ExportConfig(format="safetensors", checkpoint=str(source), unmeasured=True, **changes)


def stored_as(variant: str, dtype: torch.dtype, shard: str, folder: Path) -> Path:
    """The variant's checkpoint in a type and in files of some size, its tokenizer beside it."""
    model = Phi3ForCausalLM.from_pretrained(checkpoint(variant), dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    for file in checkpoint(variant).iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copyfile(file, folder / file.name)
    return folder


def bundle_of(source: Path, variant: str, slots: Lora, folder: Path) -> Bundle:
    """A variant's bundle that says it was made from a checkpoint."""
    copy_of_bundle(bundle(variant, "fp32").path, folder)
    of, opened = bundle(variant, "fp32").manifest, open_checkpoint(str(source), download=False, blocks=False)
    seal_bundle(folder, replace(of, lora=slots, base=replace(of.base, sha256=opened.sha256())))
    return load_bundle(folder)


def values_of(slots: Lora) -> dict[str, Any]:
    """Changes that are seen in every type, and none in the first layer's attention."""
    generator = np.random.default_rng(3)
    shapes = slots.shapes()
    values = {name: (0.15 * generator.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return values | {name: 0 * b for name, b in values.items() if "layers.0.self_attn" in name and "lora_B" in name}


def save(of: Bundle, values: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    manifest = of.manifest
    write_adapter(
        folder, base=manifest.base, tokenizer=manifest.tokenizer, lora=manifest.lora, parameters=values, provenance={}
    )
    return folder


def merged_by_peft(source: Path, adapter: Path, dtype: torch.dtype) -> Any:
    from peft import PeftModel

    model = Phi3ForCausalLM.from_pretrained(source, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_the_logits_are_those_of_pefts_merge(case: str, tmp_path: Path) -> None:
    variant, dtype, shard, slots = CASES[case]
    source = stored_as(variant, dtype, shard, tmp_path / "checkpoint")
    of = bundle_of(source, variant, slots, tmp_path / "bundle")
    adapter = save(of, values_of(slots), tmp_path / "adapter")
    report = export(of, adapter, tmp_path / "merged", config_of(source))
    assert (report.kind, report.losses, report.kept) == ("merged", {}, None)
    assert report.weights == {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    before, found, peft = tensors(source), tensors(tmp_path / "merged"), merged_by_peft(source, adapter, dtype)
    expected = peft.state_dict()
    assert found.keys() == before.keys()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {
        f"{slot.name}.weight" for slot in slots.slots if not slot.name.startswith("model.layers.0.self_attn")
    }
    for name, value in found.items():
        assert value.dtype == dtype, name
        size = before[name].double().abs() + (expected[name].double() - before[name].double()).abs()
        error = (value.double() - expected[name].double()).abs()
        assert (error <= EPSILON[dtype] * size.clamp(min=1e-3)).all(), name
    loaded = Phi3ForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert loaded.dtype == dtype
    with torch.no_grad():
        ours, theirs, base = (
            model(IDS).logits.float() for model in (loaded, peft, Phi3ForCausalLM.from_pretrained(source).eval())
        )
    assert (ours - theirs).abs().max() <= 20 * EPSILON[dtype] * theirs.abs().max()
    assert (ours - base).abs().max() > 0.2 * theirs.abs().max(), "an adapter that changes nothing shows nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """To the nearest number of the type, where PEFT rounds the update before it is added."""
    variant, slots = "multi-head", lora("multi-head")
    source = stored_as(variant, dtype, "5GB", tmp_path / "checkpoint")
    of, values = bundle_of(source, variant, slots, tmp_path / "bundle"), values_of(slots)
    export(of, save(of, values, tmp_path / "adapter"), tmp_path / "merged", config_of(source))
    before, found = tensors(source), tensors(tmp_path / "merged")
    for slot in slots.slots:
        name = f"{slot.name}.weight"
        update = 2.0 * torch.from_numpy(values[slot.b]).double() @ torch.from_numpy(values[slot.a]).double()
        nearest = (before[name].double() + update).to(dtype)
        assert (found[name] == nearest).double().mean() >= 0.999, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_dora_it_is_pefts_merge_too(with_dora: Prepared, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of an int4 bundle: magnitudes began with its row norms, and the gain is found of the checkpoint's."""
    variant = "grouped-query"
    prepared = with_dora(variant, "int4")
    source = stored_as(variant, dtype, "5GB", tmp_path / "checkpoint")
    copy_of_bundle(prepared.path, tmp_path / "bundle")
    opened = open_checkpoint(str(source), download=False, blocks=False)
    base = replace(prepared.manifest.base, sha256=opened.sha256())
    seal_bundle(tmp_path / "bundle", replace(prepared.manifest, base=base))
    of = load_bundle(tmp_path / "bundle")
    values = adapter_of(of)
    still = next(slot for slot in of.manifest.lora.slots if slot.name == "model.layers.1.mlp.down_proj")
    fresh = initial_parameters(of.manifest.lora, 0, merged_checkpoint.read_row_norms(of))
    values |= {name: fresh[name] for name in (still.a, still.b, still.magnitude)}
    adapter = save(of, values, tmp_path / "adapter")
    export(of, adapter, tmp_path / "merged", config_of(source))
    before, found = tensors(source), tensors(tmp_path / "merged")
    expected = merged_by_peft(source, adapter, dtype).state_dict()
    assert torch.equal(found[f"{still.name}.weight"], before[f"{still.name}.weight"])
    for slot in of.manifest.lora.slots:
        name = f"{slot.name}.weight"
        if slot != still:
            assert not torch.equal(found[name], before[name]), name
            error = (found[name].double() - expected[name].double()).abs().max()
            assert error <= 4 * EPSILON[dtype] * expected[name].double().abs().max(), name


def test_the_folder_is_a_checkpoint_without_code(tmp_path: Path) -> None:
    variant, slots = "multi-head", lora("multi-head")
    source = stored_as(variant, torch.float32, "5GB", tmp_path / "checkpoint")
    plant_code(source, tmp_path / "ran")
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 6]}')
    of = bundle_of(source, variant, slots, tmp_path / "bundle")
    adapter = save(of, values_of(slots), tmp_path / "adapter")
    report = export(of, adapter, tmp_path / "merged", config_of(source))
    merged = tmp_path / "merged"
    found = {path.name for path in merged.iterdir()}
    assert found == {path.name for path in source.iterdir() if path.suffix != ".py" and path.is_file()} | {
        "edgetune_merged.json"
    }
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "special_tokens_map.json"):
        assert (merged / name).read_bytes() == (source / name).read_bytes(), name
    for name in ("config.json", "tokenizer_config.json"):
        was = json.loads((source / name).read_text())
        assert was.pop("auto_map") and json.loads((merged / name).read_text()) == was, name
    assert report.bytes == sum((merged / name).stat().st_size for name in found - {"edgetune_merged.json"})
    told = json.loads((merged / "edgetune_merged.json").read_text())
    assert told["base"]["sha256"] == of.manifest.base.sha256
    assert told["bundle_manifest_sha256"] == of.manifest.manifest_sha256
    assert open_checkpoint(str(merged), download=False, blocks=True).config == json.loads(
        (merged / "config.json").read_text()
    )
    template = AutoTokenizer.from_pretrained(merged).apply_chat_template([{"role": "user", "content": "hello"}])
    assert template == AutoTokenizer.from_pretrained(checkpoint(variant)).apply_chat_template(
        [{"role": "user", "content": "hello"}]
    )
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UsageError, match="already exists"):
        export(of, adapter, merged, config_of(source))
    export(of, adapter, merged, config_of(source, force=True))
    # Not everything that is a checkpoint may be replaced: only what an export wrote.
    with pytest.raises(UsageError, match="holds something else"):
        export(of, adapter, source, config_of(source, force=True))


def test_no_whole_tensor_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, slots = checkpoint(WIDE) / "model.safetensors", lora(WIDE)
    updates = merged_checkpoint._updates(slots, values_of(slots), {})
    monkeypatch.setattr(merged_checkpoint, "_PIECE", 1 << 16)
    monkeypatch.setattr(merged_checkpoint, "CHUNK", 1 << 16)
    tracemalloc.start()
    try:
        merged_checkpoint._write_weights(source, tmp_path / "merged.safetensors", updates)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = max(tensor.end - tensor.start for tensor in read_header(source).values())
    assert largest == 3 << 20
    assert peak < largest / 2
    assert read_header(tmp_path / "merged.safetensors") == read_header(source)


Refusal = Callable[[Path, Path], ExportConfig]


def _quantised(source: Path, _: Path) -> ExportConfig:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    return config_of(source)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda source, _: config_of(checkpoint("partial")), IncompatibleError, "is not the checkpoint that the"),
        (_quantised, IncompatibleError, "quantised already"),
        (lambda source, folder: config_of(folder / "nothing"), UsageError, "no such folder"),
        (lambda source, _: ExportConfig(format="safetensors"), UsageError, "made from; give it"),
        (lambda source, _: config_of(source, merge=False), UsageError, "is for a merge"),
        (lambda source, _: config_of(source, precision="int4"), UsageError, "has the checkpoint's type"),
        (lambda source, _: replace(config_of(source), format="genai"), UsageError, "is for format safetensors"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(
    made: Refusal, error: type[EdgetuneError], message: str, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint("multi-head"), tmp_path / "checkpoint")
    of = bundle_of(source, "multi-head", lora("multi-head"), tmp_path / "bundle")
    adapter = save(of, values_of(of.manifest.lora), tmp_path / "adapter")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(error, match=message):
        export(of, adapter, out / "merged", made(source, tmp_path))
    assert list(out.iterdir()) == []


def test_a_sum_beyond_the_type_is_refused(tmp_path: Path) -> None:
    source = stored_as("multi-head", torch.float16, "5GB", tmp_path / "checkpoint")
    of = bundle_of(source, "multi-head", lora("multi-head"), tmp_path / "bundle")
    values = values_of(of.manifest.lora)
    values["model.layers.1.mlp.down_proj.lora_B.weight"] += 3e5
    adapter = save(of, values, tmp_path / "adapter")
    with pytest.raises(IncompatibleError, match=r"layers.1.mlp.down_proj.weight: .* beyond the largest number of F16"):
        export(of, adapter, tmp_path / "merged", config_of(source))
    assert not (tmp_path / "merged").exists()


def test_the_command_measures_the_folder_and_says_what_it_keeps(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgetune.cli import main

    source = checkpoint("longrope")
    of = bundle_of(source, "longrope", lora("longrope"), tmp_path / "bundle")
    adapter = save(of, values_of(of.manifest.lora), tmp_path / "adapter")
    rows = tmp_path / "valid.jsonl"
    # What the adapted model itself answers, so that there is a gain.
    peft = merged_by_peft(source, adapter, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = tokenizer("what is it? the lamp in the kitchen").input_ids
    rows.write_text(json.dumps({"text": tokenizer.decode(prompt + greedy(peft, prompt, 24))}) + "\n")
    command = ["export", str(of.path), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    command += ["--format", "safetensors", "--checkpoint", str(source), "--valid", str(rows), "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert list(told["losses"]) == ["base", "base + adapter", "merged checkpoint"]
    assert told["losses"]["base"] > told["losses"]["base + adapter"]
    assert told["losses"]["merged checkpoint"] == pytest.approx(told["losses"]["base + adapter"], rel=1e-4)
    assert told["kept"] == pytest.approx(1, abs=1e-3)
    assert json.loads((tmp_path / "merged" / "edgetune_merged.json").read_text())["losses"] == told["losses"]
    refused = CliRunner().invoke(main, [*command, "--precision", "int4", "--force"])
    assert refused.exit_code == exit_code_of(UsageError) and "--precision is for --format genai" in refused.stderr
