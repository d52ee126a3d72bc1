"""PEFT's configuration: ranks and scaling as PEFT itself works them out."""

from __future__ import annotations

from typing import Any

import pytest

from edgetune.formats.peft_config import foreign_fields, pattern_problems, prepare_line, scaling_of, short
from edgetune.model.lora import Lora
from support.foreign_adapters import APART, peft_model, torch_model


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 7},
        {"r": 3, "lora_alpha": 7, "use_rslora": True},
        {"r": 3, "rank_pattern": {"proj": 5, "q_proj": 2, "layers.1.self_attn.o_proj": 4}},
        {"r": 3, "alpha_pattern": {"k_proj": 1, "^model.layers.0.self_attn.k_proj": 2, "layers.0.mlp.up_proj": 0.5}},
    ],
    ids=str,
)
def test_every_modules_rank_and_scaling_is_pefts(options: dict[str, Any]) -> None:
    model = peft_model(torch_model(apart=True), target_modules=APART, **options)
    config = model.peft_config["default"].to_dict()
    scaling = scaling_of(config)
    assert scaling is not None and not pattern_problems(config) and not foreign_fields(config)
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(modules) == 14
    for name, module in modules.items():
        assert scaling.of(name) == (module.r["default"], module.scaling["default"])


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0, "lora_alpha": 1},
        {"r": True, "lora_alpha": 1},
        {"r": 4, "lora_alpha": float("inf")},
        {"r": 4, "lora_alpha": 1, "use_rslora": "yes"},
        {"r": 4, "lora_alpha": 1, "rank_pattern": {"(a+)+": 1}},
        {"r": 4, "lora_alpha": 1, "alpha_pattern": [1]},
        {},
    ],
    ids=str,
)
def test_what_says_no_scaling_is_none(config: dict[str, Any]) -> None:
    assert scaling_of(config) is None


def test_alphas_are_written_out() -> None:
    """A rounded one would be another scaling."""
    asked = Lora(8, 22.627416998, ["o_proj"], [], alpha_pattern={"o_proj": 16.0})
    line = "edgetune prepare CHECKPOINT --rank 8 --alpha 22.627416998 --alpha-pattern o_proj=16 --targets o_proj"
    assert prepare_line(asked) == f"{line} --output BUNDLE"


def test_long_values_are_cut() -> None:
    assert short("x" * 200) == f"'{'x' * 78}…"
