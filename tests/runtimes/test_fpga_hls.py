"""The FPGA emulation: fixed point, cores bit for bit, and training over them."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgetune.cli import main
from edgetune.config import Base, RuntimeName
from edgetune.errors import IncompatibleError, MissingDependencyError, UsageError
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.trunk import TrunkInfo, read_trunk_info
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.fpga_hls import core as core_module
from edgetune.runtimes.fpga_hls import runtime as fpga_hls
from edgetune.runtimes.fpga_hls.core import Core, simulate
from edgetune.runtimes.fpga_hls.cores import trunk_cores
from edgetune.runtimes.fpga_hls.decoder import DecoderLayers, Product
from edgetune.runtimes.fpga_hls.fixed_point import FixedPoint, accumulator, holding
from edgetune.runtimes.fpga_hls.project import write_hls_project
from edgetune.runtimes.fpga_hls.resources import KV260, CoreSize, estimate, shared
from edgetune.runtimes.layered.lower_layers import Trunk
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend
from edgetune.runtimes.layered.session import LayeredSession
from edgetune.training import train
from support.massive_activations import prepare_massive
from support.oracle import cosine, relative
from support.prepared_bundles import Prepared, each_bundle
from support.random_rows import lengths_of, rows_of
from support.split_runs import WHOLE, FloatLayers, encoded_rows, options_of, split_in_the_middle, write_split_rows
from support.tiny_step import OPTIMIZER, adapter_of, batch_of

installed = pytest.mark.skipif(
    find_spec("hls4ml") is None, reason='hls4ml is not installed (pip install "edgetune[fpga]")'
)
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed (apt install g++)")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def halves(prepared: Prepared, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return split_in_the_middle(prepared("multi-head", "int4"), data, tmp_path_factory.mktemp("split") / "bundle")


@pytest.fixture(scope="module")
def massive(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return prepare_massive(tmp_path_factory.mktemp("massive"), 24_890)


@pytest.mark.parametrize(
    ("largest", "integer", "top"),
    [(0.9, 1, 1 - 2**-15), (1.0, 1, 1 - 2**-15), (1.1, 2, 2 - 2**-14), (7.9, 4, 8 - 2**-12), (0.2, -1, 0.25 - 2**-17)],
)
def test_types_reach_as_far_as_needed_and_no_farther(largest: float, integer: int, top: float) -> None:
    kind = holding(largest, headroom=1.0)
    assert (kind.width, kind.integer) == (16, integer)
    values = np.array([1e9, -1e9, top])
    np.testing.assert_array_equal(kind.rounded(values), [top, -(2.0 ** (integer - 1)), top])
    step = 2.0**-kind.fraction
    np.testing.assert_array_equal(kind.rounded(np.array([0.5, 1.5, -0.5, 2.6]) * step), np.array([0, 2, 0, 3]) * step)
    assert str(kind) == f"ap_fixed<16,{integer},AP_RND_CONV,AP_SAT>"


def test_sums_are_exact() -> None:
    weight, activation = FixedPoint(16, 1), FixedPoint(16, 4)
    total = accumulator(weight, activation, 96)
    worst = 96 * 2.0 ** (weight.integer - 1) * 2.0 ** (activation.integer - 1)
    assert worst <= 2.0 ** (total.integer - 1)
    assert total.fraction == weight.fraction + activation.fraction


def test_resources_are_counted() -> None:
    core = CoreSize("x", 128, 384, reuse=256)
    assert core.dsp == 192
    assert core.columns == 43, "192 weights of 16 bits are 3,072 bits wide, 43 times 72"
    assert core.column_blocks == core.column_ultras == 1, "256 deep is less than 512"
    deep = CoreSize("x", 64, 64, reuse=4096)
    assert (deep.columns, deep.column_blocks, deep.column_ultras) == (1, 8, 1), "a word of 16 bits, 4,096 deep"
    cores = shared([("a", 128, 384), ("b", 128, 128), ("c", 128, 384), ("d", 192, 128)], KV260)
    assert cores is not None
    total = estimate(cores, KV260)
    assert total.multiplications == 128 * 384 * 2 + 128 * 128 + 192 * 128
    assert total.dsp <= 0.8 * KV260.dsp
    assert (total.block_ram, total.ultra_ram) == (sum(core.columns for core in cores), 0), "all fit into block RAM"
    assert total.cycles == sum(core.reuse for core in cores)
    assert KV260.weights() == (144 * 36 + 64 * 288) * 64


def test_columns_are_divided_between_block_rams_and_ultrarams() -> None:
    """173 columns more than 512 deep: 64 of them in UltraRAM, two block RAMs for each of the others."""
    cores = [CoreSize("x", 1024, 778, reuse=1024)]
    assert cores[0].columns == 173
    total = estimate(cores, KV260)
    assert (total.block_ram, total.ultra_ram) == (2 * (173 - 64), 64)
    assert not total.fits(KV260), "218 of 144 block RAMs"
    assert "218 of 144 block RAMs and 64 of 64 UltraRAMs" in total.of(KV260)
    mixed = [CoreSize("shallow", 64, 144 * 9, reuse=64), CoreSize("deep", 64, 64, reuse=4096)]
    total = estimate(mixed, KV260)
    assert mixed[0].columns == 288
    assert (total.block_ram, total.ultra_ram) == (288 - 63, 64), "the deep column first"


def test_cores_are_slower_where_only_deeper_memories_fit() -> None:
    """A layer of the demo: at the DSPs' pace its weights need 218 block RAMs beside all UltraRAMs."""
    sizes = [("qkv", 256, 768), ("o", 256, 256), ("gate_up", 256, 1280), ("down", 640, 256)]
    cores = shared(sizes, KV260)
    assert cores is not None
    ultra, block = 0, 0
    columns = [(math.ceil(core.dsp * 16 / 72), core.reuse) for core in cores]
    for depth in sorted((depth for count, depth in columns for _ in range(count)), reverse=True):
        if ultra < 64:
            ultra += math.ceil(depth / 4096)
        else:
            block += math.ceil(depth / 512)
    assert block <= 144
    assert all(core.multiplications % core.reuse == 0 and core.reuse % core.inputs == 0 for core in cores)
    assert all(core.dsp * core.reuse == core.multiplications for core in cores)
    assert estimate(cores, KV260).fits(KV260)
    assert shared([(f"{layer}.{name}", *size) for layer in "01" for name, *size in sizes], KV260) is None


def exact_products(bundle: Bundle) -> dict[str, Product]:
    """Of the first layer, in float32."""
    names = [slot.name for slot in bundle.manifest.lora.slots if slot.layer == 0]
    info = TrunkInfo(1, 128, dict.fromkeys(names, 1.0), [0.0])
    return {core.size.name: partial(multiply, core.weight) for core in trunk_cores(bundle, info, KV260)}


def multiply(weight: np.ndarray, states: np.ndarray) -> np.ndarray:
    product: np.ndarray = states @ weight.T
    return product


@pytest.mark.own
@each_bundle
def test_decoder_layers_in_numpy_are_the_graphs(prepared: Prepared, variant: str, base: Base) -> None:
    bundle = prepared(variant, base)
    products = exact_products(bundle)
    frozen, batch = (
        FrozenWeights(bundle.path, bundle.manifest.architecture),
        batch_of(bundle, rows_of(1, lengths_of(variant, 1))),
    )
    found = Trunk(frozen, DecoderLayers(bundle, 1, products)).hidden(batch)
    expected = Trunk(frozen, FloatLayers(bundle, 1)).hidden(batch)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_massive_activation_takes_no_bits_from_the_others(massive: Bundle, data: Path, tmp_path: Path) -> None:
    """The first token's states are thousands of times those of the others; bits as the simulation has them."""
    halves = split_in_the_middle(massive, data, tmp_path / "split")
    info = read_trunk_info(halves)
    products = {core.size.name: expected_of(core) for core in trunk_cores(halves, info, KV260)}
    layers = DecoderLayers(halves, info.layers, products)
    frozen = FrozenWeights(halves.path, halves.manifest.architecture)
    batch = batch_of(halves, encoded_rows(halves, data))
    found = Trunk(frozen, layers).hidden(batch)
    exact = Trunk(frozen, FloatLayers(massive, info.layers)).hidden(batch)
    assert np.abs(exact[:, 0]).max() > 1000 * np.abs(exact[:, 1:]).max(), "nothing is massive"
    for row in range(len(found)):
        for position in np.flatnonzero(batch.rows[row] == row):
            assert relative(found[row, position], exact[row, position]) < 0.15
    adapter, plan, backend = adapter_of(halves), LayeredPlan(kept_layers=4), OrtBackend(halves, "fp32")
    emulated, cpu = (
        LayeredSession(halves, adapter, OPTIMIZER, plan, backend, lowest=lowest)
        for lowest in (layers.with_adapters, None)
    )
    assert emulated.evaluate(batch) == pytest.approx(cpu.evaluate(batch), rel=1e-2)
    for session in (emulated, cpu):
        session.step([batch], 1e-3)
    gradients = cpu.gradients()
    assert min(cosine(gradient, gradients[name]) for name, gradient in emulated.gradients().items()) >= 0.99


def expected_of(core: Core) -> Product:
    return lambda states: core.expected(states).astype(np.float32)


@installed
@compiles
def test_a_simulation_computes_the_cores_bits(tmp_path: Path) -> None:
    """Against numpy, with values that round, that lie on ties and that saturate, and vectors of every size."""
    generator = np.random.default_rng(0)
    weight = generator.uniform(-0.7, 0.7, (24, 32)).astype(np.float32)
    size = CoreSize("model.layers.0.mlp.down_proj", 32, 24, reuse=1)
    core = Core(size, weight, holding(0.7, 1.0), FixedPoint(16, 4))
    vectors = generator.standard_normal((12, 32)).astype(np.float32)
    vectors[0] = np.where(weight[0] > 0, -100, 100)
    vectors[1] = np.float32(1.5 * 2.0**-15)
    vectors[1, 0] = 0.75
    vectors[2] = 0
    vectors[3] *= 30_000
    vectors[4] /= 30_000
    (simulation,) = simulate([core], tmp_path, KV260)
    found = simulation.run(vectors)
    expected = core.expected(vectors)
    assert expected[0].min() == -8 * 2**7, "nothing saturates"
    np.testing.assert_array_equal(found, expected)
    for row, exact in zip(found[2:], vectors[2:] @ weight.T, strict=True):
        assert np.abs(row - exact).max() <= 1e-3 * np.abs(exact).max()
    config = (tmp_path / core.size.name / "firmware" / "parameters.h").read_text()
    assert f"reuse_factor = {size.reuse};" in config, "hls4ml took another one"


@pytest.mark.own
@installed
@compiles
@pytest.mark.parametrize("trunk", [False, True], ids=["all layers", "above the trunk"])
def test_fifty_steps_on_the_emulation_end_where_the_cpus_do(
    halves: Bundle, data: Path, tmp_path: Path, trunk: bool
) -> None:
    """The goal: within 5 % of the final loss, with adapters in all layers, and in those above the trunk alone."""
    runtimes: tuple[RuntimeName, ...] = ("fpga-hls", "onnxruntime")
    results = {}
    for runtime in runtimes:
        config = replace(options_of(steps=50, raw_prompts=True), learning_rate=5e-3, runtime=runtime, trunk=trunk)
        results[runtime] = train(halves.path, data, tmp_path / runtime, config)
    emulated, cpu = results["fpga-hls"], results["onnxruntime"]
    assert emulated.plan == cpu.plan
    assert cpu.final_loss < 1.0, "nothing was learnt"
    assert emulated.final_loss == pytest.approx(cpu.final_loss, rel=0.05)
    assert emulated.final_loss != cpu.final_loss
    provenance = json.loads((tmp_path / "fpga-hls" / "edgetune.json").read_text())["provenance"]
    assert re.match(r"FPGA emulation \(hls4ml 1\.3[.\w]* C simulation\), ", provenance["runtime_version"])
    (placement,) = emulated.placement
    assert (placement["graph"], placement["provider"], placement["accelerated_nodes"]) == ("trunk", "fpga-hls", 4)
    assert placement["device"].startswith("FPGA emulation (hls4ml C simulation); estimate for a Kria KV260")
    assert placement["device"] in provenance["placement"]


@installed
@compiles
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's high-water mark")
def test_the_peak_is_as_predicted(halves: Bundle, data: Path, tmp_path: Path) -> None:
    """The goal: within 15 %; hls4ml and the compiled cores take a fifth of it."""
    options = ["--runtime", "fpga-hls", "--plan", "stream", "--batch-size", "2", "--steps", "1", "--json", "--quiet"]
    command = [sys.executable, "-m", "edgetune", "train", halves.path, "--data", data, "--output", tmp_path / "adapter"]
    result = json.loads(subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout)
    assert result["predicted_peak_memory_bytes"] == pytest.approx(result["peak_memory_bytes"], rel=0.15)


@pytest.mark.own
@pytest.mark.parametrize("variant", ["grouped-query", "partial"])
def test_with_exact_products_adapters_and_gradients_are_the_cpus(prepared: Prepared, variant: str) -> None:
    bundle = prepared(variant, "int4")
    adapter = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(2, lengths_of(variant, 2)))
    layers = DecoderLayers(bundle, 1, exact_products(bundle))
    backend = OrtBackend(bundle, "fp32")
    found, expected = (
        LayeredSession(bundle, adapter, OPTIMIZER, WHOLE, backend, lowest=lowest)
        for lowest in (layers.with_adapters, None)
    )
    assert found.evaluate(batch) == pytest.approx(expected.evaluate(batch), rel=1e-5)
    found.step([batch], 1e-3)
    expected.step([batch], 1e-3)
    gradients = expected.gradients()
    for name, gradient in found.gradients().items():
        assert relative(gradient, gradients[name]) <= 1e-4, name


def test_the_emulation_says_what_it_is_and_what_it_would_take() -> None:
    sizes = {"self_attn.qkv_proj": (128, 384), "self_attn.o_proj": (128, 128)}
    sizes |= {"mlp.gate_up_proj": (128, 384), "mlp.down_proj": (192, 128)}
    cores = shared([(f"model.layers.0.{name}", *size) for name, size in sizes.items()], KV260)
    assert cores is not None
    placement = fpga_hls.emulation(cores, KV260)
    assert placement.accelerated == placement.accelerator_partitions == 4
    assert [node.operator for node in placement.fallen_back] == ["RMSNorm", "Attention", "RMSNorm", "SwiGLU"]
    text = str(placement)
    assert "FPGA emulation (hls4ml C simulation)" in text and "not synthesised" in text
    assert "576 of 1,248 DSPs, 130 of 144 block RAMs and 0 of 64 UltraRAMs" in text
    assert "139,264 of at most 1,511,424 weights" in text


@installed
def test_the_project_says_what_it_is(halves: Bundle, tmp_path: Path) -> None:
    project = write_hls_project(halves, tmp_path / "fpga", lambda _: None)
    described = json.loads((tmp_path / "fpga" / "hls.json").read_text())
    assert described["fpga"]["part"].startswith("xck26")
    assert described["estimate"]["synthesised"] is False
    assert described["estimate"]["dsp"] == project.total.dsp <= KV260.dsp
    assert [core["name"].rpartition(".")[2] for core in described["cores"]] == [
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj",
    ]  # fmt: skip
    for core in described["cores"]:
        folder = tmp_path / "fpga" / core["folder"]
        assert (folder / "build_prj.tcl").is_file()
        assert "xck26-sfvc784-2LV-c" in (folder / "project.tcl").read_text()
        name = core["name"].replace(".", "_")
        assert f"void {name}(" in (folder / "firmware" / f"{name}.cpp").read_text()
    texts = [path.read_text(errors="replace") for path in (tmp_path / "fpga").rglob("*") if path.is_file()]
    assert not any(str(tmp_path) in text for text in texts), "a path of this machine"
    readme = (tmp_path / "fpga" / "README.md").read_text()
    assert "Nothing here was synthesised and no FPGA was used" in readme
    with pytest.raises(UsageError):
        write_hls_project(halves, tmp_path / "fpga", lambda _: None)
    result = CliRunner().invoke(
        main, ["ship", str(halves.path), "--target", "fpga", "--output", str(tmp_path / "fpga"), "--force", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["estimate"]["dsp"] == project.total.dsp


def test_a_model_that_is_too_large_is_refused(halves: Bundle) -> None:
    small = replace(KV260, block_ram=10, ultra_ram=1)
    with pytest.raises(
        IncompatibleError,
        match=r"1 layers of the trunk have 139,264 weights, .* Kria KV260: 10 .*; use a smaller model",
    ):
        trunk_cores(halves, read_trunk_info(halves), small)
    # There would be room for every bit, but not in columns of 72 bits.
    narrow = replace(KV260, block_ram=61, ultra_ram=0)
    assert narrow.weights() > 139264
    with pytest.raises(
        IncompatibleError, match="61 block RAMs and 0 UltraRAMs hold 140,544 of 16 bits if none is left"
    ):
        trunk_cores(halves, read_trunk_info(halves), narrow)


def test_a_refusal_says_how_many_layers_fit(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "int4")
    names = [slot.name for slot in bundle.manifest.lora.slots]
    info = TrunkInfo(2, 128, dict.fromkeys(names, 1.0), [0.0, 0.0])
    for_one_layer = replace(KV260, block_ram=100, ultra_ram=0)
    with pytest.raises(IncompatibleError, match=r"the 2 layers .* split the bundle with --layers 1"):
        trunk_cores(bundle, info, for_one_layer)
    assert len(trunk_cores(bundle, info, KV260)) == 8


def test_without_a_compiler_it_is_said_before_anything_is_loaded(
    halves: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_module, "COMPILER", "no-such-compiler")
    monkeypatch.setattr(fpga_hls, "require_hls4ml", lambda: None)
    with pytest.raises(MissingDependencyError, match="no-such-compiler is not installed"):
        train(halves.path, data, tmp_path / "o", replace(options_of(steps=1), runtime="fpga-hls"))
    assert not (tmp_path / "o").exists()


def test_a_bundle_without_a_trunk_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="edgetune split"):
        write_hls_project(prepared("multi-head", "int4"), tmp_path / "o", lambda _: None)
