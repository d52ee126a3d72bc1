"""Exported folders against PyTorch and PEFT, tensor by tensor and token by token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from bundle_copy import copy_of_bundle
from numpy.typing import NDArray
from tiny_phi3 import VARIANTS, bundle, greedy, parameters, save_adapter, silent, torch_model, weights

from edgetune.bundle import Bundle
from edgetune.config import Base, ExportConfig
from edgetune.data.encode import load_encoder, load_examples
from edgetune.errors import DataError, EdgetuneError, IncompatibleError, UsageError, VerificationError
from edgetune.export import ADAPTER, ExportReport, export
from edgetune.genai import open_model
from edgetune.generate import generate_ids
from edgetune.manifest import ModelManifest
from edgetune.pulse import Pulse

PROMPT = [int(token) for token in np.random.default_rng(5).integers(10, 440, 10)]
MERGED = ExportConfig(merge=True)
MERGED_INT4 = ExportConfig(merge=True, precision="int4")
KEPT = ExportConfig(merge=False)
ROWS = [
    {"prompt": "what is it?", "completion": " the lamp in the kitchen"},
    {"prompt": "turn it off", "completion": " now"},
    {"prompt": "hello", "completion": " world, what is it? tell me the answer"},
]
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
        export(source, adapter(source), output, config, silent)
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
    from edgetune.export.measure import Measured

    examples = encoded(bundle("multi-head", "int4"), tmp_path)
    model, pulse = Measured(folder, bundle("multi-head", "int4").manifest.architecture.rope), Pulse(silent, "{}")
    values = {name: value.numpy() * (2 if "lora_B" in name else 1) for name, value in stored.items()}
    twice = model.answer_loss(examples, pulse, values=values)
    assert model.answer_loss(examples, pulse, adapter=tmp_path / "wider.onnx_adapter") == pytest.approx(twice, rel=1e-5)
    assert model.answer_loss(examples, pulse) != pytest.approx(twice, rel=1e-3)


@pytest.mark.parametrize(("variant", "base"), [("partial", "int4"), ("longrope", "fp32")])
def test_merge_to_int4_is_the_rounded_merge(exported: Exporter, variant: str, base: Base) -> None:
    folder = exported(variant, base, MERGED_INT4)
    exact, rounded = weights(exported(variant, base, MERGED)), weights(folder)
    assert exact.keys() == rounded.keys()
    for name, value in exact.items():
        blocks = value.reshape(value.shape[0], -1, 32)
        step = np.abs(blocks).max(axis=-1, keepdims=True) / 8
        assert (np.abs(blocks - rounded[name].reshape(blocks.shape)) <= 1.001 * step).all(), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in exported(variant, base, MERGED).iterdir()}
    assert (folder / "model.onnx.data").stat().st_size < (
        bundle(variant, "int4").path / "model.onnx.data"
    ).stat().st_size + 64
    expected = greedy(torch_model(variant, folder), PROMPT, 24)
    assert generate_ids(folder, PROMPT, 24) == expected


def test_weights_are_merged_piece_by_piece(
    exported: Exporter, adapter: Callable[[Bundle], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgetune.export.merge as merging

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
        export(source, adapter(source), tmp_path / base, MERGED, silent)
        whole = (exported("grouped-query", base, MERGED) / "model.onnx.data").read_bytes()
        assert (tmp_path / base / "model.onnx.data").read_bytes() == whole
    assert max(pieces) == 64


def encoded(source: Bundle, folder: Path) -> list[Any]:
    rows = write_rows(folder / "valid.jsonl")
    return load_examples(rows, load_encoder(source.path, source.manifest.tokenizer), 64, truncate=False).examples


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def torch_loss(model: Any, examples: list[Any]) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total += float(cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize(("variant", "base"), [("longrope", "int4"), ("partial", "fp32")])
def test_losses_are_pytorchs(adapter: Callable[[Bundle], Path], tmp_path: Path, variant: str, base: Base) -> None:
    source = bundle(variant, base)
    rows, examples = write_rows(tmp_path / "valid.jsonl"), encoded(source, tmp_path)
    assert len(examples) == 3
    merged = export(source, adapter(source), tmp_path / "merged", MERGED, silent, valid=rows)
    kept = export(source, adapter(source), tmp_path / "kept", KEPT, silent, valid=rows)
    plain = torch_loss(torch_model(variant, source.path), examples)
    adapted = torch_loss(peft_model(source, adapter(source)), examples)
    assert plain != pytest.approx(adapted, rel=1e-3)
    assert merged.losses == pytest.approx({"base": plain, "base + adapter": adapted, "merged": adapted}, rel=1e-5)
    assert kept.losses == pytest.approx({"base": plain, "base + adapter": adapted}, rel=1e-5)


def test_validation_rows_of_the_run_are_measured_while_they_are_unchanged(tmp_path: Path) -> None:
    from edgetune.storage import sha256_of

    source = bundle("multi-head", "fp32")
    rows = write_rows(tmp_path / "valid.jsonl")
    provenance = {"validation_data": "valid.jsonl", "validation_data_sha256": sha256_of(rows)}
    adapter = save_adapter(tmp_path / "adapter", source, provenance)
    said: list[str] = []

    def losses(name: str) -> dict[str, float]:
        return export(source, adapter, tmp_path / name, KEPT, said.append).losses

    assert losses("first").keys() == {"base", "base + adapter"}
    rows.write_text(rows.read_text() + '{"prompt": "one", "completion": " more"}\n')
    assert losses("second") == {}
    assert any("valid.jsonl are neither beside the adapter nor here, unchanged" in line for line in said)
    rows.unlink()
    assert losses("third") == {}


@pytest.mark.parametrize("told", ["{}", "../adapter/../valid.jsonl"])
def test_an_adapter_names_no_rows_elsewhere(tmp_path: Path, told: str) -> None:
    from edgetune.storage import sha256_of

    source = bundle("multi-head", "fp32")
    (tmp_path / "elsewhere").mkdir()
    rows = write_rows(tmp_path / "elsewhere" / "valid.jsonl")
    provenance = {"validation_data": told.format(rows), "validation_data_sha256": sha256_of(rows)}
    (tmp_path / "elsewhere" / "deeper").mkdir()
    adapter = save_adapter(tmp_path / "elsewhere" / "deeper" / "adapter", source, provenance)
    assert export(source, adapter, tmp_path / "kept", KEPT, silent).losses == {}


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
    report: ExportReport = export(source, adapter(source), tmp_path / "model", KEPT, silent)
    sizes = [path.stat().st_size for path in report.path.rglob("*") if path.is_file() and path.name != "edgetune.json"]
    assert (report.path, report.kind, report.bytes) == (tmp_path / "model", "base + adapter", sum(sizes))


def test_existing_folder_is_kept_unless_forced(adapter: Callable[[Bundle], Path], tmp_path: Path) -> None:
    source, output = bundle("multi-head", "int4"), tmp_path / "model"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="--force"):
        export(source, adapter(source), output, KEPT, silent)
    assert (output / "mine.txt").exists()
    forced = ExportConfig(merge=False, force=True)
    with pytest.raises(UsageError, match="holds something else"):
        export(source, adapter(source), output, forced, silent)
    assert (output / "mine.txt").exists()
    (output / "mine.txt").unlink()
    export(source, adapter(source), output, forced, silent)
    (output / "old.txt").write_text("of the model that is replaced")
    export(source, adapter(source), output, forced, silent)
    assert not (output / "old.txt").exists() and open_model(output)


def test_bad_input_leaves_nothing(adapter: Callable[[Bundle], Path], tmp_path: Path) -> None:
    source = bundle("multi-head", "int4")
    bad_rows = tmp_path / "bad.jsonl"
    bad_rows.write_text("{\n")
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UsageError):
        export(source, tmp_path / "nothing", folder / "model", MERGED, silent)
    with pytest.raises(IncompatibleError, match="grouped-query"):
        export(source, adapter(bundle("grouped-query", "int4")), folder / "model", MERGED, silent)
    with pytest.raises(DataError):
        export(source, adapter(source), folder / "model", MERGED, silent, valid=bad_rows)
    assert list(folder.iterdir()) == []


def test_bundle_that_changes_meanwhile_is_noticed(adapter: Callable[[Bundle], Path], tmp_path: Path) -> None:
    from edgetune.bundle import open_bundle

    original = bundle("multi-head", "int4")
    source = open_bundle(copy_of_bundle(original.path, tmp_path / "bundle"))
    data = bytearray((source.path / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (source.path / "model.onnx.data").write_bytes(data)
    with pytest.raises(VerificationError, match=r"model\.onnx\.data was changed"):
        export(source, adapter(original), tmp_path / "model", KEPT, silent)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("moment", ["model.onnx.data", "adapter.onnx_adapter", "edgetune.json"])
def test_killed_export_leaves_nothing_that_looks_finished(
    adapter: Callable[[Bundle], Path], tmp_path: Path, moment: str
) -> None:
    source = bundle("multi-head", "int4")
    script = f"""
        import os, signal
        from pathlib import Path
        import edgetune.export as exporting
        from edgetune.bundle import open_bundle
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
        bundle = open_bundle(Path({str(source.path)!r}))
        exporting.export(bundle, Path({str(adapter(source))!r}), Path({str(tmp_path / "model")!r}),
                         ExportConfig(merge=False), print)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "model").exists()
    with pytest.raises(EdgetuneError):
        open_model(next(tmp_path.glob(".model.partial-*"))) if moment != "edgetune.json" else open_model(
            tmp_path / "model"
        )
    export(source, adapter(source), tmp_path / "model", KEPT, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
