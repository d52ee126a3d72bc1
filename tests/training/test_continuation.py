"""A run that goes on ends like one that was never interrupted, on the real runtimes; another run is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgetune.config import TrainConfig
from edgetune.errors import DataError, EdgetuneError, IncompatibleError, PausedRunError, UsageError
from edgetune.preview import preview
from edgetune.runtimes.layered.cached_states import FILE
from edgetune.training import train
from edgetune.training.observer import SilentObserver, StartInfo, StepMetrics
from edgetune.training.saved_run import SavedRun
from support.bigram_runtime import BigramSession
from support.golden import BUNDLE, TRAIN, VALID
from support.prepared_bundles import Prepared
from support.recorder import Recorder, metrics
from support.tiny_bundle import make_bundle, some_rows, write_rows

WEIGHTS = "adapter_model.safetensors"
STEPS = 12
BASE = TrainConfig(runtime="onnxruntime", steps=STEPS, batch_size=2, learning_rate=1e-2, save_steps=1)
RUNS: dict[str, dict[str, Any]] = {
    # This one is cut off at every step, the others at some.
    "layered": {},
    "whole": {"plan": "whole"},
    "int8": {"precision": "int8"},
    "8-bit states": {"optimizer_states": "8bit", "weight_decay": 0.1, "lora_plus_ratio": 4.0},
    "openvino": {"runtime": "openvino"},
    "accumulation": {"gradient_accumulation_steps": 3, "packing": False},
    "several passes": {"plan": "recompute", "batch_size": 8},
    "validation": {"eval_steps": 5, "keep_best": True},
    "forward-only": {"method": "forward-only", "queries": 4, "learning_rate": 1e-3},
    "chosen rate": {"learning_rate": "auto"},
}


class Killed(BaseException):
    """The process is gone: nothing else is saved."""


class KillAfter(SilentObserver):
    """Ends the process after a step, before its state is saved."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == self._step:
            raise Killed


class Both(SilentObserver):
    """Tells two observers how a run begins and what its steps are."""

    def __init__(self, first: Recorder, second: SilentObserver) -> None:
        self._observers = (first, second)

    def on_start(self, info: StartInfo) -> None:
        for observer in self._observers:
            observer.on_start(info)

    def on_step(self, metrics: StepMetrics) -> None:
        for observer in self._observers:
            observer.on_step(metrics)


def learn(output: Path, config: TrainConfig, observer: Any = None, data: Path = TRAIN) -> None:
    measured = config.eval_steps is not None or config.keep_best or config.patience is not None
    train(BUNDLE, data, output, config, valid=VALID if measured else None, observer=observer)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_that_is_cut_off_ends_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    config = replace(BASE, **options)
    learn(tmp_path / "whole", config)
    expected = (tmp_path / "whole" / WEIGHTS).read_bytes()
    losses = [line["loss"] for line in metrics(tmp_path / "whole")]
    for step in range(1, STEPS + 1) if not options else (1, 6, STEPS):
        output = tmp_path / f"cut{step}"
        with pytest.raises(Killed):
            learn(output, config, KillAfter(step))
        seen = Recorder()
        learn(output, replace(config, resume=True), seen)
        assert seen.starts[0].first_step == step, "the step that was not saved is done again"
        assert (output / WEIGHTS).read_bytes() == expected, f"cut off after step {step}"
        assert [line["loss"] for line in metrics(output)] == losses
        assert not SavedRun(output).folder.exists()


def test_long_and_short_rows_of_longrope_go_on_the_same(tmp_path: Path, prepared: Prepared) -> None:
    """Groups with a row of more than 64 tokens have other factors, and passes of their own."""
    words = (4, 30, 6, 9, 28, 5, 12, 7)
    texts = [" ".join(f"w{7 * row + word}" for word in range(count)) for row, count in enumerate(words)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bundle, config = prepared("longrope", "int4"), replace(BASE, gradient_accumulation_steps=2, steps=6)
    lengths = [len(row.input_ids) for row in preview(bundle.path, data)]
    assert min(lengths) < 64 < max(lengths)
    train(bundle, data, tmp_path / "whole", config)
    expected = (tmp_path / "whole" / WEIGHTS).read_bytes()
    for step in (1, 4):
        output = tmp_path / f"cut{step}"
        with pytest.raises(Killed):
            train(bundle, data, output, config, observer=KillAfter(step))
        train(bundle, data, output, replace(config, resume=True))
        assert (output / WEIGHTS).read_bytes() == expected, f"cut off after step {step}"


LOWER: dict[str, dict[str, Any]] = {
    "all": {},
    "room for half": {"lower_layers_cache": "20kB"},
    "openvino": {"runtime": "openvino", "packing": False},
    "gradient": {"init": "gradient", "eval_steps": 3},
}


@pytest.mark.parametrize("options", LOWER.values(), ids=LOWER)
def test_what_enters_the_trained_layers_may_be_lost(tmp_path: Path, options: dict[str, Any]) -> None:
    """Whatever became of its file, what is learnt is the same."""
    config = replace(BASE, layers="1", epochs=3, steps=None, **options)
    seen = Recorder()
    learn(tmp_path / "whole", config, seen)
    share = "" if "lower_layers_cache" not in options else " for 60% of the rows"
    assert seen.starts[0].kept.startswith(f"what enters layer 1 kept on disk{share} (")
    assert not SavedRun(tmp_path / "whole").folder.exists()
    expected = (tmp_path / "whole" / WEIGHTS).read_bytes()
    epoch, total = seen.starts[0].steps_per_epoch, seen.starts[0].steps
    assert total == 3 * epoch
    cuts = [(epoch // 2, "torn"), (epoch + 2, "torn"), (epoch + 2, "lost"), (total - 1, "there")]
    for step, fate in cuts if config.runtime == "onnxruntime" else cuts[2:3]:
        output = tmp_path / f"{fate}{step}"
        with pytest.raises(Killed):
            learn(output, config, KillAfter(step))
        file = SavedRun(output).folder / FILE
        size = file.stat().st_size
        if fate == "torn":
            os.truncate(file, size * 2 // 3)
        elif fate == "lost":
            file.unlink()
        learn(output, replace(config, resume=True))
        assert (output / WEIGHTS).read_bytes() == expected, f"{fate} after step {step}"


def test_a_run_that_goes_on_finds_the_lost_rows_again(tmp_path: Path) -> None:
    """In the order in which they came, so that the same ones have room."""
    config, output = replace(BASE, layers="1", epochs=3, steps=None, eval_steps=4), tmp_path / "adapter"
    with pytest.raises(Killed):
        learn(output, config, KillAfter(6))
    file = SavedRun(output).folder / FILE
    before = file.read_bytes()
    file.unlink()
    with pytest.raises(Killed):
        learn(output, replace(config, resume=True), KillAfter(6))
    assert file.read_bytes() == before


def test_what_a_run_keeps_goes_with_it(tmp_path: Path) -> None:
    config = replace(BASE, layers="1", epochs=2, steps=None)
    output = tmp_path / "adapter"
    with pytest.raises(Killed):
        learn(output, replace(config, save_steps=0), KillAfter(5))
    assert not SavedRun(output).folder.exists(), "there is no state to go on from"
    with pytest.raises(Killed):
        learn(output, config, KillAfter(5))
    assert (SavedRun(output).folder / FILE).stat().st_size
    learn(output, replace(config, force=True, keep_state=True))
    assert (SavedRun(output).folder / FILE).stat().st_size, "a run that goes further needs it"


def test_ort_training_goes_on_to_the_last_digits(tmp_path: Path) -> None:
    """Two undisturbed runs of it differ by 4e-8; without the moments, a run that goes on differs by 1e-2."""
    config = replace(BASE, runtime="ort-training")
    learn(tmp_path / "whole", config)
    with pytest.raises(Killed):
        learn(tmp_path / "cut", config, KillAfter(6))
    learn(tmp_path / "cut", replace(config, resume=True))
    expected, found = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "cut"))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6, err_msg=name)


def test_a_run_without_a_state_starts_over(tmp_path: Path) -> None:
    learn(tmp_path / "whole", BASE)
    with pytest.raises(Killed):
        learn(tmp_path / "adapter", replace(BASE, save_steps=0), KillAfter(5))
    learn(tmp_path / "adapter", replace(BASE, resume=True))
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_an_unfinished_run_is_told(tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(Killed):
        learn(output, BASE, KillAfter(5))
    with pytest.raises(UsageError, match=r"state of step 4 in .*add --resume to go on with it, or --force"):
        learn(output, BASE)
    learn(output, replace(BASE, force=True))
    assert len(metrics(output)) == STEPS


def test_a_mistake_does_not_cost_the_unfinished_run(tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(Killed):
        learn(output, BASE, KillAfter(5))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no row\n")
    with pytest.raises(DataError):
        learn(output, replace(BASE, force=True), data=broken)
    assert SavedRun(output).steps() == 4


def test_all_that_changed_is_named_at_once(tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(Killed):
        learn(output, BASE, KillAfter(5))
    other = tmp_path / "rows.jsonl"
    other.write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(IncompatibleError) as caught:
        learn(output, replace(BASE, resume=True, learning_rate=3e-3, batch_size=4, plan="whole", steps=3), data=other)
    for part in ("training rows:", "--learning-rate: 0.01 then, 0.003 now", "--batch-size: 2 then, 4 now",
                 "the plan:", "done 4 steps, and is now to end after 3", "--force"):  # fmt: skip
        assert part in str(caught.value)
    assert not output.exists() and SavedRun(output).steps() == 4, "nothing is lost"


def test_states_in_8_bits_are_not_taken_for_others(tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(Killed):
        learn(output, replace(BASE, optimizer_states="8bit"), KillAfter(3))
    with pytest.raises(IncompatibleError) as caught:
        learn(output, replace(BASE, resume=True, optimizer_states="32bit"))
    for part in ("the plan: ", ", 8-bit optimizer states then, ", "--optimizer-states: 8bit then, 32bit now"):
        assert part in str(caught.value)


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    constant = replace(BASE, schedule="constant")
    learn(tmp_path / "long", constant)
    output = tmp_path / "adapter"
    learn(output, replace(constant, steps=5, keep_state=True))
    seen = Recorder()
    learn(output, replace(constant, resume=True), seen)
    assert any("goes to step 12 instead of 5" in notice for notice in seen.notices)
    assert (output / WEIGHTS).read_bytes() == (tmp_path / "long" / WEIGHTS).read_bytes()


def test_a_run_that_goes_on_keeps_the_learning_rate_that_it_chose(tmp_path: Path) -> None:
    output, chosen = tmp_path / "adapter", replace(BASE, learning_rate="auto", schedule="constant")
    learn(output, replace(chosen, steps=5, keep_state=True))
    (rate,) = {line["learning_rate"] for line in metrics(output)}
    # So many more steps would have another rate by themselves.
    more, seen = replace(chosen, steps=1000, resume=True), Recorder()
    with pytest.raises(Killed):
        learn(output, more, Both(seen, KillAfter(7)))
    assert seen.starts[0].learning_rate == rate == seen.steps[-1].learning_rate
    fresh = Recorder()
    with pytest.raises(Killed):
        learn(tmp_path / "fresh", replace(more, resume=False), Both(fresh, KillAfter(1)))
    assert fresh.starts[0].learning_rate < rate


def test_a_run_that_was_given_a_rate_keeps_it_where_nothing_is_said_of_it(tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(Killed):
        learn(output, BASE, KillAfter(5))
    seen = Recorder()
    learn(output, replace(BASE, learning_rate="auto", resume=True), seen)
    assert seen.starts[0].learning_rate == BASE.learning_rate
    options = json.loads(json.loads((output / "edgetune.json").read_text())["provenance"]["options"])
    assert options["learning_rate"] == BASE.learning_rate


def test_a_step_that_is_not_finite_goes_on_with_another_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.runtimes.RUNTIMES", {"onnxruntime": "support.bigram_runtime"})
    bundle = make_bundle(tmp_path / "bundle")
    data, output = write_rows(tmp_path / "train.jsonl", some_rows(10)), tmp_path / "adapter"
    monkeypatch.setattr(BigramSession, "break_at", 4)
    with pytest.raises(EdgetuneError, match="with --resume the run goes on from there"):
        train(bundle, data, output, TrainConfig(learning_rate=0.5, steps=6))
    assert len(metrics(output)) == 3
    monkeypatch.setattr(BigramSession, "break_at", 0)
    with pytest.raises(IncompatibleError, match="--batch-size"):
        train(bundle, data, output, TrainConfig(learning_rate=0.1, steps=6, batch_size=2, resume=True))
    train(bundle, data, output, TrainConfig(learning_rate=0.1, steps=6, resume=True))
    assert len(BigramSession.opened.rates) == 3 and max(BigramSession.opened.rates) < 0.1
    assert len(metrics(output)) == 6 and not SavedRun(output).folder.exists()


def test_a_time_budget_and_a_pause_file_pause(tmp_path: Path) -> None:
    learn(tmp_path / "whole", BASE)
    output, pause = tmp_path / "adapter", tmp_path / "pause"
    with pytest.raises(PausedRunError, match=r"--time-budget after step \d+ of 12; the same command and --resume"):
        learn(output, replace(BASE, time_budget="0.000001s"), KillAfter(99))
    pause.touch()
    with pytest.raises(PausedRunError, match="is there after step"):
        learn(output, replace(BASE, pause_file=pause, resume=True))
    pause.unlink()
    learn(output, replace(BASE, pause_file=pause, resume=True))
    assert (output / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
