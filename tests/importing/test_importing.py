"""Adapters that other tools left, in a bundle's slots: what they add is what PEFT says that they added, to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from edgetune.cli import main
from edgetune.config import EvaluateConfig, ImportConfig, TrainConfig
from edgetune.data.encode import load_encoder
from edgetune.data.examples import load_examples
from edgetune.errors import IncompatibleError, UsageError
from edgetune.evaluation import evaluate
from edgetune.formats.adapter import CONFIG, MANIFEST, WEIGHTS, read_adapter
from edgetune.formats.bundle import load_bundle, load_manifest
from edgetune.formats.manifest import AdapterManifest
from edgetune.formats.safetensors_file import read_header
from edgetune.importing import ImportReport, import_adapter, read_foreign
from edgetune.model.lora import Lora, initial_parameters
from edgetune.training import train
from support.foreign_adapters import (
    ALL,
    APART,
    archived,
    as_mlx,
    bundle_of,
    deltas,
    docker_archive,
    fused,
    lora_of,
    oci_layout,
    peft_model,
    tar_of,
    torch_model,
    write_peft,
)
from support.golden import BUNDLE, GOLDEN, TRAIN, VALID

KAITO = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
"""What Kaito asks for; of these, Phi-3 has `o_proj` and `down_proj`."""


def imported(source: Path, lora: Lora, folder: Path) -> tuple[ImportReport, dict[str, np.ndarray]]:
    """Import into a bundle with such slots; also what PEFT then says that each of these adds."""
    from peft import PeftModel

    bundle = bundle_of(lora, folder / "bundle")
    report = import_adapter(source, bundle, folder / "imported")
    return report, deltas(PeftModel.from_pretrained(torch_model(), folder / "imported"))


def assert_same_to_the_bit(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], lora: Lora) -> None:
    """Each slot adds what is expected, and nothing where nothing is."""
    assert found.keys() == {slot.name for slot in lora.slots}
    assert expected and expected.keys() <= found.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected.get(name, np.zeros_like(value)), err_msg=name)
    assert max(np.abs(value).max() for value in expected.values()) > 0.01


# --- PEFT on Phi-3


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"r": 16, "lora_alpha": 32, "target_modules": ALL}, id="the bundle's own"),
        pytest.param({"r": 8, "lora_alpha": 8, "target_modules": KAITO}, id="Kaito's default"),
        pytest.param({"r": 8, "lora_alpha": 8, "target_modules": KAITO[:4]}, id="Kaito's example"),
        pytest.param({"r": 16, "lora_alpha": 16, "target_modules": ["o_proj", "qkv_proj"]}, id="AI Toolkit"),
        pytest.param({"r": 8, "lora_alpha": 128, "target_modules": ALL}, id="Azure ML"),
        pytest.param({"r": 1, "lora_alpha": 2, "target_modules": ALL}, id="rank 1"),
        pytest.param({"r": 5, "lora_alpha": 20, "target_modules": ALL}, id="odd rank"),
        pytest.param({"r": 16, "lora_alpha": 0.5, "target_modules": ALL}, id="small alpha"),
        pytest.param({"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL}, id="rsLoRA"),
        pytest.param(
            {
                "r": 4,
                "lora_alpha": 8,
                "rank_pattern": {"o_proj": 2, "layers.1.mlp.down_proj": 16},
                "alpha_pattern": {"down_proj": 32, "layers.0.self_attn.qkv_proj": 1},
                "target_modules": ALL,
            },
            id="patterns",
        ),
        pytest.param({"r": 4, "lora_alpha": 8, "layers_to_transform": [1], "target_modules": ALL}, id="one layer"),
        pytest.param({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, id="all-linear"),
    ],
)
@pytest.mark.filterwarnings("ignore:Target modules")
def test_what_peft_trained_adds_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    source = peft_model(torch_model(), **options)
    source.save_pretrained(tmp_path / "source")
    lora = lora_of()
    report, found = imported(tmp_path / "source", lora, tmp_path)
    expected = deltas(source)
    assert_same_to_the_bit(found, expected, lora)
    assert set(report.filled) == expected.keys()
    assert (report.tool, report.slots, report.rounded) == ("PEFT", 8, [])


@pytest.mark.parametrize(
    "bundle", [{"rank_stabilised": True}, {"rank_pattern": {"o_proj": 4}, "alpha_pattern": {"o_proj": 1.0}}], ids=str
)
def test_the_bundles_own_ranks_and_scaling_count(tmp_path: Path, bundle: dict[str, Any]) -> None:
    source = peft_model(torch_model(), r=4, lora_alpha=2, target_modules=ALL)
    source.save_pretrained(tmp_path / "source")
    lora = lora_of(**bundle)
    report, found = imported(tmp_path / "source", lora, tmp_path)
    assert_same_to_the_bit(found, deltas(source), lora)
    assert report.rounded == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened_exactly(tmp_path: Path, dtype: str) -> None:
    import torch

    source = peft_model(torch_model(), r=4, lora_alpha=4, target_modules=ALL)
    for name, parameter in source.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    source.save_pretrained(tmp_path / "source")
    header = read_header(tmp_path / "source" / WEIGHTS)
    assert {tensor.dtype for tensor in header.values()} == {"F16" if dtype == "float16" else "BF16"}
    source.float()
    _, found = imported(tmp_path / "source", lora_of(), tmp_path)
    assert_same_to_the_bit(found, deltas(source), lora_of())


# --- projections apart


@pytest.mark.parametrize(
    ("options", "untouched"),
    [
        ({"r": 5, "lora_alpha": 10, "target_modules": APART}, []),
        ({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
         ["k_proj of qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ({"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "down_proj"]},
         ["qkv_proj", "o_proj", "gate_proj of gate_up_proj"]),
        ({"r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 16, "q_proj": 2},
          "target_modules": APART}, []),
    ],
    ids=["all", "queries and values", "up", "patterns"],
)  # fmt: skip
def test_queries_keys_and_values_apart_are_block_rows(
    tmp_path: Path, options: dict[str, Any], untouched: list[str]
) -> None:
    source = peft_model(torch_model(apart=True), **options)
    source.save_pretrained(tmp_path / "source")
    lora = lora_of()
    report, found = imported(tmp_path / "source", lora, tmp_path)
    assert_same_to_the_bit(found, fused(deltas(source)), lora)
    assert report.untouched == untouched


def test_one_a_for_all_of_them_needs_no_more_rank(tmp_path: Path) -> None:
    source = peft_model(torch_model(apart=True), r=16, lora_alpha=16, target_modules=APART[:3])
    for layer in source.base_model.model.model.layers:
        first = layer.self_attn.q_proj.lora_A["default"].weight
        layer.self_attn.k_proj.lora_A["default"].weight = layer.self_attn.v_proj.lora_A["default"].weight = first
    source.save_pretrained(tmp_path / "source")
    lora = lora_of()
    _, found = imported(tmp_path / "source", lora, tmp_path)
    assert_same_to_the_bit(found, fused(deltas(source)), lora)


def test_names_with_the_adapters_name_are_taken(tmp_path: Path) -> None:
    source = peft_model(torch_model(), r=4, lora_alpha=8, target_modules=ALL)
    source.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / WEIGHTS)
    renamed = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "source" / WEIGHTS)
    _, found = imported(tmp_path / "source", lora_of(), tmp_path)
    assert_same_to_the_bit(found, deltas(source), lora_of())


# --- mlx-lm


@pytest.mark.parametrize("apart", [False, True])
def test_what_mlx_trained_adds_the_same(tmp_path: Path, apart: bool) -> None:
    """mlx-lm multiplies by its scale where PEFT multiplies by alpha / r; its matrices are transposed."""
    targets = APART if apart else ALL
    source = peft_model(torch_model(apart=apart), r=4, lora_alpha=64, target_modules=targets)
    source.save_pretrained(tmp_path / "peft")
    as_mlx(tmp_path / "peft", tmp_path / "source", scale=16.0, rank=4)
    report, found = imported(tmp_path / "source", lora_of(), tmp_path)
    assert_same_to_the_bit(found, fused(deltas(source)), lora_of())
    assert report.tool == "mlx-lm"


# --- scalings that are no power of two apart


@pytest.mark.parametrize("options", [{"lora_alpha": 12}, {"lora_alpha": 160}, {"use_rslora": True, "lora_alpha": 16}])
def test_elsewhere_b_is_the_nearest_float32(tmp_path: Path, options: dict[str, Any]) -> None:
    source = peft_model(torch_model(), r=8, target_modules=ALL, **options)
    source.save_pretrained(tmp_path / "source")
    lora = lora_of()
    said: list[str] = []
    bundle = bundle_of(lora, tmp_path / "bundle")
    report = import_adapter(tmp_path / "source", bundle, tmp_path / "imported", say=said.append)
    assert report.rounded == [slot.name for slot in lora.slots]
    assert any("B of 8 slots is rounded to float32" in line for line in said)
    theirs, ours = load_file(tmp_path / "source" / WEIGHTS), load_file(tmp_path / "imported" / WEIGHTS)
    scaling = source.base_model.model.model.layers[0].mlp.down_proj.scaling["default"]
    for slot in lora.slots:
        a, b = (theirs[f"base_model.model.{name}"].astype(np.float64) for name in (slot.a, slot.b))
        exact = b * (scaling / 2.0)
        stored = ours[f"base_model.model.{slot.b}"][:, :8]
        assert np.array_equal(stored, exact.astype(np.float32))
        assert np.abs(stored - exact).max() <= np.abs(np.spacing(stored)).max() / 2
        # Computed without further rounding, the change is the source's but for 6e-8 of its terms.
        change = 2.0 * stored.astype(np.float64) @ a
        assert (np.abs(change - scaling * b @ a) <= 1.001 * 2**-24 * scaling * (np.abs(b) @ np.abs(a))).all()


def test_the_alpha_that_the_notice_names_takes_every_bit(tmp_path: Path) -> None:
    source = peft_model(torch_model(), r=8, lora_alpha=12, target_modules=ALL)
    source.save_pretrained(tmp_path / "source")
    lora = lora_of(rank=16, alpha=24.0)
    report, found = imported(tmp_path / "source", lora, tmp_path)
    assert_same_to_the_bit(found, deltas(source), lora)
    assert report.rounded == []


# --- DoRA


@pytest.mark.parametrize("apart", [False, True])
def test_dora_comes_into_a_bundle_with_magnitudes(tmp_path: Path, apart: bool) -> None:
    import torch
    from peft import PeftModel

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"] if apart else ["qkv_proj"]}
    source = peft_model(torch_model(apart=apart), use_dora=True, **options)
    source.save_pretrained(tmp_path / "source")
    plain, lora = torch_model(), lora_of(dora=True)
    norms = {
        slot.name: plain.get_submodule(slot.name).weight.detach().norm(dim=1).numpy() for slot in lora.slots
    }
    bundle = bundle_of(lora, tmp_path / "bundle", norms)
    import_adapter(tmp_path / "source", bundle, tmp_path / "imported")
    loaded = PeftModel.from_pretrained(torch_model(), tmp_path / "imported")
    assert_same_to_the_bit(deltas(loaded), fused(deltas(source)), lora)
    parameters = read_adapter(tmp_path / "imported", lora, bundle.manifest.base, bundle.manifest.tokenizer, norms)
    theirs = load_file(tmp_path / "source" / WEIGHTS)
    slot = lora.slots[0]
    if apart:
        prefix = "base_model.model.model.layers.0.self_attn"
        np.testing.assert_array_equal(
            parameters[slot.magnitude],
            np.concatenate([
                theirs[f"{prefix}.q_proj.lora_magnitude_vector"],
                norms[slot.name][32:48],
                theirs[f"{prefix}.v_proj.lora_magnitude_vector"],
            ]),
        )
    else:
        ids = torch.arange(1, 13).reshape(2, 6)
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-5)


# --- where it lies


def folders(tmp_path: Path) -> dict[str, Path]:
    """One adapter in all the ways in which tools leave it."""
    adapter = write_peft(tmp_path / "adapter", lora_of(4, 4.0))
    layer = tar_of({f"./data/{name}": content for name, content in archived(adapter).items()}, gzipped=True)
    found = {"PEFT": adapter}
    for name, inside in {
        "AI Toolkit": "models/qlora/qlora/gpu_model/adapter",
        "Azure ML": "named-outputs/pytorch_model_folder/peft_adapter_weights",
        "Kaito's volume": "",
    }.items():
        shutil.copytree(adapter, tmp_path / name / inside)
        found[name] = tmp_path / name
    (tmp_path / "Azure ML" / "named-outputs" / "pytorch_model_folder" / "config.json").write_text("{}")
    (tmp_path / "Kaito's volume" / "fine_tuning_completed.txt").touch()
    found["an OCI layout"] = oci_layout(tmp_path / "oci", [layer])
    for name, data in {
        "an OCI archive": tar_of(archived(tmp_path / "oci")),
        "an image of docker save": docker_archive([tar_of({"etc/passwd": b""}), layer]),
        "a gzipped image": tar_of(archived(tmp_path / "oci"), gzipped=True),
        "an archive of the folder": tar_of({f"a/{name}": path for name, path in archived(adapter).items()}),
    }.items():
        found[name] = tmp_path / f"{name}.tar"
        found[name].write_bytes(data)
    return found


def test_it_is_found_wherever_a_tool_left_it(tmp_path: Path) -> None:
    bundle = bundle_of(lora_of(), tmp_path / "bundle")
    expected = read_foreign(write_peft(tmp_path / "same", lora_of(4, 4.0)), bundle)
    assert len(expected.filled) == 8
    for name, path in folders(tmp_path).items():
        found = read_foreign(path, bundle)
        assert found.sha256 == expected.sha256, name
        assert all(np.array_equal(value, expected.parameters[key]) for key, value in found.parameters.items()), name


def test_what_edgetune_trained_goes_into_a_bundle_of_a_higher_rank(tmp_path: Path) -> None:
    """Its contract holds: the base has to be the same, the slots need not be."""
    small = bundle_of(lora_of(4, 8.0), tmp_path / "small")
    import_adapter(write_peft(tmp_path / "peft", lora_of(4, 8.0)), small, tmp_path / "adapter")
    manifest = load_manifest(tmp_path / "adapter" / MANIFEST, AdapterManifest)
    assert manifest.provenance["imported_from"] == "peft"
    large = bundle_of(lora_of(), tmp_path / "large")
    assert read_foreign(tmp_path / "adapter", large).tool == "edgetune"
    other = replace(large, manifest=replace(large.manifest, base=replace(large.manifest.base, sha256="b" * 64)))
    with pytest.raises(IncompatibleError, match="the adapter was trained on org/tiny-phi3"):
        read_foreign(tmp_path / "adapter", other)


# --- what is said


def test_what_stays_untouched_and_another_base_are_said(tmp_path: Path) -> None:
    lora = lora_of(4, 4.0, ["o_proj"])
    source = write_peft(tmp_path / "source", lora, base_model_name_or_path="microsoft/Phi-3-mini-4k-instruct")
    said: list[str] = []
    import_adapter(source, bundle_of(lora_of(), tmp_path / "bundle"), tmp_path / "adapter", say=said.append)
    assert said == [
        f"{source} says that it was trained on microsoft/Phi-3-mini-4k-instruct; the bundle holds org/tiny-phi3",
        "untouched by the adapter: qkv_proj, gate_up_proj, down_proj",
    ]


def test_an_adapter_that_is_there_is_kept(tmp_path: Path) -> None:
    source = write_peft(tmp_path / "source", lora_of(4, 4.0))
    bundle = bundle_of(lora_of(), tmp_path / "bundle")
    import_adapter(source, bundle, tmp_path / "adapter")
    with pytest.raises(UsageError, match="already exists"):
        import_adapter(source, bundle, tmp_path / "adapter")
    import_adapter(source, bundle, tmp_path / "adapter", ImportConfig(force=True))


# --- the whole way, on the golden bundle


def golden_source(folder: Path, *, apart: bool, **options: Any) -> Any:
    """An adapter of PEFT on the golden bundle's own weights, as Phi-3 or as a Llama, whose projections are apart."""
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM

    from support.oracle import load_stored

    model = Phi3ForCausalLM.from_pretrained(GOLDEN / "edgetune-golden-base", attn_implementation="eager").float()
    load_stored(model, BUNDLE)
    if apart:
        sizes, weights = model.config.to_dict(), model.state_dict()
        del sizes["model_type"], sizes["architectures"]
        for name in [name for name in weights if name.endswith(("qkv_proj.weight", "gate_up_proj.weight"))]:
            parts = ("q", "k", "v") if "qkv_proj" in name else ("gate", "up")
            parent, whole = name.rpartition(".weight")[0].rpartition(".")[0], weights.pop(name)
            for part, rows in zip(parts, whole.chunk(len(parts)), strict=True):
                weights[f"{parent}.{part}_proj.weight"] = rows
        model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager"))
        model.load_state_dict(weights)
    source = peft_model(model, **options)
    source.save_pretrained(folder)
    return source


@pytest.mark.parametrize(
    "options",
    [
        {"apart": False, "r": 2, "lora_alpha": 4, "target_modules": ["o_proj", "down_proj"]},
        {"apart": False, "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ALL},
        {"apart": True, "r": 1, "lora_alpha": 4, "target_modules": APART},
    ],
    ids=["fewer projections", "rsLoRA, rounded", "apart"],
)
def test_eval_measures_what_peft_measures(tmp_path: Path, options: dict[str, Any]) -> None:
    from support.oracle import loss

    source = golden_source(tmp_path / "source", **options)
    bundle = load_bundle(BUNDLE)
    import_adapter(tmp_path / "source", bundle, tmp_path / "adapter")
    encoder = load_encoder(bundle.path, bundle.manifest.tokenizer)
    expected = loss(source, load_examples(VALID, encoder, 64, truncate=False).examples).item()
    found = evaluate(bundle, VALID, EvaluateConfig(), adapter=tmp_path / "adapter").loss
    base = evaluate(bundle, VALID).loss
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found - base) > 0.01


def test_training_begins_with_what_import_would_make(tmp_path: Path) -> None:
    bundle = load_bundle(BUNDLE)
    lora = replace(bundle.manifest.lora, rank=2, alpha=2.0)
    source = write_peft(tmp_path / "source", lora)
    archive = tmp_path / "image.tar"
    archive.write_bytes(docker_archive([tar_of({f"data/{name}": at for name, at in archived(source).items()})]))
    first = tmp_path / "first"
    import_adapter(source, bundle, first)
    config = TrainConfig(runtime="onnxruntime", steps=2, learning_rate=1e-3)
    for name, start in {"from import": first, "from folder": source, "from image": archive}.items():
        train(bundle, TRAIN, tmp_path / name, replace(config, init_adapter=start))
    written = {path.parent.name: path.read_bytes() for path in tmp_path.glob(f"from */{WEIGHTS}")}
    assert len(written) == 3 and len(set(written.values())) == 1


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    lora = load_bundle(BUNDLE).manifest.lora
    slots = [slot for slot in lora.slots if slot.module == "o_proj"]
    source = write_peft(tmp_path / "source", replace(lora, rank=2, alpha=2.0, slots=slots))
    arguments = ["import", str(source), "--bundle", str(BUNDLE), "--output", str(tmp_path / "adapter")]
    done = CliRunner().invoke(main, [*arguments])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{tmp_path / 'adapter'}: 2 of 8 slots are PEFT's, ")
    assert "untouched by the adapter: qkv_proj, gate_up_proj, down_proj" in done.stderr
    done = CliRunner().invoke(main, [*arguments, "--json", "--force", "--quiet"])
    facts = json.loads(done.stdout)
    assert facts["filled"] == [slot.name for slot in slots] and facts["rounded"] == []
    assert done.stderr == ""


def test_rows_without_an_update_can_learn(tmp_path: Path) -> None:
    lora = lora_of()
    found = read_foreign(write_peft(tmp_path / "source", lora_of(4, 4.0)), bundle_of(lora, tmp_path / "bundle"))
    fresh = initial_parameters(lora, 0)
    for slot in lora.slots:
        np.testing.assert_array_equal(found.parameters[slot.a][4:], fresh[slot.a][4:])
        assert not found.parameters[slot.b][:, 4:].any()


def test_the_configuration_of_a_published_adapter_is_understood(tmp_path: Path) -> None:
    from support.shared_material import shared_material

    published = shared_material() / "real" / "adapters" / "structured-output" / CONFIG
    source = write_peft(tmp_path / "source", lora_of(16, 32.0))
    shutil.copy(published, source / CONFIG)
    found = read_foreign(source, bundle_of(lora_of(), tmp_path / "bundle"))
    assert len(found.filled) == 8 and not found.rounded
