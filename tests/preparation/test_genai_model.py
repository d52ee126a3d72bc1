"""The GenAI build against PyTorch, for every family variant."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from edgetune.config import Base
from edgetune.errors import EdgetuneError
from edgetune.preparation.genai_model import build_genai_model
from support.tiny_phi3 import VARIANTS, checkpoint, genai_greedy, genai_model, greedy, torch_model, weights

FILES = {
    "chat_template.jinja", "config.json", "genai_config.json", "model.onnx", "model.onnx.data",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
PROMPT = [int(token) for token in np.random.default_rng(0).integers(10, 440, 12)]
LONG_PROMPT = [int(token) for token in np.random.default_rng(1).integers(10, 440, 80)]
"""Longer than the 64 positions of longrope's short factors."""


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["short", "long"])
@pytest.mark.parametrize("base", get_args(Base))
@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_as_pytorch_does(variant: str, base: Base, prompt: list[int]) -> None:
    folder = genai_model(variant, base)
    expected = greedy(torch_model(variant, folder), prompt, 24)
    assert genai_greedy(folder, prompt, 24) == expected
    assert len(set(expected)) > 5, "an answer of one token shows nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_weights_are_the_checkpoints(variant: str) -> None:
    from safetensors.numpy import load_file

    original = load_file(checkpoint(variant) / "model.safetensors")
    head = original.get("lm_head.weight", original["model.embed_tokens.weight"])
    found = weights(genai_model(variant, "fp32"))
    np.testing.assert_array_equal(found["lm_head"], head)
    for index in range(2):
        expected = original[f"model.layers.{index}.mlp.gate_up_proj.weight"]
        np.testing.assert_array_equal(found[f"model.layers.{index}.mlp.gate_proj"], expected[:192])
        np.testing.assert_array_equal(found[f"model.layers.{index}.mlp.up_proj"], expected[192:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_int4_is_the_nearest_of_sixteen_steps(variant: str) -> None:
    exact, rounded = weights(genai_model(variant, "fp32")), weights(genai_model(variant, "int4", "nearest"))
    assert exact.keys() == rounded.keys() and len(exact) == 11
    for name, values in exact.items():
        blocks = values.reshape(values.shape[0], -1, 32)
        step = np.abs(blocks).max(axis=-1, keepdims=True) / 8
        error = np.abs(blocks - rounded[name].reshape(blocks.shape))
        # Half a step, but for values next to the end of the side that has only seven steps.
        assert (error <= 1.001 * step).all() and np.mean(error <= 0.501 * step) > 0.95, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_int4_has_the_least_squared_error_of_eleven_scales(variant: str) -> None:
    exact, nearest = weights(genai_model(variant, "fp32")), weights(genai_model(variant, "int4", "nearest"))
    rounded = weights(genai_model(variant, "int4"))
    for name, values in exact.items():
        blocks = values.reshape(values.shape[0], -1, 32).astype(np.float64)
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
        least = np.full(blocks.shape[:2], np.inf)
        for steps in np.arange(6, 8.75, 0.25):
            scale = np.where(largest == 0, 1, largest / -steps)
            tried = np.clip(np.rint(blocks / scale), -8, 7) * scale
            least = np.minimum(least, np.square(tried - blocks).sum(-1))
        own, before = (np.square(found[name].reshape(blocks.shape) - blocks).sum(-1) for found in (rounded, nearest))
        assert own == pytest.approx(least, rel=1e-3, abs=1e-9), name
        assert own.sum() < 0.92 * before.sum(), name


@pytest.mark.parametrize(("base", "steps"), [("int8", 128), ("fp16", 2048)])
def test_int8_and_fp16_are_as_near_as_they_can_be(base: Base, steps: int) -> None:
    """Of int8 128 steps up to a block's largest; of fp16 2,048 up to the next power of two."""
    exact, rounded = weights(genai_model("partial", "fp32")), weights(genai_model("partial", base))
    assert exact.keys() == rounded.keys() and len(exact) == 11
    for name, values in exact.items():
        blocks = values.reshape(values.shape[0], -1, 32)
        largest = np.abs(blocks).max(axis=-1, keepdims=True)
        error = np.abs(blocks - rounded[name].reshape(blocks.shape))
        # Half a step, but for values next to the end of the side that has one step less.
        assert (error <= 1.001 * largest / steps).all() and np.mean(error <= 0.501 * largest / steps) > 0.95, name
        assert error.max() > 0, "nothing was rounded"


def test_int4_computes_in_fp32() -> None:
    import onnx

    model = onnx.load(genai_model("multi-head", "int4") / "model.onnx", load_external_data=False)
    layers = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(layers) == 11
    for node in layers:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert (attributes["accuracy_level"], attributes["block_size"], attributes["bits"]) == (1, 32, 4)
        assert len(node.input) == 3, "symmetric: no zero points"


def test_build_is_quiet_complete_and_names_no_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bundle"
    build_genai_model(checkpoint("partial"), output, "int4", "least-squares")
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in output.iterdir()} == FILES
    for path in output.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content and str(checkpoint("partial")).encode() not in content, path
        assert not re.search(rb"/(home|root|tmp|Users)/", content), path
    config = json.loads((output / "genai_config.json").read_text())
    assert config["model"]["type"] == "phi3" and config["model"]["decoder"]["filename"] == "model.onnx"
    for name in FILES:
        assert (output / name).read_bytes() == (genai_model("partial", "int4") / name).read_bytes(), "not repeatable"


def test_failure_says_what_olive_said(tmp_path: Path) -> None:
    broken = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("multi-head"), broken)
    for path in broken.glob("*token*"):
        path.unlink()
    with pytest.raises(EdgetuneError, match=r"(?s)Olive's ModelBuilder failed \(exit 1\).*Error") as caught:
        build_genai_model(broken, tmp_path / "bundle", "fp32", "least-squares")
    assert "Traceback" not in str(caught.value)
    assert list((tmp_path / "bundle").iterdir()) == []


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    hostile = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("multi-head"), hostile)
    mark = tmp_path / "ran"
    (hostile / "configuration_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((hostile / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "configuration_evil.EvilModel",
    }
    (hostile / "config.json").write_text(json.dumps(config))
    build_genai_model(hostile, tmp_path / "bundle", "fp32", "least-squares")
    assert not mark.exists()
    assert not list((tmp_path / "bundle").glob("*.py"))
