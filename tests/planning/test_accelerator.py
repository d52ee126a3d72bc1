"""`train` and `plan` with a device: what its profile says of the accelerator holds, what is not found is said."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.config import TrainConfig
from edgetune.data.buckets import Bucket
from edgetune.data.encode import Example
from edgetune.devices.place import Place
from edgetune.devices.profile import Profile, load_profile
from edgetune.errors import IncompatibleError, MissingDependencyError, UsageError
from edgetune.formats.bundle import load_bundle
from edgetune.planning.accelerator import apply_profile
from edgetune.planning.choice import Choice, choose
from edgetune.planning.limits import require_form
from edgetune.planning.memory import Work
from edgetune.planning.options import resolve
from edgetune.planning.workload import Workload
from edgetune.runtimes import find_runtime, openvino_core
from edgetune.runtimes.execution import Accelerator, ExecutionPlan, WholePlan
from edgetune.runtimes.whole import plugin_runtime
from edgetune.training import TrainResult, train
from support.bundle_copy import copy_of_bundle
from support.device_profile import PROFILE
from support.golden import GOLDEN
from support.recorder import Recorder
from support.run_requests import request_of

ROWS = ("--data", GOLDEN / "train.jsonl")
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
needs_qnn = pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed")


def profile_on(folder: Path, kind: str, **placement: str) -> str:
    """A profile whose accelerator is a device of OpenVINO."""
    text = PROFILE.replace('names = ["qnn", "onnxruntime"]', 'names = ["openvino", "onnxruntime"]')
    text = text.replace('{ backend_type = "htp" }', f'{{ device_type = "{kind}" }}')
    for place, where in placement.items():
        text = text.replace(f'{place} = "accelerator"', f'{place} = "{where}"')
    path = folder / "my-board.toml"
    path.write_text(text)
    return str(path)


def npu(folder: Path) -> str:
    """A profile whose accelerator is Qualcomm's."""
    path = folder / "my-npu.toml"
    path.write_text(PROFILE)
    return str(path)


def resolved(config: TrainConfig, profile: Profile, *, here: bool = True) -> TrainConfig:
    return resolve(config, Place(profile, here)).config


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def run(output: Path, **config: Any) -> tuple[TrainResult, Recorder]:
    recorder = Recorder()
    given = TrainConfig(steps=1, batch_size=1, **config)
    return train(GOLDEN / "bundle", GOLDEN / "train.jsonl", output, given, observer=recorder), recorder


@needs_openvino
def test_the_whole_step_runs_on_the_device_that_the_profile_names(tmp_path: Path) -> None:
    result, _ = run(tmp_path / "adapter", device=profile_on(tmp_path, "CPU"))
    assert (result.runtime, result.plan) == ("openvino", "whole step in static shapes")
    assert {graph["provider"] for graph in result.placement} == {"OpenVINO CPU"}
    # Its forward pass alone may run on the CPU only, so that nothing has to be of static shape.
    result, _ = run(
        tmp_path / "other", device=profile_on(tmp_path, "CPU"), method="forward-only", queries=2, learning_rate=1e-3
    )
    assert "static" not in result.plan


@needs_openvino
def test_an_accelerator_that_is_not_found_is_said(tmp_path: Path) -> None:
    result, seen = run(tmp_path / "adapter", device=profile_on(tmp_path, "NPU"))
    assert "static" not in result.plan
    assert any("OpenVINO finds no NPU here (pip install it); the CPU computes" in notice for notice in seen.notices)


def test_a_chip_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_text(PROFILE.replace('backend_type = "htp"', 'soc_model = "8 Elite"'))
    with pytest.raises(UsageError, match="soc_model is '8 Elite', expected a number such as 69"):
        load_profile(str(path))


@needs_openvino
@pytest.mark.parametrize("config", [{"plan": "stream"}, {"runtime": "onnxruntime"}, {"memory_budget": "2GB"}])
def test_what_is_asked_for_comes_first(config: dict[str, Any], tmp_path: Path) -> None:
    given = TrainConfig(**config)
    assert apply_profile(given, Place(load_profile(profile_on(tmp_path, "CPU")))) == (given, ())


@needs_qnn
def test_the_chip_is_the_profiles_unless_another_is_asked_for() -> None:
    profile = load_profile("android-snapdragon-8-elite")
    assert apply_profile(TrainConfig(), Place(profile))[0].soc_model == 69
    assert apply_profile(TrainConfig(soc_model=43), Place(profile))[0].soc_model == 43


@pytest.mark.parametrize("config", [{}, {"runtime": "openvino", "plan": "whole"}])
def test_a_device_without_an_accelerator_changes_nothing(config: dict[str, Any]) -> None:
    given = TrainConfig(**config)
    assert apply_profile(given, Place(load_profile("generic-x86"))) == (given, ())


def test_a_device_that_openvino_does_not_have_is_refused(tmp_path: Path) -> None:
    for kind in ("auto", "TPU"):
        path = profile_on(tmp_path, kind)
        with pytest.raises(UsageError, match=f"device_type is '{kind}', expected CPU, GPU, NPU"):
            load_profile(path)
    done = call("train", GOLDEN / "bundle", *ROWS, "--output", tmp_path / "adapter", "--device", path)
    assert done.exit_code == 2
    assert not (tmp_path / "adapter").exists()


@needs_openvino
def test_options_of_accelerators_hold_where_the_profile_leads_to_one(tmp_path: Path) -> None:
    result, _ = run(tmp_path / "adapter", device=profile_on(tmp_path, "CPU"), buckets="1x128")
    assert {(graph["batch"], graph["length"]) for graph in result.placement} == {(1, 128)}
    with pytest.raises(UsageError, match="takes batches of 1x64, 1x128 only, not 2x128"):
        run(tmp_path / "other", device=profile_on(tmp_path, "CPU"), buckets="2x128")
    with pytest.raises(UsageError, match="--buckets 1x128 means nothing without a runtime that compiles"):
        run(tmp_path / "other", device="generic-x86", buckets="1x128")


@needs_qnn
def test_the_profiles_npu_may_be_required(tmp_path: Path) -> None:
    settled = resolved(TrainConfig(require_npu=True), load_profile(npu(tmp_path)))
    assert (settled.runtime, settled.require_npu) == ("qnn", True)


@needs_openvino
@pytest.mark.parametrize("option", [{"require_npu": True}, {"device_type": "NPU"}])
def test_an_accelerator_that_is_wanted_and_not_found_is_an_error(option: dict[str, Any], tmp_path: Path) -> None:
    profile = load_profile(profile_on(tmp_path, "NPU"))
    for config in (TrainConfig(**option), TrainConfig("openvino", plan="whole", **option)):
        with pytest.raises(IncompatibleError, match=r"OpenVINO finds no NPU here .*leave out --require-npu"):
            resolve(config, Place(profile))


def test_why_the_cpu_computes_is_said_with_what_means_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.planning.accelerator._why_absent", lambda *given: "there is no NPU")
    reason = r"(?s)there is no NPU; the CPU computes.*--buckets 4x64 means nothing without"
    with pytest.raises(UsageError, match=reason):
        resolve(TrainConfig(buckets="4x64"), Place(load_profile("intel-core-ultra")))


def test_what_several_runtimes_lack_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.planning.accelerator._why_absent", lambda *given: "there is no NPU")
    _, said = apply_profile(TrainConfig(), Place(load_profile("intel-core-ultra")))
    assert said == ("intel-core-ultra: there is no NPU; the CPU computes",)


def test_a_missing_package_is_said_and_the_cpu_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_runtime, "find_spec", lambda name: None)
    profile = load_profile(npu(tmp_path))
    result, seen = run(tmp_path / "adapter", device=npu(tmp_path))
    assert result.runtime == "onnxruntime"
    expected = 'my-board: onnxruntime-qnn is not installed; pip install "edgetune[qnn]"; the CPU computes'
    assert expected in seen.notices
    with pytest.raises(MissingDependencyError, match="onnxruntime-qnn is not installed"):
        resolve(TrainConfig("qnn"), Place(profile))
    openvino_core.core.cache_clear()
    monkeypatch.setattr(openvino_core, "find_spec", lambda name: None)
    settled = resolve(TrainConfig(), Place(load_profile(profile_on(tmp_path, "NPU"))))
    openvino_core.core.cache_clear()
    assert settled.request.runtime == "auto"
    assert settled.notes == ('my-board: openvino is not installed; pip install "edgetune[openvino]"; the CPU computes',)


def test_a_memory_budget_leads_to_the_cpu_on_every_npu(tmp_path: Path) -> None:
    result, seen = run(tmp_path / "adapter", device=npu(tmp_path), memory_budget="1GB")
    assert (result.runtime, result.predicted_peak_memory_bytes is None) == ("onnxruntime", False)
    assert not any("the CPU computes" in notice for notice in seen.notices)


def test_elsewhere_the_accelerator_is_the_one_that_the_profile_names() -> None:
    profile = load_profile("intel-core-ultra")
    for given in (TrainConfig(), TrainConfig("openvino", plan="whole")):
        settled = resolved(given, profile, here=False)
        assert (settled.runtime, settled.plan, settled.device_type) == ("openvino", "whole", "NPU")
    phone = load_profile("android-snapdragon-8-elite")
    for given in (TrainConfig(), TrainConfig("qnn")):
        settled = resolved(given, phone, here=False)
        assert (settled.runtime, settled.soc_model) == ("qnn", 69)


def test_on_the_device_plan_and_train_take_what_is_planned_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.planning.accelerator._why_absent", lambda *given: "")
    for name in ("intel-core-ultra", "windows-snapdragon-x", "amd-ryzen-ai", "raspberry-pi-5"):
        profile = load_profile(name)
        there, elsewhere = (apply_profile(TrainConfig(), Place(profile, here)) for here in (True, False))
        assert there == elsewhere


@needs_openvino
def test_a_whole_step_that_was_asked_for_runs_on_the_profiles_device(tmp_path: Path) -> None:
    asked = TrainConfig("openvino", plan="whole")
    assert resolved(asked, load_profile(profile_on(tmp_path, "CPU"))).device_type == "CPU"
    settled = resolve(asked, Place(load_profile(profile_on(tmp_path, "NPU"))))
    assert settled.config == replace(asked, device="my-board")
    assert settled.notes == ("my-board: OpenVINO finds no NPU here (pip install it); the CPU computes",)


@pytest.mark.parametrize(
    ("runtime", "plan", "expected"),
    [
        ("qnn", WholePlan(accelerator=Accelerator()), True),
        ("openvino", WholePlan(accelerator=Accelerator("NPU")), True),
        ("openvino", WholePlan(accelerator=Accelerator("CPU")), False),
        ("openvino", WholePlan(accelerator=Accelerator()), False),
        ("onnxruntime", WholePlan(), False),
    ],
)
def test_what_openvino_executes_may_be_the_cpus(runtime: str, plan: ExecutionPlan, expected: bool) -> None:
    assert Choice(runtime, find_runtime("onnxruntime"), plan, None).on_accelerator is expected


@pytest.mark.parametrize("placement", [{"forward_only": "cpu"}, {"forward_only": "accelerator"}])
@needs_qnn
def test_forward_only_has_a_place_of_its_own(placement: dict[str, str], tmp_path: Path) -> None:
    path = Path(npu(tmp_path))
    path.write_text(PROFILE.replace('forward-only = "cpu"', f'forward-only = "{placement["forward_only"]}"'))
    settled = resolved(TrainConfig(method="forward-only"), load_profile(str(path)))
    assert settled.runtime == ("auto" if placement["forward_only"] == "cpu" else "qnn")


@needs_openvino
@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_plan_lays_out_the_shapes_that_train_compiles(tmp_path: Path, architecture: str) -> None:
    options = (GOLDEN / "bundle", *ROWS, "--device", profile_on(tmp_path, "CPU"), "--steps", 3)
    path = tmp_path / "my-board.toml"
    path.write_text(path.read_text().replace('"aarch64"', f'"{architecture}"'))
    found = json.loads(call("plan", *options, "--batch-size", 8, "--json").stdout)
    assert found["here"] is (platform.machine() == architecture)
    assert found["plan"] == "whole step in static shapes" and not found["on_accelerator"]
    done = call("train", *options, "--batch-size", 8, "--output", tmp_path / "adapter", "--json", "--quiet")
    graphs = json.loads(done.stdout)["placement"]
    planned = {(shape["sequences"], shape["length"]) for shape in found["shapes"]}
    assert planned == {(graph["batch"], graph["length"]) for graph in graphs} <= {(1, 64), (1, 128)}


def test_validation_rows_that_fit_no_bucket_are_refused_with_the_others() -> None:
    manifest = load_bundle(GOLDEN / "bundle").manifest
    short, long = ([Example(1, [5] * count, [5] * count)] for count in (8, 20))
    config = request_of(TrainConfig(batch_size=1))
    Workload(manifest, short, short, config, [Bucket(8, 1)])
    with pytest.raises(UsageError, match="the longest row has 20 tokens"):
        Workload(manifest, short, long, config, [Bucket(8, 1)])


def test_no_path_of_this_machine_is_in_the_adapter(tmp_path: Path) -> None:
    run(tmp_path / "adapter", device=npu(tmp_path), memory_budget="1GB")
    text = (tmp_path / "adapter" / "edgetune.json").read_text()
    assert str(tmp_path) not in text
    provenance = json.loads(text)["provenance"]
    assert json.loads(provenance["options"])["device"] == "my-board"


@needs_qnn
def test_without_a_device_the_plan_is_the_run_that_train_makes() -> None:
    """On any runtime: profiles of computers list the CPU's alone."""
    options = ("--runtime", "qnn", "--length", 8, "--batch-size", 1, "--steps", 1, "--json")
    done = call("plan", GOLDEN / "bundle", *options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["device"], found["here"], found["runtime"], found["on_accelerator"]) == (None, True, "qnn", True)
    assert found["emulated"] is (platform.machine() == "x86_64")


def test_a_budget_takes_the_place_of_free_memory_in_plan_and_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("planning.choice", "training.run"):
        monkeypatch.setattr(f"edgetune.{module}.free_memory_bytes", lambda: 1_000_000)
    options = (GOLDEN / "bundle", *ROWS, "--runtime", "onnxruntime", "--steps", 1, "--batch-size", 4, "--json")
    for budget in ((), ("--memory-budget", "2GB")):
        planned = json.loads(call("plan", *options, *budget).stdout)["plan"]
        output = tmp_path / f"adapter{len(budget)}"
        trained = json.loads(call("train", *options, *budget, "--output", output, "--quiet").stdout)["plan"]
        assert planned == trained
        assert ("streamed" in planned) is (not budget)


def test_forward_only_trains_b_alone(tmp_path: Path) -> None:
    slots = load_bundle(GOLDEN / "bundle").manifest.lora.shapes().items()
    sizes = {matrix: sum(rows * columns for name, (rows, columns) in slots if matrix in name) for matrix in "AB"}
    for method, expected in (("forward-only", sizes["B"]), ("backpropagation", sizes["A"] + sizes["B"])):
        queries = {"queries": 2} if method == "forward-only" else {}
        _, seen = run(tmp_path / method, method=method, learning_rate=1e-3, **queries)
        assert seen.starts[0].trainable_parameters == expected


@pytest.mark.parametrize(
    ("form", "config"),
    [
        ("layered", TrainConfig("onnxruntime", plan="stream")),
        ("whole_step", TrainConfig("onnxruntime", plan="whole")),
        ("forward_only", TrainConfig("onnxruntime", method="forward-only", queries=2)),
    ],
)
def test_what_runs_nowhere_on_a_device_is_refused_and_what_runs_beside_its_accelerator_is_said(
    form: str, config: TrainConfig
) -> None:
    profile = load_profile("apple-silicon")
    work = Work(64, 64 * 64)
    choice = choose(load_bundle(GOLDEN / "bundle").manifest, request_of(config), work)

    def required(where: str) -> list[str]:
        changed = replace(profile, placement=replace(profile.placement, **{form: where}))
        return require_form(replace(request_of(config), place=Place(changed)), choice)

    assert required("cpu") == []
    (note,) = required("accelerator")
    assert note.startswith("apple-silicon: ") and note.endswith("on onnxruntime; the CPU computes")
    with pytest.raises(IncompatibleError, match=f"placement.{form.replace('_', '-')} is 'no'"):
        required("no")


def test_a_whole_step_is_refused_where_not_even_the_leanest_plan_fits(tmp_path: Path) -> None:
    small = tmp_path / "my-board.toml"
    small.write_text(PROFILE.replace('value = "2GB"', 'value = "20MB"'))
    for plan in ("whole", "auto"):
        done = call("plan", GOLDEN / "bundle", "--device", small, "--runtime", "onnxruntime", "--plan", plan)
        assert done.exit_code == 6 and "my-board is too small" in done.stderr, done.output


def test_truncating_cuts_to_what_the_device_takes(tmp_path: Path) -> None:
    board = tmp_path / "my-board.toml"
    text = PROFILE.replace('names = ["qnn", "onnxruntime"]', 'names = ["onnxruntime"]')
    limit = '[limits]\nlongest-row = { value = 30, source = "manual" }\n'
    board.write_text(text.replace("[[limits.notes]]", f"{limit}\n[[limits.notes]]", 1))
    refused = call("plan", GOLDEN / "bundle", *ROWS, "--device", board)
    assert refused.exit_code == 6 and "what would fit: rows of at most 30 tokens (fp32" in refused.stderr
    cut = call("plan", GOLDEN / "bundle", *ROWS, "--device", board, "--truncate", "--json")
    assert cut.exit_code == 0 and json.loads(cut.stdout)["longest_row"] == 30


@needs_openvino
def test_flash_has_room_for_what_is_compiled(tmp_path: Path) -> None:
    bundle = copy_of_bundle(GOLDEN / "bundle", tmp_path / "bundle")
    options = (*ROWS, "--valid", GOLDEN / "train.jsonl", "--runtime", "openvino", "--plan", "whole", "--steps", 2)
    planned = json.loads(call("plan", bundle, *options, "--batch-size", 2, "--json").stdout)
    shutil.rmtree(bundle / ".cache", ignore_errors=True)
    done = call("train", bundle, *options, "--batch-size", 2, "--output", tmp_path / "adapter")
    assert done.exit_code == 0, done.stderr
    kept = sum(path.stat().st_size for path in (bundle / ".cache").rglob("*") if path.is_file())
    assert 0 < kept < planned["flash"]["cache"] < 5 * kept
