"""The checkpoints that the benchmark makes are what `prepare` and transformers take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoints import SIZES, Size, make_checkpoint
from edgetune.host.checkpoint import open_checkpoint

TINY = Size(hidden=64, intermediate=96, layers=3, heads=2, vocabulary=448, positions=128)


def parameters(size: Size) -> int:
    return sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for part in size.shapes() for shape in part.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "tiny"
    make_checkpoint(path, TINY)
    return path


def test_the_sizes_are_the_ones_that_the_goals_name() -> None:
    assert {name: round(parameters(size) / 1e6) for name, size in SIZES.items()} == {"small": 98, "full": 3821}


def test_prepare_takes_it(folder: Path) -> None:
    opened = open_checkpoint(str(folder), download=False, blocks=True)
    assert opened.architecture.num_hidden_layers == 3
    assert len(opened.weights) == 4


def test_transformers_finds_every_weight_in_it(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Phi3ForCausalLM

    model, report = Phi3ForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert sum(weight.numel() for weight in model.parameters()) == parameters(TINY)
    assert 0.018 < float(model.lm_head.weight.detach().float().std()) < 0.022
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Grüße, 世界", add_special_tokens=False).input_ids) == "Grüße, 世界"


def test_a_shallower_model_is_the_beginning_of_a_deeper_one(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    make_checkpoint(tmp_path / "shallow", replace(TINY, layers=2))
    for layer in (0, 1, 2):
        shallow = load_file(tmp_path / "shallow" / f"model-{layer + 1:05}-of-00003.safetensors")
        deep = load_file(folder / f"model-{layer + 1:05}-of-00004.safetensors")
        assert shallow.keys() == deep.keys()
        assert all(bool((shallow[name] == deep[name]).all()) for name in deep)
