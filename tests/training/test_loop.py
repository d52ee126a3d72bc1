"""The training loop around a bigram model in numpy, from rows to the adapter folder."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from edgetune.config import TrainConfig
from edgetune.errors import (
    DataError,
    EdgetuneError,
    IncompatibleError,
    LockedError,
    UsageError,
    VerificationError,
)
from edgetune.evaluation import evaluate
from edgetune.formats.adapter import read_adapter, write_adapter
from edgetune.formats.bundle import Bundle, verify_files
from edgetune.formats.manifest import AdapterManifest
from edgetune.formats.manifest_json import read_manifest
from edgetune.formats.storage import locked, sha256_of
from edgetune.model.lora import Lora, initial_parameters
from edgetune.training import StartInfo, StepMetrics, TrainResult, train
from edgetune.training.record import RunRecord, memory_bytes, peak_memory_bytes
from support import bigram_runtime
from support.bigram_runtime import BigramSession
from support.recorder import Recorder, metrics
from support.tiny_bundle import BASE, LORA, MAX_LENGTH, SLOT, make_bundle, some_rows, write_rows

KEYS = [
    "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes", "seconds",
    "memory_bytes",
]  # fmt: skip
FAST = TrainConfig(learning_rate=0.5, schedule="constant", batch_size=4, epochs=3)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr("edgetune.runtimes.RUNTIMES", {"onnxruntime": "support.bigram_runtime"})
    monkeypatch.setattr(BigramSession, "break_at", 0)
    monkeypatch.setattr(BigramSession, "interrupt_at", 0)
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", some_rows(10))


def run(
    bundle: Bundle, data: Path, config: TrainConfig, *, valid: Path | None = None, output: str = "adapter"
) -> tuple[TrainResult, Recorder]:
    recorder = Recorder()
    return train(bundle.path, data, bundle.path.parent / output, config, valid=valid, observer=recorder), recorder


def read(bundle: Bundle, folder: Path) -> dict[str, np.ndarray]:
    manifest = bundle.manifest
    return read_adapter(folder, manifest.lora, manifest.base, manifest.tokenizer)


def options_of(folder: Path) -> dict[str, str]:
    return read_manifest((folder / "edgetune.json").read_bytes(), AdapterManifest, "edgetune.json").provenance


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"bundle", "train.jsonl", "valid.jsonl"}


def test_what_a_runtime_installs_is_a_notice(bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installing = replace(bigram_runtime.RUNTIME, install=lambda notice: notice("Installing …"))
    monkeypatch.setattr(bigram_runtime, "RUNTIME", installing)
    _, seen = run(bundle, data, FAST)
    assert "Installing …" in seen.notices


def test_a_validation_that_takes_long_says_how_far_it_is(
    bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.text.pulse.EVERY", 0.0)
    valid = write_rows(tmp_path / "valid.jsonl", some_rows(9))
    _, seen = run(bundle, data, FAST, valid=valid)
    assert "measured 9 of 9 validation rows" in seen.notices


def test_a_run_learns_and_leaves_a_sealed_adapter(bundle: Bundle, data: Path) -> None:
    result, seen = run(bundle, data, TrainConfig(learning_rate=0.5, schedule="constant", epochs=20))
    assert {path.name for path in result.path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "edgetune.json",
        "metrics.jsonl",
    }
    manifest = read_manifest((result.path / "edgetune.json").read_bytes(), AdapterManifest, "")
    verify_files(result.path, manifest.files)
    assert {entry.path for entry in manifest.files} == {path.name for path in result.path.iterdir()} - {"edgetune.json"}
    assert (manifest.base, manifest.lora) == (BASE, LORA)
    assert "stopped" not in manifest.provenance
    finished = datetime.fromisoformat(manifest.provenance["finished"])
    assert timedelta() <= datetime.now(UTC) - finished < timedelta(minutes=10)
    assert platform.machine() in manifest.provenance["machine"].replace("arm64", "aarch64")
    for name, value in read(bundle, result.path).items():
        np.testing.assert_array_equal(value, BigramSession.opened.parameters[name])
    assert result.steps == 60  # 20 epochs of 3 batches
    assert result.final_loss == seen.steps[-1].loss < 0.5 * seen.steps[0].loss
    assert (result.first_validation_loss, result.last_validation_loss) == (None, None)


def test_metrics_have_a_line_a_step(bundle: Bundle, data: Path) -> None:
    result, seen = run(bundle, data, TrainConfig(steps=4, warmup_steps=1, schedule="linear", learning_rate=0.3))
    lines = metrics(result.path)
    assert [list(line) for line in lines] == [KEYS] * 4
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.0, 0.3, 0.2, 0.1])
    assert [line["learning_rate"] for line in lines] == BigramSession.opened.rates
    assert [line["loss"] for line in lines] == [step.loss for step in seen.steps]
    seconds = [line["seconds"] for line in lines]
    assert seconds[0] > 0 and seconds == sorted(seconds) and seconds[-1] <= result.seconds
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 1e6 for line in lines)
    assert sum(line["tokens"] for line in lines[:3]) == seen.starts[0].tokens_per_epoch
    assert seen.steps[-1].eta_seconds == 0 < seen.steps[0].eta_seconds


def test_the_start_says_what_is_trained(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    valid = write_rows(tmp_path / "valid.jsonl", some_rows(3, seed=1))
    _, seen = run(bundle, data, FAST, valid=valid)
    rows = some_rows(10)
    words = sum(len(row["completion"].split()) + 1 for row in rows)
    assert seen.starts == [
        StartInfo(
            runtime="onnxruntime",  # what `auto` stands for
            plan="whole step",
            batch_size=4,
            pass_rows=4,
            predicted_peak_memory_bytes=None,
            steps=9,
            steps_per_epoch=3,
            rows=10,
            rows_left_out=0,
            rows_truncated=0,
            validation_rows=3,
            tokens_per_epoch=words + len(rows),  # and an end of sequence each
            trained_tokens_per_epoch=words,  # but for the prompt's one word
            trainable_parameters=2 * 4 * 16,
            learning_rate=0.5,
            first_step=1,
            saved="about every 0.3 s",
        )
    ]
    assert seen.notices == []


def test_every_row_is_taken_once_an_epoch(bundle: Bundle, data: Path) -> None:
    run(bundle, data, TrainConfig(batch_size=2, gradient_accumulation_steps=2, epochs=2))
    session = BigramSession.opened
    assert session.passes == [2, 2, 1, 2, 2, 1]
    unpadded = [tuple(token for token in row if token) for row in session.rows]
    first, second = unpadded[:10], unpadded[10:]
    assert Counter(first) == Counter(second)
    assert sum(Counter(first).values()) == 10
    assert first != second  # a new order every epoch


@pytest.mark.own
def test_accumulated_batches_are_one_batch(bundle: Bundle, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", some_rows(8))
    whole, _ = run(bundle, data, TrainConfig(batch_size=4, shuffle=False, learning_rate=0.5, epochs=3), output="whole")
    split = TrainConfig(batch_size=1, gradient_accumulation_steps=4, shuffle=False, learning_rate=0.5, epochs=3)
    pieces, _ = run(bundle, data, split, output="pieces")
    assert whole.steps == pieces.steps == 6
    for name, value in read(bundle, whole.path).items():
        np.testing.assert_allclose(value, read(bundle, pieces.path)[name], rtol=1e-5, atol=1e-7)
    left, right = metrics(whole.path), metrics(pieces.path)
    assert [line["loss"] for line in left] == pytest.approx([line["loss"] for line in right], rel=1e-5)
    assert [line["tokens"] for line in left] == [line["tokens"] for line in right]


@pytest.mark.own
def test_packed_rows_train_as_padded_ones(bundle: Bundle, tmp_path: Path) -> None:
    longest = {"prompt": "a", "completion": " b" * (MAX_LENGTH - 2)}
    data = write_rows(tmp_path / "train.jsonl", [*some_rows(23), longest])
    valid = write_rows(tmp_path / "valid.jsonl", some_rows(9, seed=1))
    config = TrainConfig(batch_size=8, gradient_accumulation_steps=2, learning_rate=0.5, epochs=2)
    packed, _ = run(bundle, data, config, valid=valid, output="packed")
    passes = BigramSession.opened.passes
    padded, _ = run(bundle, data, replace(config, packing=False), valid=valid, output="padded")
    assert sum(passes) < sum(BigramSession.opened.passes)
    assert json.loads(options_of(packed.path)["options"])["packing"] is True
    for name, value in read(bundle, packed.path).items():
        np.testing.assert_allclose(value, read(bundle, padded.path)[name], rtol=1e-5, atol=1e-7)
    left, right = metrics(packed.path), metrics(padded.path)
    for key in ("loss", "grad_norm", "tokens"):
        assert [line[key] for line in left] == pytest.approx([line[key] for line in right], rel=1e-5)
    assert packed.last_validation_loss == pytest.approx(padded.last_validation_loss, rel=1e-5)


class Deleting(Recorder):
    """Deletes the validation rows while the run goes on."""

    def on_validation(self, step: int, loss: float) -> None:
        for rows in Path.cwd().rglob("valid.jsonl"):
            rows.unlink()


def test_validation_rows_may_go_during_the_run_and_only_their_name_is_told(
    bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private").mkdir()
    monkeypatch.chdir(tmp_path / "private")
    valid = write_rows(Path("valid.jsonl"), some_rows(3, seed=1))
    digest = sha256_of(valid)
    output = tmp_path / "elsewhere" / "adapter"
    train(bundle.path, data, output, FAST, valid=valid, observer=Deleting())
    text = (output / "edgetune.json").read_text()
    provenance = json.loads(text)["provenance"]
    assert (provenance["validation_data"], provenance["validation_data_sha256"]) == ("valid.jsonl", digest)
    assert "private" not in text


@pytest.mark.own
def test_validation_is_what_evaluate_measures(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    valid = write_rows(tmp_path / "valid.jsonl", some_rows(7, seed=3))
    # 7 rows of different lengths in batches of 2: a mean of batch means would be another number.
    config = TrainConfig(learning_rate=0.5, schedule="constant", batch_size=2, epochs=3)
    result, seen = run(bundle, data, config, valid=valid)
    assert [step for step, _ in seen.validations] == [0, 5, 10, 15]
    losses = [loss for _, loss in seen.validations]
    assert (result.first_validation_loss, result.last_validation_loss) == (losses[0], losses[-1])
    assert losses[-1] < losses[0] - 0.2
    assert losses[0] == pytest.approx(evaluate(bundle.path, valid).loss, rel=1e-5)
    assert losses[-1] == pytest.approx(evaluate(bundle.path, valid, adapter=result.path).loss, rel=1e-5)
    lines = metrics(result.path)
    assert lines[0]["initial_validation_loss"] == losses[0]
    assert {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line} == {
        5: losses[1],
        10: losses[2],
        15: losses[3],
    }
    assert sum("initial_validation_loss" in line for line in lines) == 1


def test_the_seed_decides_everything(bundle: Bundle, data: Path) -> None:
    def weights(output: str, seed: int) -> bytes:
        result, _ = run(bundle, data, TrainConfig(steps=3, learning_rate=0.5, seed=seed), output=output)
        return (result.path / "adapter_model.safetensors").read_bytes()

    first = weights("first", 5)
    assert weights("again", 5) == first
    assert weights("other", 6) != first


def test_a_fresh_adapter_starts_as_peft_does(bundle: Bundle, data: Path) -> None:
    run(bundle, data, TrainConfig(steps=1, seed=11))
    first = BigramSession.opened.first
    assert list(first) == list(LORA.shapes())
    np.testing.assert_array_equal(first[SLOT.b], 0)
    bound = 1 / math.sqrt(SLOT.in_features)
    assert 0.8 * bound < np.abs(first[SLOT.a]).max() <= bound
    np.testing.assert_array_equal(first[SLOT.a], initial_parameters(LORA, 11)[SLOT.a])


def test_training_goes_on_from_an_adapter(bundle: Bundle, data: Path) -> None:
    first, _ = run(bundle, data, FAST, output="first")
    start = read(bundle, first.path)
    second, _ = run(bundle, data, TrainConfig(steps=2, init_adapter=first.path), output="second")
    for name, value in BigramSession.opened.first.items():
        np.testing.assert_array_equal(value, start[name])
    assert metrics(second.path)[0]["loss"] < metrics(first.path)[0]["loss"]
    assert options_of(second.path)["init_adapter"] == "first"
    assert str(bundle.path.parent) not in json.dumps(options_of(second.path))


def test_optimizer_options_reach_the_runtime(bundle: Bundle, data: Path) -> None:
    run(bundle, data, TrainConfig(steps=1, weight_decay=0.25, max_grad_norm=0.0))
    optimizer = BigramSession.opened.optimizer
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.25, 0.0)


def test_a_step_that_is_not_finite_keeps_the_last_good_state(
    bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, _ = run(bundle, data, TrainConfig(steps=2, learning_rate=0.5, schedule="constant"), output="good")
    monkeypatch.setattr(BigramSession, "break_at", 3)
    with pytest.raises(EdgetuneError, match=r"loss of step 3 is not finite.*after step 2; try a lower") as caught:
        run(bundle, data, TrainConfig(steps=8, learning_rate=0.5, schedule="constant"))
    assert type(caught.value) is EdgetuneError
    stopped = bundle.path.parent / "adapter"
    for name, value in read(bundle, good.path).items():
        np.testing.assert_array_equal(value, read(bundle, stopped)[name])
    assert len(metrics(stopped)) == 2
    provenance = options_of(stopped)
    assert provenance["stopped"].startswith("the loss of step 3 is not finite")
    assert provenance["steps"] == "2"


def test_a_first_step_that_is_not_finite_leaves_nothing(
    bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BigramSession, "break_at", 1)
    with pytest.raises(EdgetuneError, match="nothing was learnt, so nothing is written"):
        run(bundle, data, FAST)
    assert left_in(bundle.path.parent) == set()


def test_an_interrupted_run_leaves_nothing(bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BigramSession, "interrupt_at", 3)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, data, FAST)
    assert left_in(bundle.path.parent) == set()


def test_force_replaces_an_adapter_and_nothing_else(bundle: Bundle, data: Path) -> None:
    first, _ = run(bundle, data, TrainConfig(steps=1, learning_rate=0.5))
    with pytest.raises(UsageError, match="already exists"):
        run(bundle, data, TrainConfig(steps=2))
    assert len(metrics(first.path)) == 1
    second, _ = run(bundle, data, TrainConfig(steps=2, force=True))
    assert second.path == first.path
    assert len(metrics(second.path)) == 2
    for output in ("bundle", "train.jsonl"):
        with pytest.raises(UsageError, match=r"is not replaced|no folder replaces it"):
            run(bundle, data, TrainConfig(steps=1, force=True), output=output)
    assert (bundle.path / "manifest.json").is_file()


def test_a_failed_run_with_force_keeps_the_old_adapter(
    bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = run(bundle, data, TrainConfig(steps=2, learning_rate=0.5))
    before = {path.name: path.read_bytes() for path in first.path.iterdir()}
    monkeypatch.setattr(BigramSession, "interrupt_at", 2)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, data, TrainConfig(steps=3, force=True))
    assert {path.name: path.read_bytes() for path in first.path.iterdir()} == before


@pytest.fixture
def unloadable(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    def refuse(*_: object) -> None:
        raise AssertionError("the model was loaded before the input was refused")

    monkeypatch.setattr(bigram_runtime, "RUNTIME", replace(bigram_runtime.RUNTIME, open_session=refuse))
    return bundle


def test_the_watch_on_loading_works(unloadable: Bundle, data: Path) -> None:
    with pytest.raises(AssertionError, match="was loaded"):
        run(unloadable, data, FAST)


def test_options_rows_and_output_are_refused_before_loading(unloadable: Bundle, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="batch_size is 0"):
        run(unloadable, data, TrainConfig(batch_size=0))
    with pytest.raises(UsageError, match="warmup_steps is 9"):
        run(unloadable, data, TrainConfig(warmup_steps=9, epochs=3))
    with pytest.raises(UsageError, match=r"runtime is 'cuda', expected one of auto"):
        run(unloadable, data, TrainConfig(runtime="cuda"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"absent\.jsonl"):
        run(unloadable, tmp_path / "absent.jsonl", FAST)
    broken = tmp_path / "valid.jsonl"
    broken.write_text('{"text": "a b"}\n{"text": \n')
    with pytest.raises(DataError, match=r"valid\.jsonl:2"):
        run(unloadable, data, FAST, valid=broken)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        run(unloadable, data, FAST, output="there")
    with locked(tmp_path / "adapter"), pytest.raises(LockedError):
        run(unloadable, data, FAST)
    assert left_in(tmp_path) == {"there"}


def test_a_changed_bundle_is_refused_before_loading(unloadable: Bundle, data: Path) -> None:
    graph = unloadable.path / "loss.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(VerificationError, match=r"loss\.onnx was changed"):
        run(unloadable, data, FAST)


def test_an_adapter_that_does_not_fit_is_refused_before_loading(unloadable: Bundle, data: Path, tmp_path: Path) -> None:
    other = Lora(6, 8.0, LORA.target_modules, LORA.slots)
    (tmp_path / "other").mkdir()
    write_adapter(
        tmp_path / "other",
        base=BASE,
        tokenizer=unloadable.manifest.tokenizer,
        lora=other,
        parameters=initial_parameters(other, 0),
        provenance={},
    )
    with pytest.raises(IncompatibleError, match=r"needs rank 6 .* the bundle has 4"):
        run(unloadable, data, TrainConfig(init_adapter=tmp_path / "other"))


def test_long_rows_are_counted(bundle: Bundle, tmp_path: Path) -> None:
    rows = [*some_rows(3), {"prompt": "a", "completion": " b" * MAX_LENGTH}]
    data = write_rows(tmp_path / "train.jsonl", rows)
    _, seen = run(bundle, data, TrainConfig(steps=1), output="left")
    assert (seen.starts[0].rows, seen.starts[0].rows_left_out, seen.starts[0].rows_truncated) == (3, 1, 0)
    assert len(seen.notices) == 1
    assert "1 of 4 rows are longer than 12 tokens and were left out; --truncate" in seen.notices[0]
    _, seen = run(bundle, data, TrainConfig(steps=1, truncate=True), output="cut")
    assert (seen.starts[0].rows, seen.starts[0].rows_left_out, seen.starts[0].rows_truncated) == (4, 0, 1)
    assert "1 of 4 rows are longer than 12 tokens and were cut" in seen.notices[0]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    step = StepMetrics(1, float("nan"), 0.1, float("inf"), 7, 3.5, None, 0.0)
    with RunRecord(tmp_path, print) as record:
        record.write(step, validation_loss=float("inf"))
        assert metrics(tmp_path) == [
            {
                "step": 1,
                "loss": None,
                "learning_rate": 0.1,
                "grad_norm": None,
                "tokens": 7,
                "tokens_per_second": 3.5,
                "peak_memory_bytes": None,
                "seconds": 0.0,
                "memory_bytes": None,
                "validation_loss": None,
            }
        ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what is resident now")
def test_memory_now_falls_when_it_is_given_back_and_its_peak_stays() -> None:
    size = 64 << 20
    before = memory_bytes()
    held = mmap(-1, size)  # not an array: what the allocator gives back, and when, is its own affair
    held[::4096] = bytes(size // 4096)  # a byte of each page
    full, peak = memory_bytes(), peak_memory_bytes()
    held.close()
    after = memory_bytes()
    assert before is not None and full is not None and after is not None and peak is not None
    assert full - before > 0.9 * size
    assert full - after > 0.9 * size
    assert peak >= full


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a running child")
def test_peak_memory_counts_a_running_child() -> None:
    size = 64 << 20
    alone = peak_memory_bytes()
    assert alone is not None
    program = f"data = b'x' * {size}; print(len(data), flush=True); input()"
    children: list[subprocess.Popen[str]] = []

    def start() -> None:
        children.append(
            subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )

    # From a thread that goes on living, as a runtime may do it.
    done = threading.Event()
    thread = threading.Thread(target=lambda: (start(), done.wait()))
    thread.start()
    try:
        while not children:
            thread.join(0.01)
        with children[0] as child:
            assert child.stdout is not None
            assert child.stdin is not None
            assert int(child.stdout.readline()) == size
            both = peak_memory_bytes()
            child.stdin.write("\n")
            child.stdin.flush()
    finally:
        done.set()
        thread.join()
    assert both is not None
    assert size < both - alone < size + (64 << 20)


def test_what_is_said_of_the_rows_comes_before_what_is_wrong_with_the_others(
    bundle: Bundle, data: Path, tmp_path: Path
) -> None:
    long = write_rows(tmp_path / "long.jsonl", [*some_rows(2), {"prompt": "a", "completion": "b " * (2 * MAX_LENGTH)}])
    broken = tmp_path / "valid.jsonl"
    broken.write_text('{"text": \n')
    recorder = Recorder()
    with pytest.raises(DataError):
        train(bundle.path, long, tmp_path / "adapter", FAST, valid=broken, observer=recorder)
    assert any("1 of 3 rows are longer" in notice for notice in recorder.notices)
