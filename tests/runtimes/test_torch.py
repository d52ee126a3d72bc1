"""The torch runtime computes what the graphs do, alone and in several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgetune.cli.failures import exit_code_of
from edgetune.config import Base, Sharding, TrainConfig
from edgetune.data.batcher import Batcher
from edgetune.data.batches import Batch
from edgetune.data.stored_examples import longest
from edgetune.errors import IncompatibleError, MissingDependencyError, UsageError
from edgetune.formats.bundle import Bundle
from edgetune.runtimes import find_runtime
from edgetune.runtimes.contract import OptimizerConfig, StepResult
from edgetune.runtimes.execution import WholePlan
from support.golden import GOLDEN
from support.prepared_bundles import Prepared
from support.random_rows import lengths_of, prompted_rows, rows_of
from support.repository import ROOT
from support.run_requests import request_of
from support.tiny_phi3 import VARIANTS
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of
from support.torch_processes import ENVIRONMENT, train_golden

EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


def steps_with(
    runtime: str, bundle: Bundle, steps: Sequence[Sequence[Batch]], optimizer: OptimizerConfig = OPTIMIZER
) -> tuple[list[StepResult], dict[str, np.ndarray], float]:
    """What steps give, the adapter after them, and the loss of the first batch then."""
    opened = find_runtime(runtime).open_session(bundle, adapter_of(bundle), optimizer, WholePlan())
    with opened as session:
        results = [session.step(batches, LEARNING_RATE) for batches in steps]
        adapter = {name: np.array(value) for name, value in session.adapter().items()}
        return results, adapter, session.evaluate(steps[0][0])


def assert_same_steps(bundle: Bundle, steps: Sequence[Sequence[Batch]]) -> None:
    found, expected = (steps_with(runtime, bundle, steps) for runtime in ("torch", "onnxruntime"))
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert mine.applied
        assert mine.loss == pytest.approx(theirs.loss, rel=2e-6)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-5)
    assert found[2] == pytest.approx(expected[2], rel=2e-6)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        # AdamW's first steps turn on the sign of elements, whatever their size: those near zero may go either way.
        far = np.abs(found[1][name] - value) > 2e-5
        assert far.mean() < 2e-3, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["int4", "fp32"])
def test_a_step_is_that_of_the_graphs(prepared: Prepared, variant: str, base: Base) -> None:
    bundle = prepared(variant, base)
    steps = [[batch_of(bundle, rows_of(seed, lengths_of(variant, seed)))] for seed in (0, 1)]
    assert_same_steps(bundle, steps)


@pytest.mark.parametrize("base", ["int4", "fp32"])
def test_magnitudes_are_trained_as_by_the_graphs(with_dora: Prepared, base: Base) -> None:
    bundle = with_dora("grouped-query", base)
    steps = [[batch_of(bundle, rows_of(seed, [9, 24, 13]))] for seed in (0, 1, 2)]
    assert_same_steps(bundle, steps)


def test_packed_rows_and_common_prefixes_are_as_in_the_graphs(prepared: Prepared) -> None:
    bundle = prepared("grouped-query", "int4")
    rows = prompted_rows([40, 30, 12, 9, 33])
    start = rows[0].input_ids[:10]
    shared = [type(row)(row.line, [*start, *row.input_ids], [-100] * 10 + list(row.labels)) for row in rows]
    batches = Batcher(bundle.manifest, longest(shared), 3, packing=True).step([shared])
    assert any(loan.tokens for batch in batches for loan in batch.borrowed)
    assert_same_steps(bundle, [batches])


def test_the_golden_run_is_pytorchs_own(tmp_path: Path) -> None:
    """The losses and norms that transformers and PEFT gave."""
    done = train_golden(tmp_path / "adapter", 1, "--valid", str(GOLDEN / "valid.jsonl"))
    assert done.losses == pytest.approx(EXPECTED["losses"], abs=2e-5)
    norms = [step["grad_norm"] for step in done.metrics]
    assert norms == pytest.approx(EXPECTED["grad_norms"], rel=1e-4)


def test_a_session_goes_on_where_another_was(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "int4")
    batches = [[batch_of(bundle, rows_of(seed, [9, 14]))] for seed in range(4)]
    opened = find_runtime("torch").open_session
    with opened(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session:
        for each in batches[:2]:
            session.step(each, LEARNING_RATE)
        state = {name: np.array(value) for name, value in session.state().items()}
        for each in batches[2:]:
            session.step(each, LEARNING_RATE)
        expected = {name: np.array(value) for name, value in session.adapter().items()}
    with opened(bundle, adapter_of(bundle), OPTIMIZER, WholePlan()) as session:
        session.restore(state)
        for each in batches[2:]:
            session.step(each, LEARNING_RATE)
        for name, value in session.adapter().items():
            np.testing.assert_array_equal(value, expected[name], name)


def test_what_is_not_finite_changes_nothing(prepared: Prepared) -> None:
    bundle = prepared("multi-head", "fp32")
    broken = adapter_of(bundle)
    first = next(iter(broken))
    broken[first][0, 0] = np.inf
    with find_runtime("torch").open_session(bundle, broken, OPTIMIZER, WholePlan()) as session:
        assert not session.step([batch_of(bundle, rows_of(0, [9]))], LEARNING_RATE).applied
        for name, value in session.adapter().items():
            np.testing.assert_array_equal(value, broken[name], name)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_only_one_of_them_speaks(tmp_path: Path, sharding: Sharding) -> None:
    """Steps of three rows are uneven; the last of an epoch has one, so that a process goes along without any."""
    together = train_golden(tmp_path / "adapter", 2, "--sharding", sharding, steps="5")
    assert together.losses == pytest.approx(EXPECTED["losses"][:5], abs=2e-5)
    assert together.output.count("5 steps in") == 1
    assert together.errors.count("step 1/5") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "adapter"] == []
    values = load_file(together.adapter / "adapter_model.safetensors")
    assert all(np.isfinite(value).all() for value in values.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(sharding="fsdp2"), "--sharding fsdp2 means nothing without --runtime torch"),
        (TrainConfig("torch", layers="1"), "--layers 1 trains layer by layer"),
        (TrainConfig("torch", init="gradient"), "--init gradient needs gradients of A and B by name"),
        (TrainConfig("torch", memory_budget="3GB"), "takes no --memory-budget"),
        (TrainConfig("torch", plan="stream"), "--runtime torch does not execute --plan stream"),
        (TrainConfig("torch", method="forward-only"), "--runtime torch has no --method forward-only"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_it_does_not_do_is_refused(config: TrainConfig, message: str) -> None:
    with pytest.raises((UsageError, IncompatibleError), match=message):
        request_of(config)


def test_engines_of_deepspeed_say_what_to_install(tmp_path: Path) -> None:
    hide = "import runpy, sys; sys.modules['deepspeed'] = None; runpy.run_module('edgetune', run_name='__main__')"
    options = ["--runtime", "torch", "--sharding", "zero2", "--steps", "1", "--output", str(tmp_path / "adapter")]
    arguments = ["train", str(GOLDEN / "bundle"), "--data", str(GOLDEN / "train.jsonl"), *options]
    done = subprocess.run([sys.executable, "-c", hide, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == exit_code_of(MissingDependencyError)
    assert 'pip install "edgetune[deepspeed]"' in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_device_imports_no_torch_unless_it_is_asked_for() -> None:
    code = (
        "import sys; from edgetune.runtimes import find_runtime, preferred_runtimes; list(preferred_runtimes());"
        "find_runtime('torch').abilities(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
