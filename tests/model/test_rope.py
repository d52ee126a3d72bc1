"""Rotary tables against transformers' Phi3RotaryEmbedding."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from edgetune.errors import IncompatibleError
from edgetune.host.rope_config import rope_from_config, with_older_rope_keys
from edgetune.model.rope import rope_tables
from support.shared_material import shared_material
from support.small_checkpoint import as_transformers_5

HALF = 48
SHORT = [1.0 + 0.01 * index for index in range(HALF)]
LONG = [1.0 + 1.3 * index for index in range(HALF)]
PLAIN: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 4, "max_position_embeddings": 4096}
STRETCHED: dict[str, Any] = {
    **PLAIN,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
}
PARTIAL: dict[str, Any] = {
    **STRETCHED,
    "hidden_size": 512,
    "partial_rotary_factor": 0.75,
}
CONFIGS = {
    "default": PLAIN,
    "other theta": {**PLAIN, "rope_theta": 250000.0},
    "partial": {**PLAIN, "hidden_size": 512, "partial_rotary_factor": 0.75},
    "longrope": STRETCHED,
    "su": {**STRETCHED, "rope_scaling": {**STRETCHED["rope_scaling"], "type": "su"}},
    "longrope, partial": PARTIAL,
    "longrope, not stretched": {**STRETCHED, "max_position_embeddings": 4096},
}


def oracle(config: dict[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    torch = pytest.importorskip("torch")
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    embedding = Phi3RotaryEmbedding(Phi3Config(**config))
    cos, sin = embedding(torch.zeros(1), torch.arange(length)[None])
    return cos.numpy(), sin.numpy()


@pytest.mark.parametrize("length", [7, 4096, 4097])
@pytest.mark.parametrize("name", CONFIGS)
def test_tables_are_those_of_transformers(name: str, length: int) -> None:
    """Short and long rows, at the very length where longrope changes its factors."""
    config = CONFIGS[name]
    cos, sin = oracle(config, length)
    rope = rope_from_config(config)
    found = rope_tables(rope, np.arange(length)[None], np.array([length]))
    for ours, theirs in zip(found, (cos, sin), strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        # The last bit of a frequency, where torch's power differs from the exact one, grows with the position.
        np.testing.assert_allclose(ours[:, :512], theirs[:, :512], atol=2e-6)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_longest_row_of_a_batch_decides_as_in_transformers() -> None:
    rope = rope_from_config({**STRETCHED, "original_max_position_embeddings": 16})
    positions = np.broadcast_to(np.arange(24), (2, 24))
    short, _ = rope_tables(rope, positions, np.array([3, 16]))
    long, _ = rope_tables(rope, positions, np.array([3, 17]))
    alone, _ = rope_tables(rope, positions[:1], np.array([17]))
    np.testing.assert_array_equal(long, np.broadcast_to(alone, long.shape))
    assert np.abs(short - long).max() > 0.1


def test_attention_factor() -> None:
    assert rope_from_config(PLAIN).attention_factor == 1.0
    assert rope_from_config(STRETCHED).attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    for key, value in (("attention_factor", math.sqrt(1 + math.log(32) / math.log(4096))), ("factor", 32)):
        stated = {**STRETCHED, "rope_scaling": {**STRETCHED["rope_scaling"], key: value}}
        assert rope_from_config(stated) == rope_from_config(STRETCHED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'llama3'"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"rope_scaling": {**STRETCHED["rope_scaling"], "short_mscale": 1.2}}, "short_mscale"),
        ({"rope_scaling": {**STRETCHED["rope_scaling"], "short_factor": SHORT[1:]}}, "48 numbers, found 47"),
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT}}, "long_factor must be a list of 48"),
        ({"rope_scaling": {**STRETCHED["rope_scaling"], "long_factor": ["x"] * HALF}}, "long_factor must be a number"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"partial_rotary_factor": 0.01}, "rotates 0 of 96"),
        ({"partial_rotary_factor": 2.0}, "rotates 192 of 96"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters has 'full_attention'"),
        ({"rope_scaling": {**STRETCHED["rope_scaling"], "attention_factor": 1.5}}, "attention_factor is 1.5, but ONNX"),
        ({"rope_scaling": {**STRETCHED["rope_scaling"], "factor": 4}}, "factor is 4, but ONNX .* takes the 32 that"),
        ({"rope_scaling": None, "rope_parameters": {"short_factor": SHORT}}, "short_factor belongs to longrope"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "rope_scaling.factor belongs to longrope"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings is 1, expected at least 2"),
    ],
)
def test_what_is_not_phi3_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        rope_from_config({**STRETCHED, **change})


# --- the form that transformers 5 writes


@pytest.mark.parametrize("length", [7, 4097])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_forms_are_one_embedding(name: str, length: int) -> None:
    """The oracle reads the older form alone; what the builders get is that form, with its numbers."""
    newer = as_transformers_5(CONFIGS[name])
    assert rope_from_config(newer) == rope_from_config(CONFIGS[name])
    rewritten = with_older_rope_keys(newer)
    assert "rope_parameters" not in rewritten
    for found, expected in zip(oracle(rewritten, length), oracle(CONFIGS[name], length), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_file_as_transformers_5_writes_it() -> None:
    config = json.loads((shared_material() / "cases" / "config-transformers5-longrope.json").read_text())
    rope = rope_from_config(config)
    assert (rope.dim, rope.theta, rope.original_max_position_embeddings) == (16, 10000.0, 64)
    assert rope.short_factor == config["rope_parameters"]["short_factor"]
    assert rope.long_factor == config["rope_parameters"]["long_factor"]
    assert rope.attention_factor == math.sqrt(1 + math.log(4) / math.log(64))


REAL = ("phi-3-medium-4k", "phi-3-mini-128k-su", "phi-3-mini-4k", "phi-3.5-mini", "phi-4-mini", "phi-4-mini-reasoning")


@pytest.mark.parametrize("length", [7, 4097])
@pytest.mark.parametrize("name", REAL)
def test_real_configurations_in_both_forms(name: str, length: int) -> None:
    config = json.loads((shared_material() / "real" / "configs" / f"{name}.config.json").read_text())
    rope = rope_from_config(config)
    assert rope_from_config(as_transformers_5(config)) == rope
    expected = oracle(with_older_rope_keys(as_transformers_5(config)), length)
    for found, theirs in zip(rope_tables(rope, np.arange(length)[None], np.array([length])), expected, strict=True):
        np.testing.assert_allclose(found[:, :512], theirs[:, :512], atol=2e-6)
        np.testing.assert_allclose(found, theirs, atol=2e-4)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_every_name_of_longrope_in_every_place(section: str, key: str, kind: str) -> None:
    factors = {"short_factor": SHORT, "long_factor": LONG}
    found = {**STRETCHED, "rope_scaling": None, section: {key: kind, **factors}}
    assert rope_from_config(found) == rope_from_config(STRETCHED)
    # Exactly three fields: transformers 4.57 refuses more, and fewer.
    assert with_older_rope_keys(found)["rope_scaling"] == {"type": "longrope", **factors}
    oracle(with_older_rope_keys(found), 3)


def test_both_names_of_the_kind_stand_together_where_transformers_5_read_an_older_file() -> None:
    parameters = {**STRETCHED["rope_scaling"], "type": "su", "rope_type": "longrope", "rope_theta": 1e4}
    assert rope_from_config({**STRETCHED, "rope_parameters": parameters}) == rope_from_config(STRETCHED)


@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_the_length_before_stretching_may_stand_inside(section: str) -> None:
    beside = {key: value for key, value in STRETCHED.items() if key != "original_max_position_embeddings"}
    inside = {**STRETCHED["rope_scaling"], "original_max_position_embeddings": 512}
    found = {**beside, "rope_scaling": None, section: inside}
    assert rope_from_config(found) == rope_from_config({**STRETCHED, "original_max_position_embeddings": 512})
    assert with_older_rope_keys(found)["original_max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("beside", "inside", "message"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 5e4}, "rope_theta is 10000.0, rope_parameters.rope_theta is 50000.0"),
        ({"partial_rotary_factor": 1.0}, {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_fac"),
        ({}, {"original_max_position_embeddings": 8}, "original_max_position_embeddings is 4096, rope_parameters"),
        ({}, {"rope_type": "longrope", "short_factor": LONG}, "rope_scaling.short_factor is .*rope_parameters"),
        ({}, {"rope_type": "longrope", "long_factor": SHORT}, "rope_scaling.long_factor is .*rope_parameters"),
    ],
)
def test_forms_that_contradict_each_other_are_refused(
    beside: dict[str, Any], inside: dict[str, Any], message: str
) -> None:
    with pytest.raises(IncompatibleError, match=f"config.json contradicts itself: .*{message}.*; remove the one"):
        rope_from_config({**STRETCHED, **beside, "rope_parameters": inside})


def test_forms_that_agree_are_taken() -> None:
    newer = as_transformers_5(PARTIAL)
    both = {**newer, **PARTIAL, "rope_theta": 10000}
    assert rope_from_config(both) == rope_from_config(PARTIAL)
