"""Rotary tables against transformers' Phi3RotaryEmbedding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgetune.errors import IncompatibleError
from edgetune.rope import rope_from_config, rope_tables

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
    given = {**STRETCHED, "rope_scaling": {**STRETCHED["rope_scaling"], "attention_factor": 1.5}}
    assert rope_from_config(given).attention_factor == 1.5


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
        ({"rope_parameters": {"rope_theta": 1e4}}, "transformers 4.57"),
    ],
)
def test_what_is_not_phi3_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        rope_from_config({**STRETCHED, **change})
