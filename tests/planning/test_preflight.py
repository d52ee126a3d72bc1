"""`edgetune plan`: what it chooses, predicts, refuses and says; and `train --device`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgetune.cli import main
from edgetune.config import TrainConfig
from edgetune.data.batches import Batch
from edgetune.data.encode import Example
from edgetune.devices.profile import load_profile
from edgetune.errors import ResourceError
from edgetune.formats.bundle import Bundle
from edgetune.planning import timing
from edgetune.planning.choice import choose
from edgetune.planning.cost import CostModel
from edgetune.planning.duration import _typical
from edgetune.planning.limits import require_rows_fit
from edgetune.planning.timing import Timing, time_steps
from edgetune.planning.workload import Workload
from edgetune.runtimes import RUNTIMES, onnxruntime
from edgetune.runtimes.contract import Session
from edgetune.runtimes.forward_only import ForwardOnlySession
from edgetune.runtimes.layered.cached_states import record_bytes
from edgetune.runtimes.layered.session import LayeredSession
from support.device_profile import PROFILE
from support.golden import GOLDEN
from support.prepared_bundles import Prepared
from support.run_requests import request_of

CPU = (
    PROFILE.replace('class = "npu"', 'class = "cpu"')
    .replace('"accelerator"', '"cpu"')
    .replace('["qnn", "onnxruntime"]', '["onnxruntime"]')
)


@pytest.fixture
def bundle(prepared: Prepared) -> Bundle:
    return prepared("grouped-query", "int4")


def board(folder: Path, memory: str, text: str = CPU) -> str:
    path = folder / "my-board.toml"
    path.write_text(text.replace("2GB", memory))
    return str(path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_on_another_device_times_are_estimates(bundle: Bundle) -> None:
    found = answer("plan", bundle.path, "--device", "raspberry-pi-5", "--steps", "10", "--length", "32")
    assert not found["here"]
    assert (found["runtime"], found["batch_size"], found["steps"]) == ("onnxruntime", 4, 10)
    assert found["shapes"] == [{"sequences": 4, "length": 32, "batches": 1}]
    assert found["time_from"].startswith("an estimate: 30.249 GFLOP/s")
    assert found["run_seconds"] == pytest.approx(10 * found["step_seconds"])
    longer = answer("plan", bundle.path, "--device", "raspberry-pi-5", "--length", "64")
    assert longer["step_seconds"] > 1.9 * found["step_seconds"]
    assert longer["peak_memory_bytes"] > found["peak_memory_bytes"]


def test_the_estimate_is_the_operations_by_the_speed(bundle: Bundle) -> None:
    """Forward and backward multiply each weight twice with each position; attention comes on top."""
    a = bundle.manifest.architecture
    found = answer("plan", bundle.path, "--device", "raspberry-pi-5", "--length", "8", "--batch-size", "1")
    heads = 2 * (a.num_attention_heads + a.num_key_value_heads) * a.head_dim
    weights = a.num_hidden_layers * a.hidden_size * (heads + 3 * a.intermediate_size) + a.vocab_size * a.hidden_size
    least = 2 * 2 * weights * 7 / 30.249e9
    assert least < found["step_seconds"] < 1.6 * least


def test_without_figures_the_time_is_unknown_and_a_missing_runtime_is_said(bundle: Bundle) -> None:
    asked = ("plan", bundle.path, "--device", "android-snapdragon-8-elite", "--length", "16")
    for options, reason in (((), "no figure says how fast the accelerator"), (("--plan", "keep"), "hardware.products")):
        found = answer(*asked, *options)
        assert found["step_seconds"] is None and found["run_seconds"] is None
        assert reason in found["time_from"]
    if "qnn" not in RUNTIMES:
        assert any("this edgetune has no runtime qnn" in note for note in found["notes"])


@pytest.mark.parametrize("options", [(), ("--plan", "whole"), ("--method", "forward-only")], ids=str)
@pytest.mark.parametrize(
    ("device", "runtime"),
    [("intel-core-ultra", "openvino"), ("android-snapdragon-8-elite", "qnn"), ("windows-snapdragon-x", "qnn")],
)
def test_elsewhere_the_whole_step_is_planned_on_the_accelerator(
    device: str, runtime: str, options: tuple[str, ...], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the profile's shapes, whatever is installed here; nothing is said that nobody knows."""
    for module in ("edgetune.runtimes.whole.plugin_runtime", "edgetune.runtimes.openvino_core"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    monkeypatch.setattr("edgetune.devices.presence._installed", lambda package: False)
    found = answer("plan", bundle.path, "--device", device, "--length", "48", "--batch-size", "6", *options)
    assert (found["here"], found["runtime"], found["on_accelerator"], found["emulated"]) == (
        False,
        runtime,
        True,
        False,
    )
    assert "in static shapes" in found["plan"]
    buckets = load_profile(device).buckets
    assert buckets is not None
    assert set(found["buckets"]) == {f"{rows}x{positions}" for rows, positions in buckets.shapes}
    assert {f"{shape['sequences']}x{shape['length']}" for shape in found["shapes"]} <= set(found["buckets"])
    assert found["peak_memory_bytes"] is None and found["least_memory_bytes"] > 10_000_000
    assert found["run_seconds"] is None
    assert found["flash"]["cache"] > 0
    assert any("that the run fits into the device is not said" in note for note in found["notes"])


def test_shapes_and_chip_are_asked_for_as_in_train(bundle: Bundle) -> None:
    asked = ("plan", bundle.path, "--length", "30", "--batch-size", "2", "--device")
    phone = (*asked, "android-snapdragon-8-elite", "--soc-model", "60", "--buckets")
    found = answer(*phone, "1x64")
    assert found["buckets"] == ["1x64"]
    assert [(shape["sequences"], shape["length"]) for shape in found["shapes"]] == [(1, 64)]
    refused = run(*phone, "1x32")
    assert refused.exit_code == 2
    assert re.search("takes batches of 1x64, .* only, not 1x32; give some of these to --buckets", refused.output)
    for option in (("--buckets", "1x64"), ("--soc-model", "60"), ("--device-type", "NPU")):
        refused = run(*asked, "raspberry-pi-5", *option)
        assert refused.exit_code == 2 and f"{' '.join(option)} means nothing without" in refused.output


@pytest.mark.parametrize("option", [("--plan", "stream"), ("--runtime", "onnxruntime"), ("--memory-budget", "2GB")])
def test_elsewhere_too_what_is_asked_for_comes_first(option: tuple[str, str], bundle: Bundle) -> None:
    found = answer("plan", bundle.path, "--device", "intel-core-ultra", "--length", "16", *option)
    assert (found["runtime"], found["on_accelerator"], found["buckets"]) == ("onnxruntime", False, [])
    assert found["peak_memory_bytes"] > 0 and found["least_memory_bytes"] is None


def test_rows_that_no_fixed_shape_takes_are_answered_with_those_that_fit(bundle: Bundle, tmp_path: Path) -> None:
    device = board(tmp_path, "2GB", PROFILE.replace("[1, 64], [1, 128]", "[1, 16], [2, 32]"))
    refused = run("plan", bundle.path, "--device", device, "--length", "48")
    assert refused.exit_code == 6
    assert "in fixed shapes rows of at most 32 tokens, the longest has 48 (--truncate, or --runtime" in refused.output
    assert "what would fit: rows of at most 32 tokens (whole step in static shapes)" in refused.output
    # Rows that nobody gave are such, and rows that are cut become such.
    longest = answer("plan", bundle.path, "--device", device)
    assert longest["longest_row"] == 32
    assert "of 2.0 GB" in run("plan", bundle.path, "--device", device).output
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "lamp on " * 40}) + "\n")
    cut = answer("plan", bundle.path, "--device", device, "--data", data, "--truncate")
    assert cut["longest_row"] == 32


def test_the_whole_step_needs_what_its_shapes_need_whatever_the_batch(bundle: Bundle, tmp_path: Path) -> None:
    """A batch goes through in as many passes of a shape as it takes; too little memory for one pass is refused."""
    small = PROFILE.replace("[1, 64], [1, 128]", "[1, 64]")
    asked = ("plan", bundle.path, "--length", "64", "--batch-size")
    one, many = (
        answer(*asked, size, "--device", board(tmp_path, "2GB", small))["least_memory_bytes"] for size in (1, 64)
    )
    assert one <= many < one + 100_000
    fits = answer(*asked, 64, "--device", board(tmp_path, f"{int(1.01 * many / 0.85)}B", small))
    assert fits["shapes"] == [{"sequences": 1, "length": 64, "batches": 64}]
    assert any("the memory of the whole step is not predicted" in note for note in fits["notes"])
    refused = run(*asked, 64, "--device", board(tmp_path, f"{int(0.99 * one / 0.85)}B", small))
    assert refused.exit_code == 6 and "the whole step needs more than the" in refused.output


def test_a_figure_of_the_cpu_says_nothing_of_the_accelerator(bundle: Bundle, tmp_path: Path) -> None:
    text = PROFILE.replace("[runtime]", 'products = { value = 1e9, source = "x" }\n\n[runtime]', 1)
    asked = ("plan", bundle.path, "--device", board(tmp_path, "2GB", text), "--length", "16")
    found = answer(*asked)
    assert found["run_seconds"] is None and found["time_from"].startswith("unknown: no figure says how fast")
    assert answer(*asked, "--runtime", "onnxruntime")["run_seconds"] > 0


def test_what_a_runtime_installs_to_be_timed_is_a_note(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    installing = replace(onnxruntime.RUNTIME, install=lambda notice: notice("Installing …"))
    monkeypatch.setattr(onnxruntime, "RUNTIME", installing)
    asked = ("plan", bundle.path, "--runtime", "onnxruntime", "--length", "16", "--steps", "1")
    assert "Installing …" in answer(*asked)["notes"]
    assert "Installing …" not in answer(*asked, "--device", "raspberry-pi-5")["notes"]


def test_later_epochs_are_predicted_without_the_lower_layers(bundle: Bundle) -> None:
    asked = ("plan", bundle.path, "--device", "raspberry-pi-5", "--length", "32", "--epochs", "5")
    found = answer(*asked, "--layers", "1")
    first, later = found["step_seconds"], found["later_step_seconds"]
    assert found["run_seconds"] == pytest.approx(first + 4 * later)
    rows, width = 4, bundle.manifest.architecture.hidden_size
    assert found["flash"]["states"] == rows * record_bytes(32, width)
    assert found["kept"].startswith("what enters layer 1 kept on disk (")
    everything = answer(*asked)
    assert everything["later_step_seconds"] is None and everything["kept"] == ""
    # Forward and backward are alike: the lower layer's backward pass is as much as its forward pass.
    assert everything["step_seconds"] - first == pytest.approx(first - later, rel=0.25)
    short = answer(*asked, "--layers", "1", "--lower-layers-cache", "1kB")
    assert short["later_step_seconds"] is None and short["run_seconds"] == pytest.approx(5 * first)


def test_what_is_kept_takes_the_flash_that_is_left(bundle: Bundle, tmp_path: Path) -> None:
    asked = ("--layers", "1", "--length", "64", "--batch-size", "8", "--gradient-accumulation-steps", "8")
    plain = answer("plan", bundle.path, "--device", board(tmp_path, "2GB"), *asked)["flash"]
    rows, width = 8 * 8, bundle.manifest.architecture.hidden_size
    assert plain["states"] == rows * record_bytes(64, width)
    taken, half = sum(plain.values()), plain["states"] // 2
    text = CPU.replace("[runtime]", f'flash = {{ value = "{taken - half}B", source = "x" }}\n\n[runtime]', 1)
    found = answer("plan", bundle.path, "--device", board(tmp_path, "2GB", text), *asked)
    assert found["flash"]["states"] == plain["states"] - half
    assert "for 50% of the rows" in found["kept"]


def test_flash_is_the_files_and_what_is_written(bundle: Bundle, tmp_path: Path) -> None:
    found = answer("plan", bundle.path, "--device", "raspberry-pi-5", "--length", "16", "--steps", "2")
    files = [bundle.path / file.path for file in bundle.manifest.files] + [bundle.path / "manifest.json"]
    assert found["flash"]["bundle"] == sum(path.stat().st_size for path in files)
    output = tmp_path / "adapter"
    done = run(
        *("train", bundle.path, "--data", GOLDEN / "text.jsonl", "--output", output),
        *("--steps", 2, "--runtime", "onnxruntime", "--quiet"),
    )
    assert done.exit_code == 0, done.output
    written = sum(path.stat().st_size for path in output.iterdir())
    assert written <= found["flash"]["adapter"] <= written + 50_000
    small = board(tmp_path, "2GB")
    text = Path(small).read_text().replace("[runtime]", 'flash = { value = "10kB", source = "x" }\n\n[runtime]', 1)
    Path(small).write_text(text)
    rows = ("--data", GOLDEN / "text.jsonl", "--device", small)
    for command in (("plan", bundle.path, *rows), ("train", bundle.path, *rows, "--output", tmp_path / "other")):
        refused = run(*command)
        assert refused.exit_code == 6, command
        assert "has 10.0 kB of flash, the run needs" in refused.output
    assert not (tmp_path / "other").exists()


def test_a_batch_that_does_not_fit_goes_through_in_parts(bundle: Bundle, tmp_path: Path) -> None:
    asked = ("plan", bundle.path, "--length", "128", "--plan", "stream", "--device")
    sizes = {batch: answer(*asked, board(tmp_path, "2GB"), "--batch-size", batch) for batch in (1, 2, 4)}
    peaks = {batch: found["peak_memory_bytes"] for batch, found in sizes.items()}
    assert peaks[1] < peaks[2] < peaks[4]
    assert [found["pass_rows"] for found in sizes.values()] == [1, 2, 4]
    device = board(tmp_path, f"{int((peaks[2] + peaks[4]) / 2 / 0.85)}B")
    picked = answer(*asked, device)
    assert (picked["batch_size"], picked["gradient_accumulation_steps"], picked["pass_rows"]) == (4, 1, 2)
    assert picked["shapes"] == [{"sequences": 2, "length": 128, "batches": 2}]
    assert "4 rows of at most 128 tokens, room for 2 rows at a time" in run(*asked, device).output


def test_a_device_takes_no_shape_with_more_rows_than_its_largest_batch(bundle: Bundle, tmp_path: Path) -> None:
    limit = '[limits]\nlargest-batch = { value = 2, source = "x" }\n\n[[limits.notes]]'
    limited = PROFILE.replace("[[limits.notes]]", limit)
    free = re.sub(r"\[buckets\].*?(?=\n\[)", "", limited, count=1, flags=re.DOTALL)
    device = board(tmp_path, "2GB", free)
    asked = ("plan", bundle.path, "--device", device, "--length", 32, "--buckets")
    refused = run(*asked, "2x32,4x32")
    assert refused.exit_code == 2
    assert "my-board takes batches of at most 2 rows, not 4x32; give smaller ones to --buckets" in refused.output
    assert answer(*asked, "2x32")["pass_rows"] is None
    strange = board(tmp_path, "2GB", limited.replace("[1, 64], [1, 128]", "[1, 16], [4, 32]"))
    refused = run("plan", bundle.path, "--device", strange, "--length", 32)
    assert refused.exit_code == 2
    assert "a shape has 4 rows, but limits.largest-batch is 2" in refused.output


def test_rows_that_are_too_long_are_answered_with_a_length_that_fits(bundle: Bundle, tmp_path: Path) -> None:
    short = answer(
        "plan",
        bundle.path,
        "--device",
        board(tmp_path, "2GB"),
        "--length",
        "32",
        "--batch-size",
        "1",
        "--plan",
        "stream",
    )
    device = board(tmp_path, f"{int(short['peak_memory_bytes'] / 0.85) + 6000}B")
    refused = run("plan", bundle.path, "--device", device, "--length", "128", "--plan", "stream")
    assert refused.exit_code == 6
    assert "what would fit: rows of at most 32 tokens (fp32" in refused.output
    nothing = run("plan", bundle.path, "--device", board(tmp_path, "10MB"), "--length", "64")
    assert nothing.exit_code == 6
    assert "what would fit: nothing of this bundle" in nothing.output


def test_train_holds_to_the_device(bundle: Bundle, tmp_path: Path) -> None:
    def train(device: str, *options: object) -> Result:
        rows = ("--data", GOLDEN / "train.jsonl", "--output", tmp_path / "adapter", "--force", "--quiet", "--json")
        return run("train", bundle.path, *rows, "--steps", 1, "--device", device, *options)

    done = train(board(tmp_path, "2GB"))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runtime"] == "onnxruntime"
    refused = train(board(tmp_path, "20MB"))
    assert refused.exit_code == 6 and "my-board is too small" in refused.output
    wrong = train(board(tmp_path, "2GB"), "--runtime", "openvino")
    assert wrong.exit_code == 4 and "my-board runs onnxruntime, not --runtime openvino" in wrong.output

    def limited(limit: str) -> str:
        limits = f'[limits]\n{limit}, source = "x" }}\n\n[[limits.notes]]'
        return board(tmp_path, "2GB", CPU.replace("[[limits.notes]]", limits))

    long = train(limited("longest-row = { value = 8"))
    assert long.exit_code == 6 and "rows of at most 8 tokens" in long.output
    in_parts = train(limited("largest-batch = { value = 2"))
    assert in_parts.exit_code == 0 and json.loads(in_parts.stdout)["pass_rows"] == 2
    alike = ("plan", bundle.path, "--length", 64, "--device", limited("largest-batch = { value = 3"))
    for batch_size, passes in ((4, [3, 1]), (3, [3]), (2, [2])):
        planned = answer(*alike, "--batch-size", batch_size, "--no-packing")
        assert sorted((shape["sequences"] for shape in planned["shapes"]), reverse=True) == passes


def test_fixed_shapes_hold_where_the_accelerator_executes(tmp_path: Path) -> None:
    profile = load_profile(board(tmp_path, "2GB", PROFILE))
    # Rows that do not fit into one batch go through in several.
    require_rows_fit(request_of(TrainConfig("qnn", batch_size=8), profile, here=False), 128)
    with pytest.raises(ResourceError, match="rows of at most 128 tokens, the longest has 129"):
        require_rows_fit(request_of(TrainConfig("qnn"), profile, here=False), 129)
    require_rows_fit(request_of(TrainConfig("onnxruntime"), profile, here=False), 129)


@pytest.mark.parametrize("plan", ["keep", "stream", "whole"])
def test_here_a_few_steps_are_timed(bundle: Bundle, plan: str) -> None:
    data = GOLDEN / "train.jsonl"
    found = answer("plan", bundle.path, "--data", data, "--runtime", "onnxruntime", "--plan", plan, "--steps", "5")
    assert found["here"] and found["time_from"].startswith("measured here in ")
    assert 0 < found["step_seconds"] <= found["run_seconds"]
    assert (found["peak_memory_bytes"] is None) == (plan == "whole")


@pytest.mark.parametrize("plan", ["auto", "whole"])
def test_a_forward_only_step_is_its_passes(bundle: Bundle, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a query, one for the loss and one for a matrix alone; the first step moves all matrices alone.

    Each pass that is run is taken for a second.
    """
    passes: list[Sequence[Batch]] = []
    measure = ForwardOnlySession._loss

    def counted(session: ForwardOnlySession, batches: Sequence[Batch]) -> float:
        passes.append(batches)
        return measure(session, batches)

    time = timing._timed

    def timed(session: Session, batch: Batch) -> float:
        before = len(passes)
        time(session, batch)
        return float(len(passes) - before)

    monkeypatch.setattr(ForwardOnlySession, "_loss", counted)
    monkeypatch.setattr(timing, "_timed", timed)
    arguments = ("plan", bundle.path, "--data", GOLDEN / "train.jsonl", "--runtime", "onnxruntime", "--plan", plan)
    arguments += ("--epochs", 3)
    for queries in (8, 38):
        found = answer(*arguments, "--method", "forward-only", "--queries", queries)
        assert "forward" in found["plan"]
        assert found["step_seconds"] == pytest.approx(queries + 2, rel=0.05)  # shapes differ a little
        assert found["start_seconds"] == pytest.approx(len(bundle.manifest.lora.slots) - 1, rel=0.1)


def test_rows_that_are_made_up_are_not_too_many(bundle: Bundle) -> None:
    result = run("plan", bundle.path, "--batch-size", "10", "--gradient-accumulation-steps", "1001")
    assert result.exit_code == 2 and "are 10,010 rows a step, expected at most 10,000" in result.stderr


def test_text_says_what_json_says(bundle: Bundle) -> None:
    arguments = ("plan", bundle.path, "--device", "raspberry-pi-5", "--length", "16")
    found, shown = answer(*arguments), run(*arguments).output
    for text in (found["plan"], found["time_from"][:40], f"{found['steps']} steps", "of 8.0 GB"):
        assert text in shown


def _workload(bundle: Bundle, lengths: list[int], **options: Any) -> Workload:
    rows = [Example(line, list(range(3, 3 + n)), list(range(3, 3 + n))) for line, n in enumerate(lengths, 1)]
    return Workload(bundle.manifest, rows, [], request_of(TrainConfig(**options)))


def test_the_workload_knows_every_shape_of_the_run(bundle: Bundle) -> None:
    workload = _workload(bundle, [9, 30, 60, 17, 44, 8], batch_size=2, epochs=2)
    made = [[batch.input_ids.shape for batch in step] for step in workload.steps()]
    known = [[(shape.sequences, shape.length) for shape in step] for step in workload.step_shapes]
    assert made == known and len(made) == workload.schedule.total_steps == 6
    work = workload.work()
    sizes = {(b * t, b * t * t) for step in made for b, t in step}
    assert work.positions == max(positions for positions, _ in sizes)
    assert work.scores == max(scores for _, scores in sizes)
    assert len(work.others) == len(sizes) - 1


@pytest.mark.parametrize("steps", [256, 257])
def test_long_validation_rows_count_however_long_the_run_is(bundle: Bundle, steps: int) -> None:
    short, long = ([Example(1, [5] * count, [5] * count)] for count in (8, 40))
    config = TrainConfig(batch_size=1, steps=steps)
    work = Workload(bundle.manifest, short, long, request_of(config)).work()
    assert (work.positions, work.scores) == (40, 40**2)


def test_a_long_run_needs_no_more_than_its_longest_rows_together(bundle: Bundle) -> None:
    """Whatever batch size was asked for: no step has more rows than there are."""
    lengths = [9, 30, 60, 17, 44, 8]
    short, long = (_workload(bundle, lengths, batch_size=64, steps=steps).work() for steps in (256, 257))
    assert (long.positions, long.scores) == (short.positions, short.scores)
    few = _workload(bundle, [60, 8] * 40, batch_size=2, steps=257, shuffle=False).work()
    assert few.positions >= 120, "two long rows may meet in a later step"


def test_shapes_are_those_of_a_whole_epoch(bundle: Bundle, tmp_path: Path) -> None:
    data = tmp_path / "many.jsonl"
    data.write_text('{"prompt": "lamp", "completion": " on"}\n' * 600)
    found = answer("plan", bundle.path, "--device", "raspberry-pi-5", "--data", data, "--batch-size", "1")
    assert sum(shape["batches"] for shape in found["shapes"]) == 600


def test_a_cut_model_tells_what_the_whole_one_takes(bundle: Bundle) -> None:
    """The work that is extrapolated is the work of the layers that were left out."""
    workload = _workload(bundle, [32] * 4, batch_size=4, epochs=1)
    choice = choose(bundle.manifest, request_of(TrainConfig("onnxruntime")), workload.work())
    model = CostModel(bundle.manifest, choice.plan, choice.footprint)
    batches, layout = _typical(workload, model)
    found = time_steps(bundle, choice, batches)
    assert [work for work, _ in found.points] == [model.of(batch) for batch in batches]
    assert all(seconds > 0 for _, seconds in found.points) and layout >= 0
    assert found.took < 10


def test_every_layer_adds_its_work_for_every_shape(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape is measured with more layers; the others follow it, by their own work."""
    workload = _workload(bundle, [8, 24, 60], batch_size=1, epochs=1)
    choice = choose(bundle.manifest, request_of(TrainConfig("onnxruntime")), workload.work())
    cut = {layers: timing._cost_model(*timing._cut(bundle, choice, layers)) for layers in (1, 2)}
    parameters = len(bundle.manifest.lora.shapes()) // bundle.manifest.architecture.num_hidden_layers
    timed: list[tuple[int, int]] = []

    def work(session: LayeredSession, batch: Batch) -> float:
        layers = len(session.gradients()) // parameters
        timed.append((layers, batch.input_ids.shape[1]))
        return 1e-3 + cut[layers].of(batch) / 1e9

    monkeypatch.setattr(timing, "_timed", work)
    batches = [batch for step in workload.steps() for batch in step]
    found = time_steps(bundle, choice, batches)
    assert [seconds for _, seconds in found.points] == pytest.approx([1e-3 + work / 1e9 for work, _ in found.points])
    assert {length for layers, length in timed if layers == 1} == {8, 24, 64}
    assert {length for layers, length in timed if layers == 2} == {8}, "the one with the least work"


@pytest.mark.parametrize(("noise", "share"), [(0.0, 0.6), (100.0, 1.5)])
def test_noise_does_not_add_up_over_the_layers(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, noise: float, share: float
) -> None:
    """Where two of many layers are timed, and two seem to take no time at all, or very much."""
    lora, layers = bundle.manifest.lora, range(32)
    lowest = lora.of_layers([0]).slots
    slots = [replace(slot, name=slot.name.replace(".0.", f".{layer}.")) for layer in layers for slot in lowest]
    architecture = replace(bundle.manifest.architecture, num_hidden_layers=len(layers))
    manifest = replace(bundle.manifest, architecture=architecture, lora=replace(lora, slots=slots))
    deep = Bundle(bundle.path, manifest)
    workload = _workload(deep, [24], batch_size=1, epochs=1)
    choice = choose(deep.manifest, request_of(TrainConfig("onnxruntime")), workload.work())
    shallow = timing._cost_model(*timing._cut(deep, choice, 1))
    parameters = len(lora.shapes()) // bundle.manifest.architecture.num_hidden_layers

    def timed(session: LayeredSession, batch: Batch) -> float:
        return shallow.of(batch) / 1e9 * (1 if len(session.gradients()) == parameters else noise)

    monkeypatch.setattr(timing, "_timed", timed)
    monkeypatch.setattr(timing, "_AIM", 0.0)
    (batch,) = next(workload.steps())
    found, below = time_steps(deep, choice, [batch]), shallow.of(batch)
    work = CostModel(deep.manifest, choice.plan, choice.footprint).of(batch)
    assert found.seconds(work) == pytest.approx((below + share * (work - below)) / 1e9)


def test_batches_that_are_alike_are_measured_once(bundle: Bundle) -> None:
    """Where no shape costs a compilation."""
    workload = _workload(bundle, [56, 55, 24], batch_size=1, epochs=1, shuffle=False)
    choice = choose(bundle.manifest, request_of(TrainConfig("onnxruntime")), workload.work())
    batches = [batch for step in workload.steps() for batch in step]
    model = CostModel(bundle.manifest, choice.plan, choice.footprint)
    least, less, most = sorted(map(model.of, batches))
    assert least < 0.9 * less and 0.9 * most < less < most
    assert [work for work, _ in time_steps(bundle, choice, batches).points] == [least, less]


def test_as_many_layers_are_measured_as_there_is_time_for() -> None:
    usual, other = timing._Times(first=0.2, step=0.1), timing._Times(first=0.3, step=0.2)
    # The first step's 0.2 s more, and four steps of 0.1 s; each further layer 0.05 s a step.
    assert timing._depth(usual, [], 0.5, layers=12, left=0.2 + 0.4 + 5 * 0.2 + 0.1) == 6
    # And 0.3 s more, and two steps of 0.2 s; each further layer 0.1 s a step.
    assert timing._depth(usual, [other], 0.5, layers=12, left=0.5 + 0.8 + 3 * 0.4 + 0.1) == 4
    assert timing._depth(usual, [], 0.5, layers=12, left=60) == 12
    assert timing._depth(usual, [], 0.5, layers=12, left=-1) == 2


def test_a_short_row_tells_what_long_ones_take(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else is affordable; what streamed weights cost is no position's."""
    workload = _workload(bundle, [64] * 16, batch_size=16, epochs=1)
    choice = choose(bundle.manifest, request_of(TrainConfig("onnxruntime", plan="stream")), workload.work())
    monkeypatch.setattr(timing, "_SLOW", 1.0)
    monkeypatch.setattr(timing, "_AIM", 0.0)
    cut = {layers: timing._cost_model(*timing._cut(bundle, choice, layers)) for layers in (1, 2)}
    parameters = len(bundle.manifest.lora.shapes()) // bundle.manifest.architecture.num_hidden_layers

    def timed(session: LayeredSession, batch: Batch) -> float:
        return cut[len(session.gradients()) // parameters].of(batch) / 1e6

    monkeypatch.setattr(timing, "_timed", timed)
    (batch,) = next(workload.steps())
    work = CostModel(bundle.manifest, choice.plan, choice.footprint).of(batch)
    assert time_steps(bundle, choice, [batch]).seconds(work) == pytest.approx(work / 1e6, rel=0.3)


def test_between_measured_shapes_the_time_lies_on_a_line() -> None:
    found = Timing(((100.0, 1.0), (300.0, 2.0)), start=50.0)
    assert found.seconds(100) == 1 and found.seconds(300) == 2
    assert found.seconds(200) == pytest.approx(1.5)
    assert found.seconds(50) == pytest.approx(1 * 100 / 150)
    assert found.seconds(650) == pytest.approx(2 * 700 / 350)
