"""What PEFT and mlx-lm write: names, ranks, scaling and numbers of each update."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgetune.errors import EdgetuneError, IncompatibleError
from edgetune.formats.adapter import CONFIG, WEIGHTS
from edgetune.importing.sources import opened
from edgetune.importing.updates import Updates, read_updates
from support.foreign_adapters import ALL, APART, as_mlx, lora_of, peft_model, torch_model, write_peft


def read(folder: Path) -> Updates:
    with opened(folder) as source:
        return read_updates(source)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}},
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {"self_attn.k_proj": 9, "^model.layers.0.mlp.up_proj": 5}},
    ],
    ids=str,
)
def test_ranks_scaling_and_numbers_are_pefts(tmp_path: Path, options: dict[str, object]) -> None:
    model = peft_model(torch_model(apart=True), target_modules=APART, **options)
    model.save_pretrained(tmp_path / "source")
    updates = read(tmp_path / "source")
    assert len(updates.of) == 14
    for update in updates.of:
        module = model.get_submodule(f"base_model.model.{update.module}")
        a, b = (part["default"].weight.detach().numpy() for part in (module.lora_A, module.lora_B))
        assert (update.rank, update.scaling) == (module.r["default"], module.scaling["default"])
        assert (update.in_features, update.out_features) == (module.in_features, module.out_features)
        np.testing.assert_array_equal(update.a(), a)
        np.testing.assert_array_equal(update.b(), b)


def test_what_mlx_writes_is_turned_round(tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", lora_of(4, 8.0))
    updates = {update.module: update for update in read(as_mlx(peft, tmp_path / "mlx", 20.0, 4)).of}
    for update in read(peft).of:
        other = updates[update.module]
        assert (other.rank, other.scaling) == (4, 20.0)
        assert (other.in_features, other.out_features) == (update.in_features, update.out_features)
        np.testing.assert_array_equal(other.a(), update.a())
        np.testing.assert_array_equal(other.b(), update.b())


@pytest.mark.parametrize("written", ["PEFT", "PEFT in memory", "mlx-lm"])
def test_magnitudes_have_their_names(tmp_path: Path, written: str) -> None:
    lora = lora_of(4, 8.0, dora=True)
    peft = folder = write_peft(tmp_path / "peft", lora)
    stored = load_file(peft / WEIGHTS)
    if written == "mlx-lm":
        folder = as_mlx(peft, tmp_path / "mlx", 2.0, 4, fine_tune_type="dora")
    elif written == "PEFT in memory":
        named = {f"{name.removesuffix('.weight')}.default.weight": value for name, value in stored.items()}
        save_file(named, peft / WEIGHTS)
    updates = read(folder)
    assert (updates.tool, updates.dora) == (written.partition(" ")[0], True)
    for update in updates.of:
        expected = stored[f"base_model.model.{update.module}.lora_magnitude_vector"]
        np.testing.assert_array_equal(update.magnitudes(), expected)


@pytest.mark.parametrize("name", ["{module}.lora_A.weight", "base_model.model.{module}.lora_A.kitchen.weight"])
def test_other_names_of_the_same(tmp_path: Path, name: str) -> None:
    """Without PEFT's prefix, and with an adapter's name as PEFT has it in memory."""
    source = write_peft(tmp_path / "source", lora_of(4, 8.0))
    expected = {update.module: update.a() for update in read(source).of}
    tensors = {}
    for old, value in load_file(source / WEIGHTS).items():
        module, _, part = old.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        tensors[name.format(module=module).replace("lora_A", f"lora_{part}")] = value
    save_file(tensors, source / WEIGHTS)
    found = {update.module: update.a() for update in read(source).of}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(value, expected[module]) for module, value in found.items())


def test_one_projection_under_two_names_is_refused(tmp_path: Path) -> None:
    source = write_peft(tmp_path / "source", lora_of(4, 8.0))
    tensors = load_file(source / WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name.removeprefix("base_model.model."): tensors[name]}, source / WEIGHTS)
    with pytest.raises(IncompatibleError, match=r"has A twice, as .* and under another name"):
        read(source)


def test_an_adapter_that_peft_saved_on_all_linear_layers_is_read(tmp_path: Path) -> None:
    peft_model(torch_model(), r=4, target_modules=ALL).save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / CONFIG).read_text())
    assert len(config) > 30, "fields that PEFT writes today are passed over or understood"
    assert read(tmp_path / "source").tool == "PEFT"


def test_bytes_that_mean_anything_else_are_never_a_traceback(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    source = write_peft(tmp_path / "source", lora_of(1, 8.0, ["o_proj"]))
    refused = 0
    for name in (CONFIG, WEIGHTS):
        whole = (source / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for place in generator.integers(min(len(whole), 800), size=3):
                damaged[place] = generator.integers(256)
            (source / name).write_bytes(bytes(damaged))
            try:
                for update in read(source).of:
                    update.a(), update.b()
            except EdgetuneError:
                refused += 1
        (source / name).write_bytes(whole)
    assert refused > 200, refused
