"""The golden bundle trains, measures and answers on a device as PyTorch and PEFT say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.generation import generate_ids
from support.golden import ADAPTER, BUNDLE, EARLIER, GOLDEN, TRAIN, VALID
from support.golden_run import Trained, flags_of, train_golden
from support.installed_command import edgetune

CLOSE = 1e-4
"""Relative: twenty steps apart from PyTorch."""
Expected = dict[str, Any]


def test_every_loss_and_gradient_norm_is_pytorchs(trained: Trained, expected: Expected) -> None:
    steps = trained.recorder.steps
    assert [step.step for step in steps] == list(range(1, 21))
    np.testing.assert_allclose([step.loss for step in steps], expected["losses"], rtol=CLOSE)
    np.testing.assert_allclose([step.grad_norm for step in steps], expected["grad_norms"], rtol=10 * CLOSE)
    assert trained.recorder.starts[0].runtime == "onnxruntime"
    assert trained.recorder.notices == []


def test_validation_loss_falls_as_pytorchs_does(trained: Trained, expected: Expected) -> None:
    first, last = expected["validation_loss"]["first"], expected["validation_loss"]["last"]
    assert last < 0.6 * first
    assert trained.result.first_validation_loss == pytest.approx(first, rel=CLOSE)
    assert trained.result.last_validation_loss == pytest.approx(last, rel=CLOSE)


@pytest.mark.parametrize(
    ("plan", "precision"), [("keep", "auto"), ("stream", "auto"), ("whole", "auto"), ("keep", "int8")]
)
def test_a_bundle_of_an_earlier_version_trains(plan: str, precision: str, tmp_path: Path) -> None:
    wanted = json.loads((EARLIER / "expected.json").read_text(encoding="utf-8"))
    options = {**wanted["options"], "runtime": "onnxruntime", "plan": plan, "precision": precision}
    trained = train_golden(EARLIER / "bundle", tmp_path / "adapter", options)
    close = CLOSE if precision == "auto" else 0.05
    np.testing.assert_allclose([step.loss for step in trained.recorder.steps], wanted["losses"], rtol=close)


def test_an_adapter_of_peft_is_imported_without_peft(tmp_path: Path, trained: Trained) -> None:
    """Bit by bit, where it is of the bundle's own rank and scaling; it is measured as what was trained here."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained.result.path / name, source)
    said = edgetune("import", source, "--bundle", BUNDLE, "--output", tmp_path / "adapter")
    assert said.code == 0, said
    assert said.out.startswith(f"{tmp_path / 'adapter'}: 8 of 8 slots are PEFT's")
    losses = [
        json.loads(edgetune("eval", BUNDLE, "--data", VALID, "--adapter", adapter, "--json").out)["loss"]
        for adapter in (trained.result.path, tmp_path / "adapter")
    ]
    assert losses[0] == losses[1] == pytest.approx(trained.result.last_validation_loss, rel=CLOSE)


def test_the_command_trains_the_same_adapter(tmp_path: Path, trained: Trained, expected: Expected) -> None:
    said = edgetune(
        "train", BUNDLE, "--data", TRAIN, "--valid", VALID, "--output", tmp_path / "adapter",
        "--init-adapter", ADAPTER, *flags_of(expected["options"]), "--json",
    )  # fmt: skip
    assert said.code == 0, said
    assert json.loads(said.out)["last_validation_loss"] == pytest.approx(expected["validation_loss"]["last"], rel=CLOSE)
    assert "step 20/20" in said.err
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], expected["losses"], rtol=CLOSE)
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes"}
    assert all(keys <= line.keys() for line in lines)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (trained.result.path / name).read_bytes()


def test_eval_measures_what_training_said(trained: Trained, expected: Expected) -> None:
    losses = {}
    for name, adapter in (("base", None), ("first", ADAPTER), ("last", trained.result.path)):
        said = edgetune("eval", BUNDLE, "--data", VALID, *(["--adapter", adapter] if adapter else []), "--json")
        assert said.code == 0, said
        measured = json.loads(said.out)
        assert (measured["rows"], measured["left_out"]) == (4, 0)
        losses[name] = measured["loss"]
    assert losses == pytest.approx(expected["validation_loss"], rel=CLOSE)


@pytest.mark.parametrize(
    ("file", "options"),
    [("train.jsonl", []), ("valid.jsonl", []), ("completion.jsonl", ["--raw-prompts"]), ("text.jsonl", [])],
)
def test_preview_shows_the_ids_and_labels_of_transformers(file: str, options: list[str], expected: Expected) -> None:
    said = edgetune("preview", BUNDLE, "--data", GOLDEN / file, "--json", *options)
    assert said.code == 0, said
    wanted = [row for row in expected["rows"] if row["file"] == file]
    assert wanted
    assert [{"file": file, **json.loads(line)} for line in said.out.splitlines()] == wanted


def test_a_prompt_and_its_completion_are_a_conversation_of_two_turns(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (GOLDEN / "completion.jsonl").read_text(encoding="utf-8").splitlines()]
    turns = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in rows]
    lines = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    shown = [edgetune("preview", BUNDLE, "--data", path, "--json").out for path in (GOLDEN / "completion.jsonl", chat)]
    assert shown[0] == shown[1] != ""


@pytest.mark.parametrize("number", range(3))
def test_the_base_answers_pytorchs_greedy_tokens(number: int, expected: Expected) -> None:
    answer = expected["answers"][number]
    assert generate_ids(BUNDLE, answer["prompt_ids"], 24) == answer["answer_ids"]


def test_generate_answers_in_words(expected: Expected) -> None:
    answer = expected["answers"][0]
    said = edgetune("generate", BUNDLE, "--prompt", answer["prompt"], "--json")
    assert said.code == 0, said
    assert json.loads(said.out)["text"] == answer["text"]
    assert edgetune("generate", BUNDLE, "--prompt", answer["prompt"]).out == answer["text"] + "\n"
    short = edgetune("generate", BUNDLE, "--prompt", answer["prompt"], "--max-new-tokens", 2, "--json")
    assert answer["text"].startswith(json.loads(short.out)["text"])


def test_inspect_verifies_bundle_and_adapter(trained: Trained) -> None:
    bundle = json.loads(edgetune("inspect", BUNDLE, "--json").out)
    assert (bundle["kind"], bundle["verified"], bundle["base"]["weights"]) == ("bundle", True, "int4")
    assert {"step", "loss", "adamw", "training_model", "model"} <= {graph["role"] for graph in bundle["graphs"]}
    adapter = json.loads(edgetune("inspect", trained.result.path, "--json").out)
    assert (adapter["kind"], adapter["verified"]) == ("adapter", True)
    assert adapter["base"] == bundle["base"]
    peft = json.loads(edgetune("inspect", ADAPTER, "--json").out)
    assert (peft["kind"], peft["verified"]) == ("adapter", False)
    for lora in (bundle["lora"], adapter["lora"], peft["lora"]):
        lora["target_modules"].sort()
    assert peft["lora"] == bundle["lora"] == adapter["lora"]
    assert edgetune("inspect", BUNDLE).code == 0


def test_a_device_shows_its_runs(trained: Trained, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    written = json.loads(edgetune("report", trained.result.path, "--output", page, "--json").out)
    assert written["bytes"] == len(page.read_bytes()) and b"</svg>" in page.read_bytes()
    (listed,) = json.loads(edgetune("runs", trained.result.path, "--json").out)
    assert (listed["steps"], listed["loss"]) == (20, trained.recorder.steps[-1].loss)


def test_doctor_is_content_with_a_device() -> None:
    said = edgetune("doctor", "--json")
    assert said.code == 0, said
    assert json.loads(said.out)["device_complete"] is True
    assert edgetune("doctor").code == 0
