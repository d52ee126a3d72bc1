"""The runtime `qnn`: Qualcomm's HTP compiler and emulator run the whole training step, against the CPU in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgetune.cli import main
from edgetune.config import TrainConfig
from edgetune.errors import EdgetuneError, IncompatibleError, MissingDependencyError, UsageError, VerificationError
from edgetune.formats.bundle import load_bundle
from edgetune.formats.roles import HALF_LOSS, HALF_STEP
from edgetune.runtimes import find_runtime, qnn
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.contract import Placed, Session
from edgetune.runtimes.execution import Accelerator, LayeredPlan, WholePlan
from edgetune.runtimes.placement import Node, Partition
from edgetune.runtimes.whole import plugin_runtime
from edgetune.runtimes.whole.contexts import Context
from edgetune.runtimes.whole.plugin import Plugin, PluginCompiler, _stdout_for_results
from edgetune.training import train
from support.assistant_bundle import ROWS, assistant_bundle
from support.bundle_copy import copy_of_bundle, opened_copy
from support.golden import EARLIER
from support.oracle import cosine
from support.prepared_bundles import Prepared
from support.random_rows import rows_of
from support.recorder import Recorder
from support.tiny_phi3 import VARIANTS
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of

installed = pytest.mark.skipif(
    find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed (x86-64 Linux has its emulator)"
)
NPU_ONLY = WholePlan(accelerator=Accelerator(require=True))
NPU_OR_CPU = WholePlan(accelerator=Accelerator())
LOSS, WORST_COSINE, NORM = 5e-3, 0.999, 0.01
STEPS, FOLLOWS = 100, 0.02


def placements(session: Session) -> dict[str, Any]:
    assert isinstance(session, Placed)
    return {placement.graph: placement for placement in session.placements()}


def plugin_of_qnn() -> Plugin:
    return qnn.PLUGIN.plugin(qnn.PLUGIN.imported_package(), "onnxruntime-qnn", Accelerator())


@pytest.mark.own
@installed
@pytest.mark.parametrize(("variant", "base"), [*((variant, "int4") for variant in VARIANTS), ("partial", "fp32")])
def test_the_whole_step_is_one_node_and_follows_the_cpu(prepared: Prepared, variant: str, base: Any) -> None:
    bundle = prepared(variant, base)
    parameters = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(1, [17, 23]))
    with stock.open_session(bundle, parameters, OPTIMIZER, WholePlan()) as exact:
        expected = exact.step([batch], LEARNING_RATE)
        gradients = exact.gradients()  # type: ignore[attr-defined]
    with qnn.RUNTIME.open_session(bundle, parameters, OPTIMIZER, NPU_ONLY) as session:
        result = session.step([batch], LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
        placement = placements(session)[HALF_STEP]
    assert (placement.accelerator_partitions, placement.fallen_back) == (1, [])
    assert placement.accelerated > 300
    assert "emulation" in placement.device
    assert result.loss == pytest.approx(expected.loss, abs=LOSS)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=NORM)
    for name, gradient in gradients.items():
        assert cosine(found[name], gradient) >= WORST_COSINE, name
        assert np.linalg.norm(found[name]) == pytest.approx(np.linalg.norm(gradient), rel=NORM), name


@pytest.mark.own
@installed
def test_an_earlier_bundle_has_one_form_of_the_step_for_all(tmp_path: Path) -> None:
    bundle = load_bundle(copy_of_bundle(EARLIER / "bundle", tmp_path / "bundle"))
    batch = batch_of(bundle, rows_of(0, [7]))
    with stock.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as exact:
        expected = exact.step([batch], LEARNING_RATE)
    with qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, NPU_ONLY) as session:
        assert session.step([batch], LEARNING_RATE).loss == pytest.approx(expected.loss, rel=LOSS)
        assert list(placements(session)) == ["step"]


@pytest.mark.own
@installed
def test_longrope_beyond_its_original_positions(prepared: Prepared) -> None:
    bundle = prepared("longrope", "int4")
    parameters = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(1, [70]))
    with (
        stock.open_session(bundle, parameters, OPTIMIZER, WholePlan()) as exact,
        qnn.RUNTIME.open_session(bundle, parameters, OPTIMIZER, NPU_ONLY) as session,
    ):
        assert session.evaluate(batch) == pytest.approx(exact.evaluate(batch), abs=LOSS)
        assert placements(session)[HALF_LOSS].fallen_back == []


@pytest.mark.own
@installed
def test_passes_are_averaged_by_token(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "int4")
    parameters = adapter_of(bundle)
    batches = [batch_of(bundle, rows_of(seed, [length])) for seed, length in ((1, 8), (2, 15))]
    with stock.open_session(bundle, parameters, OPTIMIZER, WholePlan()) as exact:
        expected = exact.step(batches, LEARNING_RATE)
        gradients = exact.gradients()  # type: ignore[attr-defined]
    with qnn.RUNTIME.open_session(bundle, parameters, OPTIMIZER, NPU_ONLY) as session:
        result = session.step(batches, LEARNING_RATE)
        found = session.gradients()  # type: ignore[attr-defined]
    assert result.loss == pytest.approx(expected.loss, abs=LOSS)
    assert min(cosine(found[name], gradient) for name, gradient in gradients.items()) >= WORST_COSINE


@installed
def test_a_second_start_and_another_adapter_compile_nothing(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.runtimes.whole.plugin import PluginCompiler

    bundle = opened_copy(prepared("grouped-query", "int4"), tmp_path / "bundle")
    parameters = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(0, [7]))
    with qnn.RUNTIME.open_session(bundle, parameters, OPTIMIZER, NPU_ONLY) as session:
        first = session.step([batch], LEARNING_RATE)
        assert not placements(session)[HALF_STEP].cached
        session.step([batch], LEARNING_RATE)
        assert len(placements(session)) == 1
    builds = []
    monkeypatch.setattr(PluginCompiler, "_build", lambda *arguments, **options: builds.append(arguments))
    for other in (parameters, {name: 2 * value for name, value in parameters.items()}):
        with qnn.RUNTIME.open_session(bundle, other, OPTIMIZER, NPU_ONLY) as session:
            second = session.step([batch], LEARNING_RATE)
            assert placements(session)[HALF_STEP].cached
            assert (second == first) is (other is parameters), "bit-identical, and another adapter is another step"
    assert not builds
    load_bundle(bundle.path)


@installed
def test_a_damaged_context_is_compiled_again(prepared: Prepared, tmp_path: Path) -> None:
    bundle = opened_copy(prepared("grouped-query", "int4"), tmp_path / "bundle")
    parameters = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(0, [7]))
    results = []
    for _ in range(2):
        with qnn.RUNTIME.open_session(bundle, parameters, OPTIMIZER, NPU_ONLY) as session:
            results.append(session.step([batch], LEARNING_RATE))
            assert not placements(session)[HALF_STEP].cached
        (compiled,) = (bundle.path / ".cache").rglob("compiled")
        data = bytearray(compiled.read_bytes())
        data[len(data) // 2] ^= 1
        compiled.write_bytes(data)
    assert results[0] == results[1]


@installed
def test_a_context_that_names_another_file_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    """Its hash is right: whoever wrote it wrote the record as well."""
    import onnx

    from edgetune.runtimes.whole.contexts import ContextKey, ContextStore

    bundle = opened_copy(prepared("grouped-query", "int4"), tmp_path / "bundle")
    parameters = adapter_of(bundle)
    batch = batch_of(bundle, rows_of(0, [7]))
    with qnn.RUNTIME.open_session(bundle, parameters, OPTIMIZER, NPU_ONLY) as session:
        session.step([batch], LEARNING_RATE)
    (compiled,) = (bundle.path / ".cache").rglob("compiled")
    model = onnx.load(compiled)
    (node,) = model.graph.node
    for attribute in node.attribute:
        if attribute.name == "embed_mode":
            attribute.i = 0
        if attribute.name == "ep_cache_context":
            attribute.s = b"../../../secret.bin"
    record = json.loads((compiled.parent / "record.json").read_text())
    partitions = [Partition(qnn.PROVIDER, [Node("MatMul", "product")])]
    ContextStore(bundle.path).save(ContextKey(**record["key"]), model.SerializeToString(), partitions)
    with (
        pytest.raises(VerificationError, match=r"names the file '\.\./\.\./\.\./secret\.bin'"),
        qnn.RUNTIME.open_session(bundle, parameters, OPTIMIZER, NPU_ONLY) as session,
    ):
        session.step([batch], LEARNING_RATE)


@installed
def test_a_context_that_no_longer_loads_is_compiled_again(prepared: Prepared, tmp_path: Path) -> None:
    """Its hash and its form are right, as when a driver has changed."""
    import onnx

    from edgetune.runtimes.whole.contexts import ContextKey, ContextStore

    bundle = opened_copy(prepared("grouped-query", "int4"), tmp_path / "bundle")
    batch = batch_of(bundle, rows_of(0, [7]))
    with qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, NPU_ONLY) as session:
        expected = session.step([batch], LEARNING_RATE)
        partitions = placements(session)[HALF_STEP].partitions
    (compiled,) = (bundle.path / ".cache").rglob("compiled")
    model = onnx.load(compiled)
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "ep_cache_context":
            attribute.s = b"of another driver"
    record = json.loads((compiled.parent / "record.json").read_text())
    ContextStore(bundle.path).save(ContextKey(**record["key"]), model.SerializeToString(), partitions)
    for cached in (False, True):
        with qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, NPU_ONLY) as session:
            assert session.step([batch], LEARNING_RATE) == expected
            assert placements(session)[HALF_STEP].cached is cached


@installed
def test_what_falls_back_is_told_and_can_be_refused(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of int4 weights, left as they are, are what the HTP does not take."""
    bundle = opened_copy(prepared("multi-head", "int4"), tmp_path / "bundle")
    asked_for = plugin_of_qnn()
    monkeypatch.setattr(qnn.PLUGIN, "plugin", lambda *asked: replace(asked_for, session={}))
    batch = batch_of(bundle, rows_of(0, [7]))
    with qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan(accelerator=Accelerator())) as s:
        assert s.step([batch], LEARNING_RATE).applied
        placement = placements(s)[HALF_STEP]
    assert {node.operator for node in placement.fallen_back} == {"DequantizeLinear"}
    assert {node.reason for node in placement.fallen_back} == {
        "QNN EP does not support a standalone DQ op with per-channel quantization"
    }
    assert "on the CPU: DequantizeLinear 1" in str(placement)
    assert 0 < placement.accelerated < 500
    with (
        pytest.raises(
            IncompatibleError, match=r"nodes of the graph 'step_half' fall back.*--require-npu.*DequantizeLinear 17"
        ),
        qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, NPU_ONLY) as session,
    ):
        session.step([batch], LEARNING_RATE)


@installed
def test_a_provider_that_takes_nothing_does_not_train_on_the_cpu_in_silence(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = opened_copy(prepared("multi-head", "fp32"), tmp_path / "bundle")
    asked_for = plugin_of_qnn()
    broken = replace(asked_for, options={**asked_for.options, "backend_path": "/nowhere/libQnnHtp.so"})
    monkeypatch.setattr(qnn.PLUGIN, "plugin", lambda *asked: broken)
    with (
        pytest.raises(IncompatibleError, match=r"QNNExecutionProvider (takes none|cannot compile).*--runtime onnx"),
        qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, NPU_OR_CPU) as session,
    ):
        session.step([batch_of(bundle, rows_of(0, [7]))], LEARNING_RATE)


@pytest.mark.parametrize("options", [{"soc_model": "9999"}, {}])
def test_a_chip_that_may_be_unknown_is_named_where_nothing_is_taken(
    prepared: Prepared, options: dict[str, str]
) -> None:
    known = Plugin("QNNExecutionProvider", "1", None, "HTP", options, {})
    compiler = PluginCompiler(prepared("multi-head", "int4"), known, require=False)
    nothing = Context(b"", [Partition("CPUExecutionProvider", [Node("MatMul", "product")])])
    with pytest.raises(IncompatibleError, match="takes none of the 1 nodes") as refused:
        compiler._placement("step", 1, 8, nothing, cached=False)
    assert ("perhaps it does not know the chip 9999 (--soc-model)" in str(refused.value)) == bool(options)


@installed
def test_a_failure_at_run_time_is_not_repeated_on_the_cpu(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as bindings

    bundle = prepared("grouped-query", "int4")
    with qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, NPU_ONLY) as session:
        batch = batch_of(bundle, rows_of(0, [7]))
        session.step([batch], LEARNING_RATE)
        (graph,) = session._graphs._graphs.values()  # type: ignore[attr-defined]
        inner = graph._session

        sound = inner._sess

        class Failing:
            def run(self, *arguments: object) -> None:
                raise bindings.EPFail("the device was lost")

            def __getattr__(self, name: str) -> object:
                return getattr(sound, name)

        monkeypatch.setattr(inner, "_sess", Failing())
        with pytest.raises(EdgetuneError, match=r"the device was lost.*the CPU did not take its place"):
            session.step([batch], LEARNING_RATE)


@pytest.mark.own
@installed
def test_a_hundred_steps_on_the_demo_rows_come_to_the_cpus_loss(tmp_path: Path) -> None:
    bundle = assistant_bundle(tmp_path / "bundle").path
    runs: dict[str, Recorder] = {}
    for name in ("onnxruntime", "qnn"):
        config = TrainConfig(
            runtime=name,  # type: ignore[arg-type]
            plan="whole",
            steps=STEPS,
            batch_size=1,
            learning_rate=5e-3,
            buckets="1x48" if name == "qnn" else None,
            require_npu=name == "qnn",
        )
        recorder = Recorder()
        result = train(bundle, ROWS / "train.jsonl", tmp_path / name, config, observer=recorder)
        runs[name] = recorder
        if name == "qnn":
            assert [(each["batch"], each["length"], each["fallen_back"]) for each in result.placement] == [(1, 48, [])]
            assert recorder.notices == [notice for notice in recorder.notices if "in 1 partition" in notice]
    exact, found = ([metrics.loss for metrics in runs[name].steps] for name in ("onnxruntime", "qnn"))
    assert exact[-1] < 0.8 * exact[0], "it has to learn for the comparison to mean something"
    assert found[-1] == pytest.approx(exact[-1], rel=FOLLOWS)
    assert np.mean(found[-10:]) == pytest.approx(np.mean(exact[-10:]), rel=FOLLOWS)
    provenance = json.loads((tmp_path / "qnn" / "edgetune.json").read_text())["provenance"]
    assert provenance["placement"] == "QNNExecutionProvider (HTP emulation, soc 60), all nodes"


@installed
def test_results_alone_are_on_stdout(prepared: Prepared, tmp_path: Path) -> None:
    """Qualcomm's library prints a line when it is loaded, which is neither a result nor an error."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "is it on?", "completion": "it is"}) + "\n")
    options = ["--runtime", "qnn", "--require-npu", "--steps", "1", "--batch-size", "1", "--json", "--quiet"]
    paths = [prepared("multi-head", "int4").path, "--data", rows, "--output", tmp_path / "adapter"]
    command = [sys.executable, "-m", "edgetune", "train", *paths, *options]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")
    (placement,) = json.loads(finished.stdout)["placement"]
    assert (placement["graph"], placement["accelerator_partitions"], placement["fallen_back"]) == (HALF_STEP, 1, [])


def test_what_libraries_print_is_told_on_stderr_but_for_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with _stdout_for_results():
        os.write(1, b" # LIBNATIVE: No alternate configuration present in libnative_tls.conf\n")
        os.write(1, b"a library's error\n")
        os.write(2, b"another\n")
    os.write(1, b"result\n")
    assert capfd.readouterr() == ("result\n", "another\na library's error\n")


def test_what_libraries_print_is_told_where_they_fail(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), _stdout_for_results():
        os.write(1, b"why\n")
        raise RuntimeError
    assert capfd.readouterr() == ("", "why\n")


@installed
def test_it_takes_no_layered_plan(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "int4")
    with (
        pytest.raises(UsageError, match="takes no plan but `whole`"),
        qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, LayeredPlan()),
    ):
        pass


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_runtime, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "edgetune\[qnn\]"'):
        find_runtime("qnn").abilities()


@installed
def test_without_an_npu_and_an_emulator_both_are_named(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an Arm board without Qualcomm's driver: the library loads and offers no device."""
    monkeypatch.setattr(qnn.ort, "get_ep_devices", list)
    bundle = prepared("multi-head", "int4")
    with (
        pytest.raises(IncompatibleError, match=r"finds no NPU and no emulator here; .*--runtime onnxruntime"),
        qnn.RUNTIME.open_session(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()),
    ):
        pass


@pytest.mark.parametrize("option", [{"require_npu": True}, {"buckets": "1x8"}, {"device_type": "NPU"}])
def test_options_of_accelerators_need_one(option: dict[str, Any], tmp_path: Path) -> None:
    config = replace(TrainConfig(runtime="onnxruntime"), **option)
    with pytest.raises(UsageError, match="means nothing without a runtime that compiles the whole step"):
        train(tmp_path / "bundle", tmp_path / "rows", tmp_path / "adapter", config, observer=Recorder())


@installed
def test_inspect_shows_where_the_nodes_run(prepared: Prepared) -> None:
    bundle = str(prepared("grouped-query", "int4").path)
    command = ["inspect", bundle, "--placement", "qnn", "--buckets", "1x8", "--require-npu"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("HTP emulation, soc 60") == 2
    told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert [(each["graph"], each["accelerator_partitions"], each["fallen_back"]) for each in told] == [
        (HALF_STEP, 1, []),
        (HALF_LOSS, 1, []),
    ]
    assert all(each["cached"] for each in told)


@pytest.mark.parametrize(
    ("buckets", "reason"),
    [
        ("64x4096", "--buckets 64x4096 is longer than the bundle's rows, which have at most 128 tokens"),
        ("1x8,1x129", "--buckets 1x129 is longer"),
        ("1024x128", "--buckets 1024x128 has 131,072 positions"),
    ],
)
def test_inspect_compiles_no_shape_that_nobody_trains(
    prepared: Prepared, buckets: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = replace(qnn.RUNTIME, abilities=lambda: None, place=lambda *arguments: pytest.fail("it was compiled"))
    monkeypatch.setattr(qnn, "RUNTIME", watched)
    bundle = prepared("grouped-query", "int4")
    assert bundle.manifest.max_length == 128
    refused = CliRunner().invoke(main, ["inspect", str(bundle.path), "--placement", "qnn", "--buckets", buckets])
    assert refused.exit_code == 2, refused.output
    assert reason in refused.stderr


@installed
def test_inspect_ends_with_4_where_a_node_falls_back(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = opened_copy(prepared("multi-head", "int4"), tmp_path / "bundle")
    asked_for = plugin_of_qnn()
    monkeypatch.setattr(qnn.PLUGIN, "plugin", lambda *asked: replace(asked_for, session={}))
    command = ["inspect", str(bundle.path), "--placement", "qnn", "--buckets", "1x8"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "does not support a standalone DQ op" in shown.stdout
    refused = CliRunner().invoke(main, [*command, "--require-npu"])
    assert refused.exit_code == 4
    assert "DequantizeLinear 17" in refused.stderr


@installed
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"plan": "stream"}, "does not execute --plan stream"),
        ({"device_type": "GPU"}, "not on --device-type GPU"),
        ({"buckets": "8"}, "--buckets is '8'"),
        ({"memory_budget": "3GB"}, "takes no --memory-budget"),
    ],
)
def test_options_that_it_does_not_take(option: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = replace(TrainConfig(runtime="qnn"), **option)
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "bundle", tmp_path / "rows", tmp_path / "adapter", config, observer=Recorder())


@installed
def test_int8_needs_a_bundle_that_has_it(prepared: Prepared, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "is it on?", "completion": "it is"}) + "\n")
    config = TrainConfig(runtime="qnn", precision="int8", steps=1)
    with pytest.raises(IncompatibleError, match=r"no graph 'step_int8'.*--npu blocks"):
        train(prepared("multi-head", "int4").path, rows, tmp_path / "adapter", config, observer=Recorder())
