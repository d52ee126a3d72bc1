"""What `edgetune ship` lays out computes what the bundle computes, and fits where it goes."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from edgetune import ship as stage
from edgetune.cli import main
from edgetune.config import Base, PlatformName, ShipConfig
from edgetune.errors import IncompatibleError, ResourceError, UsageError, VerificationError
from edgetune.formats.adapter import read_adapter
from edgetune.formats.bundle import Bundle, list_files, load_bundle, seal_bundle
from edgetune.formats.manifest import TensorSpec
from edgetune.ship import MANIFEST, ROLES, ShippedFolder, lay_out, packs
from edgetune.ship.budget import SizedFile, refuse_what_is_too_large
from edgetune.ship.external_data import Span, external_spans, redirect
from edgetune.ship.platforms import GB, PLATFORMS, STORE_SHARD, Limit, Platform
from edgetune.ship.shards import ALIGNMENT, moved, plan_shards
from support.bundle_copy import copy_of_bundle
from support.golden import GOLDEN
from support.prepared_bundles import Prepared

SMALL = 20_000
"""Bytes of a file of weights: the golden bundle's then make several, the largest tensor one of its own."""
Arrays = dict[str, np.ndarray[Any, Any]]


def small(name: PlatformName = "web") -> Platform:
    return replace(PLATFORMS[name], shard=SMALL)


def silent(text: str) -> None: ...


def made(bundle: Bundle, output: Path, name: PlatformName = "web", platform: Platform | None = None) -> ShippedFolder:
    return lay_out(bundle, name, output, platform=platform)


@pytest.fixture(scope="module")
def golden() -> Bundle:
    return load_bundle(GOLDEN / "bundle")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copy_of_bundle(GOLDEN / "bundle", tmp_path / "copy")


def some_inputs(specs: list[TensorSpec], vocabulary: int) -> Arrays:
    """Numbers of the right shapes; the tokens are real ones."""
    generator = np.random.default_rng(0)
    sizes: Mapping[int | str, int] = {"batch": 2, "sequence": 9}
    arrays: Arrays = {}
    for spec in specs:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.dtype == "int64":
            arrays[spec.name] = generator.integers(0, vocabulary, shape)
        else:
            arrays[spec.name] = np.abs(0.1 * generator.standard_normal(shape)).astype(np.float32)
    return arrays


def outputs(graph: Path, inputs: Arrays) -> Arrays:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # the same order of additions each time
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def assert_computes_the_same(bundle: Bundle, folder: Path) -> None:
    for role in ROLES:
        inputs = some_inputs(bundle.manifest.graph(role).inputs, bundle.manifest.architecture.vocab_size)
        expected, found = outputs(bundle.file(role), inputs), outputs(folder / "model" / f"{role}.onnx", inputs)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert np.isfinite(value).all()
            assert value.tobytes() == found[name].tobytes(), f"{role}: {name}"


@pytest.mark.own
def test_the_golden_folder_computes_what_the_bundle_does(golden: Bundle, tmp_path: Path) -> None:
    shipped = made(golden, tmp_path / "web", platform=small())
    assert len(shipped.manifest.weights) >= 4
    assert_computes_the_same(golden, tmp_path / "web")


@pytest.mark.own
@pytest.mark.parametrize(("variant", "base"), [("grouped-query", "int4"), ("multi-head", "fp32"), ("partial", "int4")])
def test_other_shipped_folders_compute_what_their_bundles_do(
    prepared: Prepared, tmp_path: Path, variant: str, base: Base
) -> None:
    bundle = prepared(variant, base)
    shipped = made(bundle, tmp_path / "web", platform=small())
    assert len(shipped.manifest.weights) >= 3
    assert_computes_the_same(bundle, tmp_path / "web")


def test_files_of_weights_keep_to_their_size(golden: Bundle, tmp_path: Path) -> None:
    shipped = made(golden, tmp_path / "web", platform=small())
    spans = dict(external_spans(golden.file("step").read_bytes()))
    largest = max(span.length for span in spans.values())
    found = [(tmp_path / "web" / name).stat().st_size for name in shipped.manifest.weights]
    assert largest > SMALL
    assert sorted(found)[-1] == largest
    assert all(size <= SMALL for size in found if size != largest)
    assert sum(found) < sum(span.length for span in set(spans.values())) + 64 * len(spans)


def test_a_shipped_folder_says_what_is_in_it(golden: Bundle, tmp_path: Path) -> None:
    shipped = made(golden, tmp_path / "web")
    folder, said = tmp_path / "web", json.loads((tmp_path / "web" / MANIFEST).read_text())
    assert (said["format"], said["format_version"], said["target"]) == ("edgetune-target", 1, "web")
    files = {file["path"]: file for file in said["files"]}
    assert files.keys() == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    for path, file in files.items():
        data = (folder / path).read_bytes()
        assert (file["size"], file["sha256"], file["pack"]) == (len(data), hashlib.sha256(data).hexdigest(), None)
    assert sum(said["sizes"].values()) == sum(file["size"] for file in said["files"])
    assert said["tokenizer"]["stop_token_ids"] == [402, 405]
    assert shipped.manifest.manifest_sha256 == said["manifest_sha256"] != ""


def test_every_tensor_is_described_as_the_graph_has_it(golden: Bundle, tmp_path: Path) -> None:
    manifest = made(golden, tmp_path / "web").manifest
    for graph in manifest.graphs:
        session = ort.InferenceSession(tmp_path / "web" / graph.file)
        for described, values in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
            assert [(t.name, t.shape) for t in described] == [(v.name, v.shape) for v in values]
            assert [f"tensor({t.dtype})" for t in described] == [v.type for v in values]
            for tensor in described:
                if tensor.kind.startswith("parameter"):
                    assert tensor.name == f"{tensor.parameter}{tensor.kind.removeprefix('parameter')}"
                    assert tensor.shape == list(manifest.lora.shapes()[str(tensor.parameter)])
                else:
                    assert (tensor.name, tensor.parameter) == (tensor.kind, None)
    kinds = {tensor.kind for graph in manifest.graphs for tensor in [*graph.inputs, *graph.outputs]}
    assert kinds == set(manifest.kinds)


def test_the_first_adapter_changes_nothing_and_another_can_be_given(golden: Bundle, tmp_path: Path) -> None:
    manifest = made(golden, tmp_path / "fresh").manifest
    shapes = manifest.lora.shapes()
    fresh = load_file(tmp_path / "fresh" / manifest.adapter.file)
    assert {manifest.adapter.prefix + name: shape for name, shape in shapes.items()} == {
        name: value.shape for name, value in fresh.items()
    }
    assert all(value.any() == (".lora_A." in name) for name, value in fresh.items())
    config = ShipConfig(adapter=GOLDEN / "initial_adapter")
    lay_out(golden, "ios", tmp_path / "given", config)
    bundle = golden.manifest
    given, wanted = (
        read_adapter(path, bundle.lora, bundle.base, bundle.tokenizer)
        for path in (tmp_path / "given" / "adapter", GOLDEN / "initial_adapter")
    )
    assert all(np.array_equal(given[name], wanted[name]) for name in shapes)


def test_an_adapter_of_another_bundle_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    config = ShipConfig(adapter=GOLDEN / "initial_adapter")
    with pytest.raises(IncompatibleError, match="initial_adapter"):
        lay_out(prepared("grouped-query", "int4"), "web", tmp_path / "web", config)
    assert list(tmp_path.iterdir()) == []


def test_a_small_android_app_is_one_pack(golden: Bundle, tmp_path: Path) -> None:
    shipped = made(golden, tmp_path / "android", "android", small("android"))
    assert {file.pack for file in shipped.manifest.files} == {"edgetune_model"}
    pack = tmp_path / "android" / "edgetune_model"
    assert 'deliveryType.set("install-time")' in (pack / "build.gradle.kts").read_text()
    assert (pack / "src/main/assets" / MANIFEST).read_bytes() == (tmp_path / "android" / MANIFEST).read_bytes()
    assert_computes_the_same(golden, pack / "src/main/assets")


def test_a_large_android_app_follows_in_packs(golden: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "SMALL_PACK", 100_000)
    platform = replace(PLATFORMS["android"], shard=80_000)
    manifest = made(golden, tmp_path / "android", "android", platform).manifest
    folder = tmp_path / "android"
    places = {file.path: str(file.pack) for file in manifest.files}
    assert {places[path] for path in manifest.weights} == {
        f"edgetune_weights_{n:02}" for n in range(len(manifest.weights))
    }
    assert len(manifest.weights) >= 2
    assert {pack for path, pack in places.items() if path not in manifest.weights} == {"edgetune_model"}
    for pack in {*places.values()}:
        delivery = "install-time" if pack == "edgetune_model" else "fast-follow"
        assert f'packName.set("{pack}")' in (folder / pack / "build.gradle.kts").read_text()
        assert f'deliveryType.set("{delivery}")' in (folder / pack / "build.gradle.kts").read_text()
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, *{*places.values()}])
    for file in manifest.files:
        path = folder / str(file.pack) / "src/main/assets" / file.path
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
        (tmp_path / "device" / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tmp_path / "device" / file.path)  # as an app does once
    assert_computes_the_same(golden, tmp_path / "device")
    install, follow = manifest.budgets
    assert follow.used == manifest.sizes["weights"]
    assert install.used == sum(manifest.sizes.values()) - follow.used


def test_a_board_gets_what_to_install(golden: Bundle, tmp_path: Path) -> None:
    made(golden, tmp_path / "board", "linux-arm64")
    lines = (tmp_path / "board" / "requirements.txt").read_text().splitlines()
    names = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    assert {"edgetune", "onnxruntime", "numpy", "tokenizers"} <= names
    assert "torch" not in names


def test_what_a_store_does_not_take_is_refused_with_all_sizes(golden: Bundle, tmp_path: Path) -> None:
    limits = (Limit("the whole app", 300_000, "a store"), Limit("its weights", 10**9, "nobody", None, ("weights",)))
    platform = Platform(SMALL, SMALL, "another store", limits)
    with pytest.raises(ResourceError) as refused:
        made(golden, tmp_path / "out", platform=platform)
    message = str(refused.value)
    for part in (
        "model.embed_tokens.weight",
        "131.1 kB",
        "20.0 kB are possible (another store)",
        "the whole app",
        "300.0 kB (a store)",
    ):
        assert part in message
    assert "nobody" not in message
    assert list(tmp_path.iterdir()) == []


def test_both_graphs_of_a_page_have_a_copy_of_the_weights() -> None:
    """A module has 65,536 pages of 64 KiB (WebAssembly's memory32), and two sessions lie in it."""
    module = 65536 * 65536
    for weights, fits in ((module // 2, True), (module // 2 + 1, False), (module - 1, False)):
        shards = [SizedFile("model/weights-00.bin", 10**9, "weights")]
        shards.append(SizedFile("model/weights-01.bin", weights - 10**9, "weights"))
        with nullcontext() if fits else pytest.raises(ResourceError, match=r"at most 2\.1 GB of weights would fit"):
            refuse_what_is_too_large("web", PLATFORMS["web"], shards, {Span("weights", 0, weights): "embedding"})


def test_int4_is_proposed_where_it_would_fit(prepared: Prepared, golden: Bundle, tmp_path: Path) -> None:
    bundle = prepared("multi-head", "fp32")
    weights = {span for _, span in external_spans(bundle.file("step").read_bytes())}
    limit = Limit("weights", sum(span.length for span in weights) - 1, "a store", None, ("weights",))
    platform = replace(PLATFORMS["web"], limits=(limit,))
    with pytest.raises(ResourceError, match="--base int4") as refused:
        made(bundle, tmp_path / "out", platform=platform)
    quantised = prepared("multi-head", "int4")
    int4 = sum({span: span.length for _, span in external_spans(quantised.file("step").read_bytes())}.values())
    assert f"{int4 / 1e3:.1f} kB" in str(refused.value)
    limits = (replace(limit, bytes=1000),)
    with pytest.raises(ResourceError, match=r"at most 1\.0 kB of weights would fit"):
        made(golden, tmp_path / "out", platform=replace(platform, limits=limits))


def test_a_failure_leaves_nothing_or_the_folder_that_was_there(
    golden: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(golden, tmp_path / "old")
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage, "write_shard", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        made(golden, tmp_path / "new")
    with pytest.raises(ResourceError, match="the disk is full"):
        lay_out(golden, "web", tmp_path / "old", ShipConfig(force=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(UsageError, match="already exists"):
        made(golden, tmp_path / "old")


@pytest.mark.parametrize(
    "place",
    [
        Span("../expected.json", 0, 16),
        Span("/etc/hostname", 0, 1),
        Span("model.onnx.data", 0, 1 << 40),
        Span("model.onnx.data", -64, 16),
        Span("model.onnx.data", 220_416, 1),
        Span("foreign.data", 0, 16),
    ],
)
def test_references_out_of_the_bundle_are_refused(copy: Path, tmp_path: Path, place: Span) -> None:
    graph = copy / "step.onnx"
    first = dict(external_spans(graph.read_bytes()))["model.embed_tokens.weight"]
    graph.write_bytes(redirect(graph.read_bytes(), lambda span: place if span == first else span))
    sealed = replace(load_bundle(GOLDEN / "bundle").manifest, files=list_files(copy, without="manifest.json"))
    seal_bundle(copy, sealed)
    with pytest.raises(VerificationError, match=r"model\.embed_tokens\.weight' lies in"):
        made(load_bundle(copy), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"\x3a\x05\x2a\x09abc", b"\x3a", b"\x3b\x00", b"\xff" * 12])
def test_what_is_no_graph_is_refused(copy: Path, tmp_path: Path, data: bytes) -> None:
    (copy / "step.onnx").write_bytes(data)
    sealed = replace(load_bundle(GOLDEN / "bundle").manifest, files=list_files(copy, without="manifest.json"))
    seal_bundle(copy, sealed)
    with pytest.raises(VerificationError, match=r"step\.onnx"):
        made(load_bundle(copy), tmp_path / "out")


def test_references_are_those_that_the_onnx_package_sees(golden: Bundle) -> None:
    data = golden.file("step").read_bytes()
    spans = dict(external_spans(data))
    tensors = {t.name: t for t in onnx.load_from_string(data).graph.initializer if t.external_data}
    assert spans.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert spans[name] == Span(entries["location"], int(entries["offset"]), int(entries["length"]))


def test_nothing_but_the_references_changes(golden: Bundle) -> None:
    data = golden.file("step").read_bytes()
    before = onnx.load_from_string(data)
    after = onnx.load_from_string(redirect(data, lambda span: Span("elsewhere", span.offset + 1, span.length)))
    for tensor in after.graph.initializer:
        entries = {entry.key: entry for entry in tensor.external_data}
        if entries:
            assert entries["location"].value == "elsewhere"
            entries["location"].value = "model.onnx.data"
            entries["offset"].value = str(int(entries["offset"].value) - 1)
    assert after == before


def test_shards_hold_every_byte_once() -> None:
    spans = [Span("a", 0, 100), Span("a", 50, 100), Span("a", 50, 20), Span("a", 150, 10), Span("b", 0, 300)]
    shards = plan_shards(spans, 256)
    assert [shard.size for shard in shards] == [202, 300]
    first, second, inner, last, alone = (moved(span, shards) for span in spans)
    assert (second.offset - first.offset, inner.offset - first.offset) == (50, 50)
    assert (last.offset % ALIGNMENT, last.offset) == (0, 192)
    assert (alone.file, alone.offset) == ("weights-01.bin", 0)


def test_phi_3_mini_in_int4_fits_the_stores() -> None:
    """Sizes of the real model: 32 layers of hidden size 3072, in the order in which the builder stores them."""
    hidden, inner, vocabulary = 3072, 8192, 32064
    linear = [3 * hidden * hidden, hidden * hidden, *[hidden * inner] * 3] * 32 + [vocabulary * hidden]
    lengths = [4 * vocabulary * hidden, *(length for n in linear for length in (n // 2, n // 8)), *[4 * hidden] * 65]
    spans, offset = [], 0
    for length in lengths:
        spans.append(Span("model.onnx.data", offset, length))
        offset += length
    shards = plan_shards(spans, STORE_SHARD)
    assert len(shards) == 2
    assert all(shard.size <= STORE_SHARD for shard in shards)
    assert 2.7 * GB < sum(shard.size for shard in shards) < 2.8 * GB


def test_the_command_prints_sizes_and_limits(tmp_path: Path) -> None:
    arguments = ["bundle", str(GOLDEN / "bundle"), "--target", "android", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    for word in ("weights", "204.0 kB", "install-time asset packs", "4.0 GB"):
        assert word in done.output
    assert CliRunner().invoke(main, arguments).exit_code == 2
    done = CliRunner().invoke(main, [*arguments, "--force", "--json", "--quiet"])
    said = json.loads(done.stdout)
    assert said["sizes"]["weights"] == 204_032
    assert {budget["what"]: budget["limit"] for budget in said["budgets"]}["fast-follow asset packs"] == 4 * GB


def test_the_command_refuses_with_the_exit_code_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLATFORMS, "ios", replace(PLATFORMS["ios"], largest_file=SMALL))  # type: ignore[arg-type]
    arguments = ["bundle", str(GOLDEN / "bundle"), "--output", str(tmp_path / "out"), "--target"]
    for platform, code in (("ios", 6), ("windows-phone", 2)):
        done = CliRunner().invoke(main, [*arguments, platform, "--json"])
        assert done.exit_code == code, done.output
    assert not (tmp_path / "out").exists()
    adapter = ["--adapter", str(tmp_path / "missing")]
    assert CliRunner().invoke(main, [*arguments, "ios", *adapter]).exit_code == 2
