"""Adapter folders against PEFT itself, and everything that must not get in."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgetune.cli import main
from edgetune.cli.prepare import command
from edgetune.config import PrepareConfig
from edgetune.describe import describe
from edgetune.errors import EdgetuneError, IncompatibleError, UsageError, VerificationError
from edgetune.formats.adapter import CONFIG, MANIFEST, PREFIX, WEIGHTS, read_adapter, write_adapter
from edgetune.formats.manifest import AdapterManifest, BaseModel, Tokenizer
from edgetune.formats.manifest_json import read_manifest, write_manifest
from edgetune.model.lora import Lora, Slot, initial_parameters
from edgetune.preparation.slots import lora_of
from support.small_checkpoint import POINTER

HIDDEN, INTERMEDIATE, LAYERS = 16, 24, 2
MODULES = {
    "self_attn.qkv_proj": (HIDDEN, 3 * HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_up_proj": (HIDDEN, 2 * INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
LORA = Lora(
    rank=4,
    alpha=6.0,
    target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    slots=[Slot(f"model.layers.{layer}.{name}", *sizes) for layer in range(LAYERS) for name, sizes in MODULES.items()],
)
BASE = BaseModel("org/tiny-phi3", "a" * 64, "fp32")
OTHER = BaseModel("other", "b" * 64, "fp32")
TOKENIZER = Tokenizer("1" * 64, "2" * 64, "<s>", "<|end|>", 0)


def random_parameters(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in LORA.shapes().items()}


def write(folder: Path, parameters: dict[str, np.ndarray], lora: Lora = LORA) -> Path:
    folder.mkdir()
    write_adapter(
        folder, base=BASE, tokenizer=TOKENIZER, lora=lora, parameters=parameters, provenance={"made by": "a test"}
    )
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    return read_adapter(folder, LORA, BASE, TOKENIZER)


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert list(left) == list(right) == list(LORA.shapes())
    for name, value in left.items():
        assert value.dtype == right[name].dtype == np.float32
        assert value.tobytes() == right[name].tobytes(), name


@pytest.fixture
def phi3() -> Any:
    torch = pytest.importorskip("torch")
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=40,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config).eval()


def peft_model(model: Any, **options: Any) -> Any:
    """A PEFT model with random A and B, as training leaves it."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "r": LORA.rank,
        "lora_alpha": 6,
        "target_modules": LORA.target_modules,
        "task_type": "CAUSAL_LM",
    }
    wrapped = get_peft_model(model, LoraConfig(**(settings | options)))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return wrapped


def saved(folder: Path, model: Any, **options: Any) -> Path:
    peft_model(model, **options).save_pretrained(folder)
    return folder


# What edgetune writes, PEFT reads.


def test_peft_loads_what_was_written(tmp_path: Path, phi3: Any) -> None:
    import torch
    from peft import PeftModel

    parameters = random_parameters()
    folder = write(tmp_path / "adapter", parameters)
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        # W + scaling · B·A by hand, in a copy of the model.
        merged = type(phi3)(phi3.config).eval()
        merged.load_state_dict(phi3.state_dict())
        for slot in LORA.slots:
            weight = merged.get_submodule(slot.name).weight
            a, b = (torch.from_numpy(parameters[name]) for name in (slot.a, slot.b))
            weight += LORA.scaling_of(slot.module) * b @ a
        expected, base = merged(ids).logits, phi3(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT warns of missing and of unexpected keys
            loaded = PeftModel.from_pretrained(phi3, folder)
        logits = loaded(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - base).abs().max() > 0.1
    for name, value in parameters.items():
        stem, _, suffix = name.rpartition(".")
        tensor = loaded.get_parameter(f"base_model.model.{stem}.default.{suffix}")
        assert tensor.detach().numpy().tobytes() == value.tobytes()


def test_the_configuration_is_the_one_peft_would_write(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = write(tmp_path / "adapter", random_parameters())
    expected = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=LORA.target_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE.name,
        inference_mode=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peft.PeftConfig.from_pretrained(str(folder)).to_dict() == expected.to_dict()
    assert json.loads((folder / CONFIG).read_text()).keys() <= expected.to_dict().keys()


def test_a_fractional_alpha_survives(tmp_path: Path) -> None:
    lora = replace(LORA, alpha=2.5)
    folder = write(tmp_path / "adapter", random_parameters(), lora)
    assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == 2.5
    read_adapter(folder, lora, BASE, TOKENIZER)


def test_initial_parameters_have_the_distribution_of_pefts(phi3: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=64, target_modules=LORA.target_modules, task_type="CAUSAL_LM")
    model = get_peft_model(phi3, config)
    ours = initial_parameters(replace(LORA, rank=64), seed=3)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == np.float32
        assert value.shape == theirs[name].shape
        if "lora_B" in name:
            assert not value.any()
            assert not theirs[name].any()
        else:
            assert np.abs(value).max() == pytest.approx(np.abs(theirs[name]).max(), rel=0.02)
            assert value.std() == pytest.approx(theirs[name].std(), rel=0.06)
            assert abs(value.mean()) < 0.1 * value.std()


# What PEFT saves, edgetune reads.


def test_what_peft_saved_is_read_and_written_bit_for_bit(tmp_path: Path, phi3: Any) -> None:
    folder = saved(tmp_path / "peft", phi3)
    original = load_file(folder / WEIGHTS)
    parameters = read(folder)
    assert_same(parameters, {name: original[f"base_model.model.{name}"] for name in LORA.shapes()})
    again = write(tmp_path / "again", parameters)
    assert load_file(again / WEIGHTS).keys() == original.keys()
    assert all(value.tobytes() == original[name].tobytes() for name, value in load_file(again / WEIGHTS).items())
    assert_same(read(again), parameters)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_precision_is_widened_exactly(tmp_path: Path, phi3: Any, dtype: str) -> None:
    import torch

    model = peft_model(phi3).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "peft")
    state = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora_" in name}
    expected = {name: state[f"base_model.model.{name}"].float().numpy() for name in LORA.shapes()}
    assert_same(read(tmp_path / "peft"), expected)


@pytest.mark.parametrize(
    "targets", [["self_attn.qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "all-linear", r".*_proj"]
)
def test_other_ways_to_name_the_same_modules(tmp_path: Path, phi3: Any, targets: list[str] | str) -> None:
    read(saved(tmp_path / "peft", phi3, target_modules=targets))


def test_layers_that_peft_left_out_change_nothing(tmp_path: Path, phi3: Any) -> None:
    folder = saved(tmp_path / "peft", phi3, layers_to_transform=[1])
    original = load_file(folder / WEIGHTS)
    parameters = read(folder)
    assert parameters.keys() == LORA.shapes().keys()
    for name, value in parameters.items():
        if name.startswith("model.layers.1."):
            np.testing.assert_array_equal(value, original[f"base_model.model.{name}"])
        elif ".lora_B." in name:
            assert not value.any()
        else:
            assert value.any(), "such an A could never learn"
    again = write(tmp_path / "again", parameters, LORA.from_layer(1))
    assert json.loads((again / CONFIG).read_text())["layers_to_transform"] == [1]
    assert load_file(again / WEIGHTS).keys() == original.keys()
    assert_same(read(again), parameters)


def test_layers_that_should_be_there_are_missed(tmp_path: Path, phi3: Any) -> None:
    folder = saved(tmp_path / "peft", phi3, layers_to_transform=[0])
    config = json.loads((folder / CONFIG).read_text())
    for layers, reason in ([None, "8 tensors are missing: base_model.model.model.layers.1."], [[1], "have no slot"]):
        (folder / CONFIG).write_text(json.dumps(config | {"layers_to_transform": layers}))
        with pytest.raises(IncompatibleError, match=reason):
            read(folder)


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"r": 2}, ["r is 2, the bundle's is 4", "16 tensors are of another shape", "[2, 16], expected [4, 16]"]),
        ({"lora_alpha": 8}, ["lora_alpha is 8, the bundle's is 6"]),
        ({"target_modules": ["qkv_proj"]}, ["target_modules are ['qkv_proj']", "12 tensors are missing"]),
        ({"target_modules": [*LORA.target_modules, "lm_head"]}, ["3 tensors have no slot", "lm_head.lora_A"]),
        ({"use_dora": True}, ["use_dora is True", "8 tensors have no slot"]),
        ({"use_rslora": True}, ["use_rslora is True"]),
        ({"bias": "lora_only"}, ["bias is 'lora_only'"]),
        ({"lora_bias": True}, ["lora_bias is True", "lora_B.bias"]),
        ({"rank_pattern": {"o_proj": 2}}, ["rank_pattern is {'o_proj': 2}", "4 tensors are of another shape"]),
        ({"alpha_pattern": {"o_proj": 2}}, ["alpha_pattern is {'o_proj': 2}"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save is ['lm_head']", "lm_head.weight"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights is 'pissa', which rewrites the base's weights"]),
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, ["r is 2", "lora_alpha is 8", "use_rslora", "shape"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:`lora_bias=True`", "ignore:Adapter 'default'"
)
def test_other_forms_of_lora_are_refused(
    tmp_path: Path, phi3: Any, options: dict[str, Any], reasons: list[str]
) -> None:
    folder = saved(tmp_path / "peft", phi3, **options)
    with pytest.raises(IncompatibleError) as caught:
        read(folder)
    message = str(caught.value)
    assert "org/tiny-phi3 with rank 4, alpha 6, 8 slots" in message
    assert all(reason in message for reason in reasons), message


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"r": 2}, "--rank 2 --alpha 6 --targets all-linear --output BUNDLE"),
        ({"lora_alpha": 8}, "--rank 4 --alpha 8 --targets all-linear --output BUNDLE"),
        ({"lora_alpha": 0.5}, "--rank 4 --alpha 0.5 --targets all-linear --output BUNDLE"),
        ({"target_modules": ["o_proj", "qkv_proj"]}, "--rank 4 --alpha 6 --targets attention --output BUNDLE"),
        ({"target_modules": r".*(qkv|o)_proj"}, "--rank 4 --alpha 6 --targets attention --output BUNDLE"),
        ({"target_modules": ["down_proj", "o_proj"]}, "--rank 4 --alpha 6 --targets o_proj,down_proj --output BUNDLE"),
        ({"use_rslora": True}, "--rank 4 --alpha 6 --rslora --targets all-linear --output BUNDLE"),
        (
            {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"o_proj": 5}},
            "--rank 4 --alpha 6 --rank-pattern down_proj=2 --alpha-pattern o_proj=5 --targets all-linear "
            "--output BUNDLE",
        ),
    ],
    ids=str,
)
def test_a_form_that_prepare_can_make_comes_with_the_line_that_fits(
    tmp_path: Path, phi3: Any, options: dict[str, Any], advice: str
) -> None:
    """The line is read by the command line itself; a bundle of what it says takes the adapter."""
    folder = saved(tmp_path / "peft", phi3, **options)
    with pytest.raises(IncompatibleError) as caught:
        read(folder)
    *_, line = str(caught.value).splitlines()
    assert line == f"a bundle of the adapter's rank, alpha and projections: edgetune prepare CHECKPOINT {advice}"
    # click keeps the help option of the first context for good: it has to be that of the command line.
    group = click.Context(main, **main.context_settings)
    given = command.make_context("prepare", shlex.split(line.partition("edgetune prepare ")[2]), parent=group).params
    patterns = {key: dict(given[key]) for key in ("rank_pattern", "alpha_pattern")}
    config = PrepareConfig(**{key: given[key] for key in ("rank", "alpha", "targets", "rslora")}, **patterns)
    slots = [slot for slot in LORA.slots if slot.module in lora_of(config).target_modules]
    read_adapter(folder, lora_of(config, slots), BASE, TOKENIZER)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_alpha": 3},
        {"r": 2, "rank_pattern": dict.fromkeys(LORA.target_modules, 4)},
        {"lora_alpha": 1, "alpha_pattern": dict.fromkeys(MODULES, 6)},
        {"lora_alpha": 1, "alpha_pattern": {slot.name: 6 for slot in LORA.slots}},
        {"use_rslora": True, "alpha_pattern": dict.fromkeys(LORA.target_modules, 3)},
    ],
    ids=str,
)
def test_fields_that_come_to_the_same_are_taken(tmp_path: Path, phi3: Any, options: dict[str, Any]) -> None:
    """What PEFT computes with them is what the bundle's rank 4 and alpha 6 compute."""
    folder = saved(tmp_path / "peft", phi3, **options)
    for name, value in read(folder).items():
        np.testing.assert_array_equal(value, load_file(folder / WEIGHTS)[PREFIX + name])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_rslora": True}, "use_rslora is True, the bundle's is False"),
        ({"rank_pattern": {"down_proj": 2}}, "rank_pattern is {'down_proj': 2}, the bundle's is {}"),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 2}}, "alpha_pattern is {'layers.1.mlp.down_proj': 2}, the"),
        ({"alpha_pattern": {".*down_proj": 6}}, "alpha_pattern is {'.*down_proj': 6}, expected numbers"),
        ({"alpha_pattern": {"down_proj": float("inf")}}, "alpha_pattern is {'down_proj': inf}, expected numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_other_scaling_is_refused_by_name(tmp_path: Path, phi3: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        read(saved(tmp_path / "peft", phi3, **options))
    assert f"{CONFIG}: {reason}" in str(caught.value)


def test_a_hostile_pattern_takes_no_time(tmp_path: Path, phi3: Any) -> None:
    """As a regular expression this one would run for as long as the world stands."""
    folder = saved(tmp_path / "peft", phi3)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"rank_pattern": {"([a-z_.]+)+1x": 4}}))
    with pytest.raises(IncompatibleError, match="rank_pattern is"):
        read(folder)


@pytest.mark.parametrize(
    "method", [{"rank_stabilised": True}, {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 9.0}}], ids=str
)
def test_ranks_and_scaling_are_part_of_the_contract(tmp_path: Path, method: dict[str, Any]) -> None:
    own = replace(LORA, **method)
    folder = write(tmp_path / "adapter", initial_parameters(own, 0), lora=own)
    config = json.loads((folder / CONFIG).read_text())
    assert config["use_rslora"] is own.rank_stabilised
    assert (config["rank_pattern"], config["alpha_pattern"]) == (own.rank_pattern, own.alpha_pattern)
    assert read_adapter(folder, own, BASE, TOKENIZER).keys() == own.shapes().keys()
    with pytest.raises(IncompatibleError, match=r"the adapter has rank 4.*the bundle rank 4, alpha 6"):
        read_adapter(folder, LORA, BASE, TOKENIZER)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"rank_pattern": {"layers.1.mlp.down_proj": 2}}, "takes rank_pattern {'layers.1.mlp.down_proj': 2}; train"),
        ({"target_modules": [*LORA.target_modules, "lm_head"]}, "'lm_head', 'o_proj', 'qkv_proj'], and no"),
        ({"lora_alpha": 0}, "no `edgetune prepare` line takes r 4 and lora_alpha 0; train it again with a whole"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_form_that_prepare_cannot_make_says_what_would_fit(
    tmp_path: Path, phi3: Any, options: dict[str, Any], advice: str
) -> None:
    with pytest.raises(IncompatibleError) as caught:
        read(saved(tmp_path / "peft", phi3, **options))
    message = str(caught.value)
    assert advice in message
    assert "edgetune prepare CHECKPOINT" not in message
    if "target_modules" in options:
        assert message.endswith("train it again on some of qkv_proj, o_proj, gate_up_proj, down_proj")


def test_no_line_where_rank_alpha_and_projections_fit_already(tmp_path: Path, phi3: Any) -> None:
    with pytest.raises(IncompatibleError) as caught:
        read(saved(tmp_path / "peft", phi3, lora_bias=True))
    assert "edgetune prepare" not in str(caught.value)


def test_an_adapter_of_another_bundle_comes_with_the_line_that_fits(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", random_parameters())
    with pytest.raises(IncompatibleError) as caught:
        read_adapter(folder, replace(LORA, rank=2, alpha=3.0), BASE, TOKENIZER)
    assert str(caught.value).endswith("CHECKPOINT --rank 4 --alpha 6 --targets all-linear --output BUNDLE")


def test_weights_that_git_has_not_fetched_are_named(peft_folder: Path) -> None:
    (peft_folder / WEIGHTS).write_bytes(POINTER)
    with pytest.raises(VerificationError, match="a Git LFS pointer in the place of 4,972,489,328 bytes"):
        read(peft_folder)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"from_the_future": {"a": 1}}, "from_the_future is {'a': 1}"),
        ({"target_modules": ["x" * 200]}, "target_modules are"),
    ],
)
def test_strange_configurations_are_refused(
    tmp_path: Path, peft_folder: Path, changes: dict[str, Any], reason: str
) -> None:
    edit(peft_folder, **changes)
    with pytest.raises(IncompatibleError) as caught:
        read(peft_folder)
    assert reason in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 300


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    """What PEFT would have saved, without the time PEFT takes."""
    folder = write(tmp_path / "peft", random_parameters())
    (folder / MANIFEST).unlink()
    return folder


def test_the_stand_in_for_pefts_folder_is_accepted(peft_folder: Path) -> None:
    assert_same(read(peft_folder), random_parameters())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"r": 1e', b"[" * 100_000, b" " * (1 << 21)])
def test_broken_configurations(peft_folder: Path, data: bytes) -> None:
    (peft_folder / CONFIG).write_bytes(data)
    with pytest.raises(VerificationError, match=CONFIG):
        read(peft_folder)


def test_every_truncation_of_the_weights_is_refused(peft_folder: Path) -> None:
    whole = (peft_folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1}
    for cut in sorted(cuts):
        (peft_folder / WEIGHTS).write_bytes(whole[:cut])
        with pytest.raises(VerificationError, match=r"is cut off: it has [\d,]+ .*; copy it again"):
            read(peft_folder)
    (peft_folder / WEIGHTS).write_bytes(whole + b"\0")
    with pytest.raises(VerificationError, match="not a valid safetensors file"):
        read(peft_folder)


@pytest.mark.parametrize("data", [b"garbage" * 99, b"\xff" * 64, b"PK\x03\x04" + b"\0" * 64])
def test_garbage_instead_of_weights_is_refused(peft_folder: Path, data: bytes) -> None:
    (peft_folder / WEIGHTS).write_bytes(data)
    with pytest.raises(VerificationError, match="not a valid safetensors file"):
        read(peft_folder)


def change_tensor(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = {name: value.copy() for name, value in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


FIRST = f"base_model.model.{LORA.slots[0].a}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(peft_folder: Path, value: float) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[FIRST][0, 0] = value

    change_tensor(peft_folder, change)
    with pytest.raises(VerificationError, match=r"NaN or infinity in 1 tensors: .*qkv_proj\.lora_A"):
        read(peft_folder)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8])
def test_other_types_are_refused(peft_folder: Path, dtype: type) -> None:
    change_tensor(peft_folder, lambda tensors: tensors.update({FIRST: tensors[FIRST].astype(dtype)}))
    with pytest.raises(IncompatibleError, match="another type than F32, F16, BF16"):
        read(peft_folder)


def test_a_transposed_tensor_is_refused(peft_folder: Path) -> None:
    change_tensor(peft_folder, lambda tensors: tensors.update({FIRST: np.ascontiguousarray(tensors[FIRST].T)}))
    with pytest.raises(IncompatibleError, match=r"1 tensors are of another shape: .* \[16, 4\], expected \[4, 16\]"):
        read(peft_folder)


def test_pickle_is_refused_with_the_way_out(peft_folder: Path) -> None:
    (peft_folder / WEIGHTS).rename(peft_folder / "adapter_model.bin")
    with pytest.raises(VerificationError, match=r"adapter_model\.bin is pickle.*safe_serialization=True"):
        read(peft_folder)


def test_tensors_of_mlx_are_named(peft_folder: Path) -> None:
    (peft_folder / WEIGHTS).rename(peft_folder / "adapters.safetensors")
    for look in (read, describe):
        with pytest.raises(VerificationError, match=r"adapters\.safetensors is mlx-lm's: edgetune import .* --bundle"):
            look(peft_folder)


def test_what_could_be_imported_comes_with_the_command(tmp_path: Path, phi3: Any) -> None:
    folder = saved(tmp_path / "peft", phi3, r=2, target_modules=["o_proj"])
    with pytest.raises(IncompatibleError, match=r"re-shaped to fit: edgetune import .*peft --bundle BUNDLE --output A"):
        read(folder)
    for options in ({"r": 8}, {"lora_bias": True}):
        with pytest.raises(IncompatibleError) as caught:
            read(saved(tmp_path / f"{options}", phi3, **options))
        assert "edgetune import" not in str(caught.value)


def test_missing_weights_and_missing_folders(peft_folder: Path, tmp_path: Path) -> None:
    (peft_folder / WEIGHTS).unlink()
    with pytest.raises(VerificationError, match=f"no {WEIGHTS}"):
        read(peft_folder)
    os.mkfifo(peft_folder / WEIGHTS)  # reading it would hang
    with pytest.raises(VerificationError, match=f"no {WEIGHTS}"):
        read(peft_folder)
    for path in (tmp_path, tmp_path / "absent", peft_folder / CONFIG):
        with pytest.raises(UsageError, match="no adapter here"):
            read(path)


# The contract of what edgetune wrote.


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write(tmp_path / "own", random_parameters())


def test_own_adapters_come_back_bit_for_bit(own: Path) -> None:
    assert_same(read(own), random_parameters())
    manifest = read_manifest((own / MANIFEST).read_bytes(), AdapterManifest, "")
    assert manifest.provenance == {"made by": "a test"}
    assert [entry.path for entry in manifest.files] == [CONFIG, WEIGHTS]


def test_the_same_checkpoint_stored_otherwise_fits(own: Path) -> None:
    read_adapter(own, LORA, replace(BASE, name="/elsewhere/phi", weights="int4"), TOKENIZER)


@pytest.mark.parametrize(
    ("lora", "base", "tokenizer", "reason"),
    [
        (LORA, OTHER, TOKENIZER, "trained on org/tiny-phi3 (aaaaaaaaaaaaaaaa…), the bundle holds other (bbbb"),
        (LORA, BASE, replace(TOKENIZER, sha256="9" * 64), "tokenizer is 1111111111111111…, the bundle's 9999"),
        (LORA, BASE, replace(TOKENIZER, chat_template_sha256=None), "template is 2222222222222222, the bundle's none"),
        (replace(LORA, rank=2), BASE, TOKENIZER, "has rank 4, alpha 6, 8 slots"),
        (replace(LORA, alpha=1.0), BASE, TOKENIZER, "the bundle rank 4, alpha 1, 8 slots"),
        (replace(LORA, slots=LORA.slots[:-1]), BASE, TOKENIZER, "the bundle rank 4, alpha 6, 7 slots"),
    ],
    ids=["base", "tokenizer", "template", "rank", "alpha", "slots"],
)  # fmt: skip
def test_another_contract_is_refused(own: Path, lora: Lora, base: BaseModel, tokenizer: Tokenizer, reason: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        read_adapter(own, lora, base, tokenizer)
    assert reason in str(caught.value)


def test_all_differences_of_a_contract_are_named_at_once(own: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"(?s)trained on.*tokenizer is.*rank 4"):
        read_adapter(own, replace(LORA, rank=2), replace(BASE, sha256="b" * 64), replace(TOKENIZER, sha256="9" * 64))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_flipped_bits_are_found(own: Path, name: str) -> None:
    whole = (own / name).read_bytes()
    generator = np.random.default_rng(1)
    for _ in range(60):
        place, bit = int(generator.integers(len(whole))), 1 << int(generator.integers(8))
        (own / name).write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises((VerificationError, IncompatibleError)):
            read(own)


def test_a_contract_without_its_weights_is_refused(own: Path) -> None:
    manifest = read_manifest((own / MANIFEST).read_bytes(), AdapterManifest, "")
    (own / MANIFEST).write_bytes(write_manifest(replace(manifest, files=manifest.files[:1])))
    with pytest.raises(VerificationError, match=f"does not list {WEIGHTS}"):
        read(own)


def test_only_finite_parameters_are_written(tmp_path: Path) -> None:
    parameters = random_parameters()
    parameters[LORA.slots[3].b][1, 1] = np.nan
    with pytest.raises(VerificationError, match=r"layers\.0\.mlp\.down_proj\.lora_B"):
        write(tmp_path / "adapter", parameters)
    assert not (tmp_path / "adapter" / MANIFEST).exists()


def test_bytes_that_mean_anything_else_are_never_a_traceback(peft_folder: Path, tmp_path: Path) -> None:
    """Random damage to a folder without a contract: read, or refused in one of the foreseen ways."""
    generator = np.random.default_rng(2)
    outcomes = {"read": 0, "refused": 0}
    for name in (CONFIG, WEIGHTS):
        whole = (peft_folder / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for place in generator.integers(min(len(whole), 2500), size=3):
                damaged[place] = generator.integers(256)
            folder = tmp_path / "damaged"
            shutil.copytree(peft_folder, folder)
            (folder / name).write_bytes(bytes(damaged))
            try:
                read(folder)
                outcomes["read"] += 1
            except EdgetuneError:
                outcomes["refused"] += 1
            shutil.rmtree(folder)
    assert outcomes["refused"] > 200, outcomes
