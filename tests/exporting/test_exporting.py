"""Exported folders against PyTorch and PEFT, tensor by tensor and token by token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.cli.failures import exit_code_of
from edgetune.config import Base, ExportConfig, MergedPrecision
from edgetune.data.encode import load_encoder
from edgetune.data.examples import load_examples
from edgetune.errors import DataError, EdgetuneError, IncompatibleError, NoRoomError, UsageError, VerificationError
from edgetune.exporting import ExportReport, export
from edgetune.exporting.validation import validation_rows_of
from edgetune.formats.adapter import write_adapter
from edgetune.formats.bundle import Bundle
from edgetune.formats.genai import adapter_file, open_model
from edgetune.formats.manifest import ModelManifest
from edgetune.formats.storage import sha256_of
from edgetune.generation import generate_ids
from edgetune.model.blocks import BITS
from edgetune.model.lora import initial_parameters
from edgetune.text.pulse import Pulse
from edgetune.training.provenance import validation_rows
from support.bundle_copy import copy_of_bundle
from support.tiny_phi3 import VARIANTS, WIDE, bundle, greedy, parameters, save_adapter, silent, torch_model, weights

PROMPT = [int(token) for token in np.random.default_rng(5).integers(10, 440, 10)]
MERGED = ExportConfig(merge=True)
MERGED_INT4 = ExportConfig(merge=True, precision="int4", unmeasured=True)
KEPT = ExportConfig(merge=False)
ROWS = [
    {"prompt": "what is it?", "completion": " the lamp in the kitchen"},
    {"prompt": "turn it off", "completion": " now"},
    {"prompt": "hello", "completion": " world, what is it? tell me the answer"},
]
ADAPTER = adapter_file("adapter")
BASES: tuple[Base, ...] = ("int4", "fp32")
OTHERS: list[tuple[str, Base]] = [("grouped-query", "int8"), ("grouped-query", "fp16"), ("partial", "int8")]
EACH = [*((variant, base) for variant in VARIANTS for base in BASES), *OTHERS]

Exporter = Callable[[str, Base, ExportConfig], Path]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Bundle], Path]:
    @cache
    def make(path: Path) -> Path:
        of = next(bundle(*key) for key in EACH if bundle(*key).path == path)
        return save_adapter(tmp_path_factory.mktemp("adapters") / "adapter", of)

    return lambda of: make(of.path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, adapter: Callable[[Bundle], Path]) -> Exporter:
    @cache
    def make(variant: str, base: Base, config: ExportConfig) -> Path:
        source = bundle(variant, base)
        output = tmp_path_factory.mktemp("models") / "model"
        export(source, adapter(source), output, config)
        return output

    return make


def expected_weights(source: Bundle, base: str) -> dict[str, NDArray[np.float32]]:
    """W + scaling · B·A, written down once more, in float64."""
    values = parameters(source.manifest.base.name)
    expected = {name: value.astype(np.float64) for name, value in weights(source.path).items()}
    for layer in range(2):
        for part, slot, rows in (
            ("attn.qkv_proj", "self_attn.qkv_proj", slice(None)),
            ("attn.o_proj", "self_attn.o_proj", slice(None)),
            ("mlp.gate_proj", "mlp.gate_up_proj", slice(0, 192)),
            ("mlp.up_proj", "mlp.gate_up_proj", slice(192, 384)),
            ("mlp.down_proj", "mlp.down_proj", slice(None)),
        ):
            a = values[f"model.layers.{layer}.{slot}.lora_A.weight"].astype(np.float64)
            b = values[f"model.layers.{layer}.{slot}.lora_B.weight"].astype(np.float64)
            expected[f"model.layers.{layer}.{part}"] += 2.0 * (b[rows] @ a)
    return {name: value.astype(np.float32) for name, value in expected.items()}


def peft_model(source: Bundle, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(torch_model(source.manifest.base.name, source.path), adapter).eval()


@pytest.mark.parametrize(("variant", "base"), EACH)
def test_merged_weights_are_base_plus_update(exported: Exporter, variant: str, base: Base) -> None:
    found, expected = weights(exported(variant, base, MERGED)), expected_weights(bundle(variant, base), base)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-6 * np.abs(value).max(), name


@pytest.mark.parametrize(("variant", "base"), EACH)
def test_merged_and_kept_answer_as_peft_does(
    exported: Exporter, adapter: Callable[[Bundle], Path], variant: str, base: Base
) -> None:
    source = bundle(variant, base)
    expected = greedy(peft_model(source, adapter(source)), PROMPT, 24)
    unadapted = greedy(torch_model(variant, source.path), PROMPT, 24)
    assert generate_ids(source.path, PROMPT, 24) == unadapted
    assert expected != unadapted, "an adapter that changes nothing shows nothing"
    assert generate_ids(exported(variant, base, KEPT), PROMPT, 24) == expected
    assert generate_ids(exported(variant, base, MERGED), PROMPT, 24) == expected


@pytest.mark.parametrize("base", BASES)
def test_base_answers_unchanged_without_the_adapter(exported: Exporter, base: Base) -> None:
    import onnxruntime_genai as og

    folder = exported("grouped-query", base, KEPT)
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    adapters.load(str(folder / ADAPTER), "mine")

    def answer(adapted: bool) -> list[int]:
        search = og.GeneratorParams(model)
        search.set_search_options(do_sample=False, max_length=len(PROMPT) + 24)
        generator = og.Generator(model, search)
        if adapted:
            generator.set_active_adapter(adapters, "mine")
        generator.append_tokens(np.array(PROMPT, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(PROMPT) :]]

    plain = generate_ids(bundle("grouped-query", base).path, PROMPT, 24)
    assert answer(False) == plain
    assert answer(True) == generate_ids(folder, PROMPT, 24) != plain
    assert answer(False) == plain


def test_kept_graph_takes_adapters_of_any_rank(exported: Exporter, tmp_path: Path) -> None:
    import onnxruntime as ort

    folder = exported("multi-head", "int4", KEPT)
    stored = ort.AdapterFormat.read_adapter(str(folder / ADAPTER)).get_parameters()
    doubled = {
        name: np.concatenate([value.numpy()] * 2, axis=0 if "lora_B" in name else 1) for name, value in stored.items()
    }
    wider = ort.AdapterFormat()
    wider.set_adapter_version(1)
    wider.set_model_version(1)
    wider.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in doubled.items()})
    wider.export_adapter(str(tmp_path / "wider.onnx_adapter"))
    from edgetune.generation.measure import Measured

    examples = encoded(bundle("multi-head", "int4"), tmp_path)
    model, pulse = Measured(folder, bundle("multi-head", "int4").manifest.architecture.rope), Pulse(silent, "{}")
    values = {name: value.numpy() * (2 if "lora_B" in name else 1) for name, value in stored.items()}
    twice = model.answer_loss(examples, pulse, values=values)
    assert model.answer_loss(examples, pulse, adapter=tmp_path / "wider.onnx_adapter") == pytest.approx(twice, rel=1e-5)
    assert model.answer_loss(examples, pulse) != pytest.approx(twice, rel=1e-3)


def stored(folder: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of a GenAI folder as it lies in the file."""
    import onnx
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer}


def nodes(folder: Path) -> list[tuple[Any, ...]]:
    """The operators of a GenAI folder's graph, in order, with what they take and how."""
    import onnx

    return [
        (node.op_type, tuple(node.input), sorted(attribute.SerializeToString() for attribute in node.attribute))
        for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    ]


@pytest.mark.parametrize(
    ("variant", "base", "precision"),
    [
        ("partial", "int4", "int4"),
        ("grouped-query", "int8", "int4"),
        ("longrope", "fp32", "int4"),
        ("partial", "int4", "int8"),
        ("grouped-query", "int8", "int8"),
        ("longrope", "fp32", "int8"),
    ],
)
def test_a_merge_into_blocks_is_the_merge_in_whole_steps(
    exported: Exporter, variant: str, base: Base, precision: MergedPrecision
) -> None:
    folder = exported(variant, base, ExportConfig(precision=precision, unmeasured=True))
    exact, rounded, tensors = weights(exported(variant, base, MERGED)), weights(folder), stored(folder)
    assert exact.keys() == rounded.keys()
    for name, value in exact.items():
        step = np.abs(tensors[f"{name}.MatMul.weight_scales"])
        assert step.shape == (len(value), value.shape[1] // 32)
        errors = (rounded[name] - value).reshape(*step.shape, 32)
        # The head's row of the token for padding is zero where it is tied.
        assert not errors[step == 0].any()
        errors = errors[step != 0] / step[step != 0, None]
        # The base goes to its nearest point, the update to one beside it; a few weights would lie beyond the grid.
        assert np.abs(errors).max() < 1.7 and np.abs(errors).mean() < 0.5, name
        # The few points of an int4 block miss int8's by as much wherever they are: that is no draw, and has a mean.
        if (base, precision) != ("int4", "int8"):
            assert abs(errors.mean()) <= 4 * errors.std() / errors.size**0.5, name
    assert {path.name for path in folder.iterdir()} == {path.name for path in exported(variant, base, MERGED).iterdir()}
    assert (folder / "model.onnx.data").stat().st_size == (
        bundle(variant, precision).path / "model.onnx.data"
    ).stat().st_size
    # The very graph of a base of this precision: it takes as long.
    assert nodes(folder) == nodes(bundle(variant, precision).path)
    expected = greedy(torch_model(variant, folder), PROMPT, 24)
    assert generate_ids(folder, PROMPT, 24) == expected


@pytest.mark.parametrize(
    ("base", "precision"), [*((base, "int4") for base in get_args(Base)), ("int8", "int8"), ("fp32", "int8")]
)
@pytest.mark.parametrize("variant", ["multi-head", "partial"])
def test_what_the_adapter_leaves_alone_is_the_builders_to_the_byte(
    variant: str, base: Base, precision: MergedPrecision, tmp_path: Path
) -> None:
    """A base of that precision comes back as it is; any other becomes what GenAI's builder makes of it."""
    source, changed = bundle(variant, base), "model.layers.1.self_attn.o_proj"
    values = parameters(variant)
    values |= {name: np.zeros_like(b) for name, b in values.items() if "lora_B" in name and changed not in name}
    of = source.manifest
    (tmp_path / "adapter").mkdir()
    write_adapter(
        tmp_path / "adapter", base=of.base, tokenizer=of.tokenizer, lora=of.lora, parameters=values, provenance={}
    )
    export(source, tmp_path / "adapter", tmp_path / "model", ExportConfig(precision=precision, unmeasured=True))
    found, expected = stored(tmp_path / "model"), stored(bundle(variant, precision).path)
    assert found.keys() == expected.keys()
    # fp16 and int8 moved the weights before; where they lay is not known any more.
    exact = base in (precision, "fp32")
    same = {name for name in found if found[name].tobytes() == expected[name].tobytes()}
    layer = "model.layers.1.attn.o_proj.MatMul.weight"
    stored_as = f"{layer}_Q{BITS[precision]}"
    assert stored_as not in same
    if exact:
        assert found.keys() - same <= {stored_as, f"{layer}_scales"}
    assert {name for name in found if "MatMul" not in name} <= same


def test_merge_to_int4_is_the_same_each_time_whatever_the_pieces(
    exported: Exporter, adapter: Callable[[Bundle], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgetune.exporting.merge as merging

    for base in get_args(Base):
        source = bundle("grouped-query", base)
        whole = (exported("grouped-query", base, MERGED_INT4) / "model.onnx.data").read_bytes()
        for name, piece in (("again", merging._PIECE), ("pieces", 1 << 14)):
            with monkeypatch.context() as patch:
                patch.setattr(merging, "_PIECE", piece)
                export(source, adapter(source), tmp_path / f"{base}-{name}", MERGED_INT4)
            assert (tmp_path / f"{base}-{name}" / "model.onnx.data").read_bytes() == whole


@pytest.mark.parametrize("base", get_args(Base))
def test_merge_to_int4_holds_no_whole_weight(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    import edgetune.exporting.merge as merging

    source, values = bundle(WIDE, base), parameters(WIDE)
    monkeypatch.setattr(merging, "_PIECE", 1 << 16)
    merging.merge_adapter(source.path, tmp_path, source.manifest.lora, values, "int4")  # imports are not counted
    tracemalloc.start()
    try:
        merging.merge_adapter(source.path, tmp_path, source.manifest.lora, values, "int4")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = max(value.nbytes for value in weights(source.path).values())
    assert largest == 3 << 20
    assert peak < largest / 2


Learnt = Callable[[Base], tuple[Path, Path]]
LEARNT_RATE, LEARNT_STEPS = 3e-4, 80


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """An adapter that PEFT trained on a base until it knew the rows, and the rows: its updates are small."""

    @cache
    def make(base: Base) -> tuple[Path, Path]:
        import torch
        from peft import PeftModel

        source, folder = bundle(WIDE, base), tmp_path_factory.mktemp("learnt")
        of, fresh = source.manifest, folder / "fresh"
        fresh.mkdir()
        start = initial_parameters(of.lora, seed=0)
        write_adapter(fresh, base=of.base, tokenizer=of.tokenizer, lora=of.lora, parameters=start, provenance={})
        model = PeftModel.from_pretrained(torch_model(WIDE, source.path), fresh, is_trainable=True)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNT_RATE)
        examples = encoded(source, folder)
        for _ in range(LEARNT_STEPS):
            optimizer.zero_grad()
            mean_loss(model, examples).backward()
            optimizer.step()
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)  # looks for no checkpoint
        return folder / "adapter", folder / "valid.jsonl"

    return make


@pytest.mark.parametrize("base", get_args(Base))
def test_merge_to_int4_and_int8_keeps_what_was_learnt(learnt: Learnt, tmp_path: Path, base: Base) -> None:
    """By PyTorch's losses; rounding to nearest, as written down here once more, would give an int4 base back."""
    source, (adapter, rows) = bundle(WIDE, base), learnt(base)
    examples = encoded(source, tmp_path)
    report = export(source, adapter, tmp_path / "model", ExportConfig(precision="int4"), valid=rows)
    export(source, adapter, tmp_path / "int8", ExportConfig(precision="int8", unmeasured=True))
    plain = torch_loss(torch_model(WIDE, source.path), examples)
    adapted = torch_loss(peft_model(source, adapter), examples)
    merged = {name: torch_loss(torch_model(WIDE, tmp_path / name), examples) for name in ("model", "int8")}
    expected = {
        "base": plain,
        "base + adapter": adapted,
        "merged fp32": adapted,
        "merged int8": merged["int8"],
        "merged int4": merged["model"],
    }
    assert list(report.losses) == list(expected)
    assert report.losses == pytest.approx(expected, abs=2e-3)
    shares = {name: (plain - loss) / (plain - adapted) for name, loss in expected.items() if name.startswith("merged")}
    assert report.shares == pytest.approx(shares, abs=1e-3)
    assert report.kept == report.shares["merged int4"]
    assert shares["merged int8"] >= 0.99 and shares["merged int4"] >= 0.95
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("model", "int8")]
    assert files[0] == files[1], "no trial is left"
    manifest = open_model(tmp_path / "model").manifest
    assert isinstance(manifest, ModelManifest) and manifest.losses == report.losses
    if base == "int4":
        assert (plain - torch_loss(rounded_to_nearest(source, adapter), examples)) / (plain - adapted) < 0.5


def test_a_merge_by_nearest_rounding_is_refused(
    learnt: Learnt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws of a half are rounding to nearest: on the base's own grid most of the update is gone."""
    import edgetune.exporting.merge as merging

    class Halves:
        def random(self, shape: tuple[int, ...], dtype: type[np.float32]) -> NDArray[np.float32]:
            return np.full(shape, 0.5, dtype)

    source, (adapter, rows) = bundle(WIDE, "int4"), learnt("int4")
    asked = ExportConfig(precision="int4")
    assert export(source, adapter, tmp_path / "drawn", asked, valid=rows).kept is not None
    monkeypatch.setattr(merging, "generator_of", lambda name: Halves())
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(IncompatibleError) as refusal:
        export(source, adapter, out / "model", asked, valid=rows)
    assert list(out.iterdir()) == []
    forced = export(source, adapter, out / "model", replace(asked, least_kept=0.0), valid=rows)
    assert forced.kept is not None and forced.kept < 0.5
    examples = encoded(source, tmp_path)
    assert forced.losses["merged int4"] == pytest.approx(
        torch_loss(torch_model(WIDE, out / "model"), examples), abs=2e-3
    )
    for expected in (f"keeps {forced.kept:.1%}", "expected 80.0% or more", "--keep-adapter", "0 accepts any"):
        assert expected in str(refusal.value)
    for precision in ("int8", "fp32"):
        assert f"--precision {precision} ({forced.shares[f'merged {precision}']:.1%})" in str(refusal.value)
    assert "--precision int4" not in str(refusal.value)
    generate_ids(out / "model", PROMPT, 4)


def test_trials_are_left_out_where_that_is_asked_for_or_there_is_no_room(
    learnt: Learnt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgetune.exporting.survival as survival

    source, (adapter, rows) = bundle(WIDE, "int4"), learnt("int4")
    asked = ExportConfig(precision="int8")
    alone = export(source, adapter, tmp_path / "alone", replace(asked, trials=False), valid=rows)
    assert list(alone.losses) == ["base", "base + adapter", "merged int8"]

    def full(path: Path, needed: int) -> None:
        raise NoRoomError(f"{needed} bytes are not free")

    said: list[str] = []
    monkeypatch.setattr(survival, "require_room", full)
    export(source, adapter, tmp_path / "full", asked, valid=rows, say=said.append)
    assert [line for line in said if "fp32 is not measured" in line and "bytes are not free" in line]
    manifest = open_model(tmp_path / "full").manifest
    assert isinstance(manifest, ModelManifest) and manifest.losses == alone.losses


def rounded_to_nearest(source: Bundle, adapter: Path) -> Any:
    """PyTorch's model of the sum, each block on the grid whose lowest point is its largest weight."""
    import torch

    model = peft_model(source, adapter).merge_and_unload()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            blocks = module.weight.data.reshape(-1, 32)
            scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
            module.weight.data = ((blocks / scale).round().clamp(-8, 7) * scale).reshape(module.weight.shape)
    return model


def test_a_merge_that_loses_too_much_is_refused_with_the_figures(learnt: Learnt, tmp_path: Path) -> None:
    source, (adapter, rows) = bundle(WIDE, "int4"), learnt("int4")
    strict = ExportConfig(merge=True, precision="int4", least_kept=1.0)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(IncompatibleError) as refusal:
        export(source, adapter, out / "model", strict, valid=rows)
    assert list(out.iterdir()) == []
    accepted = export(source, adapter, out / "model", replace(strict, least_kept=0.0), valid=rows)
    assert accepted.kept is not None and 0.95 <= accepted.kept < 1
    figures = [f"{accepted.kept:.1%}", *(f"{name} {loss:.4f}" for name, loss in accepted.losses.items())]
    for expected in (*figures, "100.0% or more", "--keep-adapter", "--least-kept"):
        assert expected in str(refusal.value)


def test_the_command_says_what_is_kept_and_refuses_what_lost_too_much(learnt: Learnt, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgetune.cli import main

    adapter, rows = learnt("int4")
    command = ["export", str(bundle(WIDE, "int4").path), "--adapter", str(adapter), "--precision", "int4"]
    refused = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "a")])
    assert refused.exit_code == exit_code_of(UsageError) and "--unmeasured" in refused.stderr
    command += ["--valid", str(rows)]
    refused = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "a"), "--least-kept", "1"])
    assert refused.exit_code == exit_code_of(IncompatibleError) and "of what was learnt" in refused.stderr
    assert not (tmp_path / "a").exists()
    told = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "a"), "--json"])
    kept = json.loads(told.stdout)["kept"]
    assert 0.95 <= kept < 1
    told = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "b")])
    assert f"\n  kept of what was learnt: {kept:.1%}\n" in told.stdout
    for name in ("fp32", "int8", "int4"):
        assert f"\n  answer loss, merged {name}: " in told.stdout
    assert f"  keeps {kept:.1%}\n" in told.stdout
    told = CliRunner().invoke(main, [*command[:-2], "--output", str(tmp_path / "c"), "--unmeasured"])
    assert "\n  not measured on held-out rows" in told.stdout


def test_a_merge_to_int4_without_rows_has_to_be_asked_for(adapter: Callable[[Bundle], Path], tmp_path: Path) -> None:
    source, out = bundle("multi-head", "int4"), tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match="--valid, or ask for it with --unmeasured"):
        export(source, adapter(source), out / "model", ExportConfig(merge=True, precision="int4"))
    assert list(out.iterdir()) == []
    assert export(source, adapter(source), out / "model", MERGED_INT4).losses == {}
    assert export(source, adapter(source), out / "fp32", MERGED).losses == {}


def test_weights_are_merged_piece_by_piece(
    exported: Exporter, adapter: Callable[[Bundle], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgetune.exporting.merge as merging

    monkeypatch.setattr(merging, "_PIECE", 1)
    monkeypatch.setattr(merging, "_SMALLEST", 64)
    pieces = []
    original = merging._transposed

    def recorded(weight: Any, start: int, stop: int) -> Any:
        pieces.append(stop - start)
        return original(weight, start, stop)

    monkeypatch.setattr(merging, "_transposed", recorded)
    for base in get_args(Base):
        source = bundle("grouped-query", base)
        export(source, adapter(source), tmp_path / base, MERGED)
        whole = (exported("grouped-query", base, MERGED) / "model.onnx.data").read_bytes()
        assert (tmp_path / base / "model.onnx.data").read_bytes() == whole
    assert max(pieces) == 64


def encoded(source: Bundle, folder: Path) -> list[Any]:
    rows = write_rows(folder / "valid.jsonl")
    return load_examples(rows, load_encoder(source.path, source.manifest.tokenizer), 64, truncate=False).examples


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def mean_loss(model: Any, examples: list[Any]) -> Any:
    import torch
    from torch.nn.functional import cross_entropy

    losses = []
    for example in examples:
        logits, labels = model(torch.tensor([example.input_ids])).logits[0, :-1], torch.tensor(example.labels[1:])
        losses.append(cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none"))
    return torch.cat(losses).mean()


def torch_loss(model: Any, examples: list[Any]) -> float:
    import torch

    with torch.no_grad():
        return float(mean_loss(model, examples))


@pytest.mark.parametrize(("variant", "base"), [("longrope", "int4"), ("partial", "fp32")])
def test_losses_are_pytorchs(adapter: Callable[[Bundle], Path], tmp_path: Path, variant: str, base: Base) -> None:
    source = bundle(variant, base)
    rows, examples = write_rows(tmp_path / "valid.jsonl"), encoded(source, tmp_path)
    assert len(examples) == 3
    merged = export(source, adapter(source), tmp_path / "merged", MERGED, valid=rows)
    kept = export(source, adapter(source), tmp_path / "kept", KEPT, valid=rows)
    plain = torch_loss(torch_model(variant, source.path), examples)
    adapted = torch_loss(peft_model(source, adapter(source)), examples)
    assert plain != pytest.approx(adapted, rel=1e-3)
    exact = {name: merged.losses[name] for name in ("base", "base + adapter", "merged fp32")}
    assert exact == pytest.approx({"base": plain, "base + adapter": adapted, "merged fp32": adapted}, rel=1e-5)
    assert merged.losses.keys() == exact.keys() | {"merged int8", "merged int4"}
    assert kept.losses == pytest.approx({"base": plain, "base + adapter": adapted}, rel=1e-5)


def test_validation_rows_of_the_run_are_measured_while_they_are_unchanged(tmp_path: Path) -> None:
    source = bundle("multi-head", "fp32")
    rows = write_rows(tmp_path / "valid.jsonl")
    provenance = {"validation_data": "valid.jsonl", "validation_data_sha256": sha256_of(rows)}
    adapter = save_adapter(tmp_path / "adapter", source, provenance)
    said: list[str] = []

    def losses(name: str) -> dict[str, float]:
        return export(source, adapter, tmp_path / name, KEPT, say=said.append).losses

    assert losses("first").keys() == {"base", "base + adapter"}
    rows.write_text(rows.read_text() + '{"prompt": "one", "completion": " more"}\n')
    assert losses("second") == {}
    assert any("valid.jsonl are neither beside the adapter nor here, unchanged" in line for line in said)
    rows.unlink()
    assert losses("third") == {}


@pytest.mark.parametrize(
    ("adapter", "here"),
    [
        ("project/adapters/a1", "project"),
        ("project/adapters/a1", "."),
        ("renamed/adapters/a1", "renamed"),
        ("renamed/adapters/a1", "."),
        ("a1", "project"),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_rows_of_the_run_are_found_from_the_adapter_and_from_where_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, here: str, absolute: bool
) -> None:
    """The run: in `project`, --valid data/valid.jsonl --output adapters/a1. Then a folder moves, or the person does."""
    project, given, output = tmp_path / "project", Path("data/valid.jsonl"), Path("adapters/a1")
    for folder in (project / "data", project / "adapters"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(project)
    rows = write_rows(given)
    provenance = validation_rows(rows.absolute() if absolute else rows, sha256_of(rows), output)
    save_adapter(output, bundle("multi-head", "fp32"), provenance)
    assert str(tmp_path) not in json.dumps(provenance)
    if adapter.startswith("renamed"):
        project.rename(tmp_path / "renamed")
    elif adapter == "a1":
        output.rename(tmp_path / "a1")
    monkeypatch.chdir(tmp_path / here)
    found = validation_rows_of(Path(os.path.relpath(tmp_path / adapter)), lambda line: pytest.fail(line))
    assert found is not None and sha256_of(found) == provenance["validation_data_sha256"]


def test_a_link_to_rows_elsewhere_is_found_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "project" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    link = Path("data/held-out.jsonl")
    link.symlink_to(write_rows(tmp_path / "elsewhere" / "private.jsonl"))
    provenance = validation_rows(link, sha256_of(link), Path("a1"))
    save_adapter(Path("a1"), bundle("multi-head", "fp32"), provenance)
    assert "elsewhere" not in json.dumps(provenance)
    found = validation_rows_of(Path("a1"), lambda line: pytest.fail(line))
    assert found is not None and found.samefile(link)


@pytest.mark.parametrize("told", ["{}", "../adapter/../valid.jsonl"])
def test_an_adapter_names_no_rows_elsewhere(tmp_path: Path, told: str) -> None:
    source = bundle("multi-head", "fp32")
    (tmp_path / "elsewhere").mkdir()
    rows = write_rows(tmp_path / "elsewhere" / "valid.jsonl")
    told = told.format(rows)
    provenance = {
        "validation_data": told,
        "validation_data_given": told,
        "validation_data_sha256": sha256_of(rows),
    }
    (tmp_path / "elsewhere" / "deeper").mkdir()
    adapter = save_adapter(tmp_path / "elsewhere" / "deeper" / "adapter", source, provenance)
    assert export(source, adapter, tmp_path / "kept", KEPT).losses == {}


def test_folder_is_complete_listed_and_names_no_other_folder(exported: Exporter, tmp_path: Path) -> None:
    for config in (MERGED, KEPT):
        folder = exported("longrope", "int4", config)
        manifest = open_model(folder).manifest
        assert isinstance(manifest, ModelManifest)
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert {file.path for file in manifest.files} | {"edgetune.json"} == found
        assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "config.json"} < found
        assert (manifest.adapter, manifest.weights) == ((None, "fp32") if config.merge else (ADAPTER, "int4"))
        for name in found:
            assert str(folder.parent).encode() not in (folder / name).read_bytes(), name
    assert (exported("longrope", "int4", KEPT) / "model.onnx.data").read_bytes() == (
        bundle("longrope", "int4").path / "model.onnx.data"
    ).read_bytes()


def test_report_counts_the_bytes(adapter: Callable[[Bundle], Path], tmp_path: Path) -> None:
    source = bundle("multi-head", "int4")
    report: ExportReport = export(source, adapter(source), tmp_path / "model", KEPT)
    sizes = [path.stat().st_size for path in report.path.rglob("*") if path.is_file() and path.name != "edgetune.json"]
    assert (report.path, report.kind, report.bytes) == (tmp_path / "model", "base + adapter", sum(sizes))


def test_existing_folder_is_kept_unless_forced(adapter: Callable[[Bundle], Path], tmp_path: Path) -> None:
    source, output = bundle("multi-head", "int4"), tmp_path / "model"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="--force"):
        export(source, adapter(source), output, KEPT)
    assert (output / "mine.txt").exists()
    forced = ExportConfig(merge=False, force=True)
    with pytest.raises(UsageError, match="holds something else"):
        export(source, adapter(source), output, forced)
    assert (output / "mine.txt").exists()
    (output / "mine.txt").unlink()
    export(source, adapter(source), output, forced)
    (output / "old.txt").write_text("of the model that is replaced")
    export(source, adapter(source), output, forced)
    assert not (output / "old.txt").exists() and open_model(output)


def test_bad_input_leaves_nothing(adapter: Callable[[Bundle], Path], tmp_path: Path) -> None:
    source = bundle("multi-head", "int4")
    bad_rows = tmp_path / "bad.jsonl"
    bad_rows.write_text("{\n")
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UsageError):
        export(source, tmp_path / "nothing", folder / "model", MERGED)
    with pytest.raises(IncompatibleError, match="grouped-query"):
        export(source, adapter(bundle("grouped-query", "int4")), folder / "model", MERGED)
    with pytest.raises(DataError):
        export(source, adapter(source), folder / "model", MERGED, valid=bad_rows)
    assert list(folder.iterdir()) == []


def test_bundle_that_changes_meanwhile_is_noticed(adapter: Callable[[Bundle], Path], tmp_path: Path) -> None:
    from edgetune.formats.bundle import load_bundle

    original = bundle("multi-head", "int4")
    source = load_bundle(copy_of_bundle(original.path, tmp_path / "bundle"))
    data = bytearray((source.path / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (source.path / "model.onnx.data").write_bytes(data)
    with pytest.raises(VerificationError, match=r"model\.onnx\.data was changed"):
        export(source, adapter(original), tmp_path / "model", KEPT)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("moment", ["model.onnx.data", "adapter.onnx_adapter", "edgetune.json"])
def test_killed_export_leaves_nothing_that_looks_finished(
    adapter: Callable[[Bundle], Path], tmp_path: Path, moment: str
) -> None:
    source = bundle("multi-head", "int4")
    script = f"""
        import os, signal
        from pathlib import Path
        import edgetune.exporting as exporting
        from edgetune.formats.bundle import load_bundle
        from edgetune.config import ExportConfig

        def killing(name):
            original = getattr(exporting, name)
            def call(*arguments):
                result = original(*arguments)
                if any({moment!r} in str(getattr(argument, "path", argument)) for argument in arguments):
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            setattr(exporting, name, call)

        for name in ("_copy", "write_onnx_adapter", "write_file"):
            killing(name)
        bundle = load_bundle(Path({str(source.path)!r}))
        exporting.export(bundle, Path({str(adapter(source))!r}), Path({str(tmp_path / "model")!r}),
                         ExportConfig(merge=False))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "model").exists()
    with pytest.raises(EdgetuneError):
        open_model(next(tmp_path.glob(".model.partial-*"))) if moment != "edgetune.json" else open_model(
            tmp_path / "model"
        )
    export(source, adapter(source), tmp_path / "model", KEPT)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
