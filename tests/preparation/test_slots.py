"""Which slots options ask for: ranks, scaling and projections as PEFT makes them, and refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from transformers import Phi3ForCausalLM

from edgetune.cli import main
from edgetune.config import PrepareConfig
from edgetune.errors import UsageError
from edgetune.preparation import prepare
from edgetune.preparation.slots import lora_of
from support.tiny_phi3 import checkpoint

RSLORA = PrepareConfig(rank=9, alpha=6.0, rslora=True)
PATTERNS = PrepareConfig(
    targets="down_proj, o_proj", rank_pattern={"down_proj": 32}, alpha_pattern={"o_proj": 3, "down_proj": 64.0}
)


@pytest.mark.parametrize("config", [PrepareConfig(), RSLORA, PATTERNS], ids=["plain", "rslora", "patterns"])
def test_every_slots_rank_and_scaling_are_pefts(config: PrepareConfig) -> None:
    lora = lora_of(config)
    model = Phi3ForCausalLM.from_pretrained(checkpoint("multi-head"), dtype=torch.float32)
    peft = get_peft_model(
        model,
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            target_modules=lora.target_modules,
            use_rslora=config.rslora,
            rank_pattern=config.rank_pattern or {},
            alpha_pattern=config.alpha_pattern or {},
        ),
    )
    slots = {name.rpartition(".")[2]: module for name, module in peft.named_modules() if isinstance(module, Linear)}
    assert set(slots) == set(lora.target_modules)
    for module, slot in slots.items():
        assert (lora.rank_of(module), lora.scaling_of(module)) == (slot.r["default"], slot.scaling["default"])


def test_a_pattern_that_says_what_holds_anyway_is_left_out() -> None:
    assert lora_of(PrepareConfig(rank_pattern={"o_proj": 8}, alpha_pattern={"o_proj": 16})) == lora_of(PrepareConfig())


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"targets": "qkv_proj,gate_proj"}, ["no projection 'gate_proj'; give all-linear, attention, or some of"]),
        ({"targets": ""}, ["no projection ''"]),
        (
            {"targets": "attention", "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"x": 2.0}},
            ["--rank-pattern down_proj=4: down_proj has no slots; add it to --targets", "--alpha-pattern x=2: exp"],
        ),
        ({"rank_pattern": {"model.layers.0.self_attn.qkv_proj": 16}}, ["qkv_proj=16: expected one of qkv_proj"]),
        ({"rank_pattern": {"o_proj": 0}}, ["rank_pattern is {'o_proj': 0}, expected for o_proj: 1 at least"]),
        ({"rank_pattern": {"o_proj": True}}, ["expected for o_proj: a whole number"]),
        ({"alpha_pattern": "o_proj=3"}, ["alpha_pattern is 'o_proj=3', expected a dict of a number for each name"]),
        ({"rank_pattern": {"down_proj": 193}, "targets": "down_proj"}, ["193 is more than the 192 features"]),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_before_anything_is_built(
    tmp_path: Path, options: dict[str, Any], reasons: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(checkpoint("grouped-query"), tmp_path / "bundle", PrepareConfig(**options), say=pytest.fail)
    assert all(reason in str(caught.value) for reason in reasons), str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank-pattern", "down_proj"], "'down_proj' is not a name and a value"),
        (["--rank-pattern", "down_proj=x"], "'x' is not a valid integer"),
        (["--rank-pattern", "down_proj=4", "--rank-pattern", "down_proj=5"], "give each name once"),
        (["--rank-pattern", "down_proj=4", "--targets", "o_proj"], "down_proj=4: down_proj has no slots"),
    ],
    ids=str,
)
def test_the_command_line_takes_patterns_one_by_one(tmp_path: Path, flags: list[str], message: str) -> None:
    output = str(tmp_path / "bundle")
    done = CliRunner().invoke(main, ["prepare", str(checkpoint("grouped-query")), "--output", output, *flags])
    assert done.exit_code == 2
    assert message in done.output
