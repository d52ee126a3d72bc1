"""What model builders see of a checkpoint: no code, and the numbers of the checkpoint whoever saved it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgetune.config import Base
from edgetune.host.checkpoint import Checkpoint, read_architecture
from edgetune.preparation.builder_view import builder_view
from support.prepared_bundles import CONFIG as BUNDLE
from support.prepared_bundles import prepare_checkpoint
from support.shared_material import shared_material
from support.small_checkpoint import (
    CONFIG,
    TEMPLATE,
    as_transformers_5,
    opened,
    plant_code,
    shard,
    write_checkpoint,
    write_json,
)
from support.tiny_phi3 import build_here, genai_greedy, greedy, save_checkpoint, save_tokenizer, torch_model_of

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny-phi3")


# --- code


def test_the_view_has_no_code_and_names_none(folder: Path, tmp_path: Path) -> None:
    plant_code(folder, tmp_path / "ran")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(b"")
    found = opened(folder)
    view = builder_view(found, tmp_path / "view")
    assert {path.name for path in view.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((view / "config.json").read_text()) == CONFIG | {
        "rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    assert "auto_map" not in (view / "tokenizer_config.json").read_text()
    assert json.loads((view / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    assert "auto_map" in (folder / "config.json").read_text(), "the checkpoint itself is untouched"


def test_the_view_of_shards_has_them_all(folder: Path, tmp_path: Path) -> None:
    shard(folder)
    view = builder_view(opened(folder), tmp_path / "view")
    index = json.loads((view / "model.safetensors.index.json").read_text())
    assert all((view / name).is_file() for name in index["weight_map"].values())


def test_where_links_are_not_allowed_files_are_copied(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    view = builder_view(opened(folder), tmp_path / "view")
    assert not (view / "model.safetensors").is_symlink()
    assert (view / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_transformers_runs_no_code_from_the_view(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    marker = tmp_path / "ran"
    plant_code(folder, marker)
    view = builder_view(opened(folder), tmp_path / "view")
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        kind.from_pretrained(view, trust_remote_code=True)  # not even then
        assert not marker.exists(), kind
    # The trap works; in a process of its own, for transformers keeps a copy of the code and registers its classes.
    program = "import sys, transformers; transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    variables = {**os.environ, "HF_HOME": str(tmp_path / "hub")}
    subprocess.run([sys.executable, "-c", program, str(folder)], env=variables, check=True)
    assert marker.exists()


# --- saved by transformers 5


def longrope(short: list[float], long: list[float]) -> dict[str, Any]:
    return {"type": "longrope", "short_factor": short, "long_factor": long}


SHORT = [1.0 + 0.02 * index for index in range(16)]
LONG = [1.0 + 0.3 * index for index in range(16)]
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"rope_theta": 500.0},
    "partial": {"partial_rotary_factor": 0.5, "tie_word_embeddings": True, "num_key_value_heads": 2},
    "longrope": {"original_max_position_embeddings": 64, "rope_scaling": longrope(SHORT, LONG)},
    "longrope, partial, theta": {
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.5,
        "rope_theta": 500.0,
        "rope_scaling": longrope(SHORT[:8], LONG[:8]),
    },
    "longrope, not stretched": {"rope_scaling": longrope(LONG, SHORT)},
    "an original length that means nothing": {"original_max_position_embeddings": 4096},
}
PROMPTS = [[int(token) for token in np.random.default_rng(0).integers(10, 440, count)] for count in (12, 80)]
"""Shorter and longer than the 64 positions of longrope's short factors."""


@pytest.mark.parametrize("newer", [False, True], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_model_that_is_built_answers_as_pytorch_does(tmp_path: Path, name: str, newer: bool) -> None:
    older = save_checkpoint(tmp_path / "older", EMBEDDINGS[name])
    source = older
    if newer:
        source = shutil.copytree(older, tmp_path / "newer")
        write_json(source / "config.json", as_transformers_5(json.loads((older / "config.json").read_text())))
    folder = build_here(builder_view(opened(source), tmp_path / "view"), tmp_path / "built", "int8")
    model = torch_model_of(older, folder)
    for prompt in PROMPTS:
        expected = greedy(model, prompt, 16)
        assert genai_greedy(folder, prompt, 16) == expected
        assert len(set(expected)) > 4, "an answer of one token shows nothing"


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("base", ["int4", "fp32"])
def test_whatever_the_type_of_the_weights_is_called_the_model_is_the_same(
    tmp_path: Path, stored: str, base: Base
) -> None:
    """transformers 5 writes `dtype`, older ones `torch_dtype`; the weights themselves say what they are."""
    import torch
    from safetensors.torch import load_file, save_file

    source = save_checkpoint(tmp_path / "source", {})
    weights = {name: value.to(getattr(torch, stored)) for name, value in load_file(source / WEIGHTS).items()}
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    built = []
    for index, key in enumerate(("dtype", "torch_dtype", None)):
        plain = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
        write_json(source / "config.json", plain if key is None else {**plain, key: stored})
        built.append(build_here(builder_view(opened(source), tmp_path / f"view{index}"), tmp_path / f"{index}", base))
    for name in ("model.onnx", "model.onnx.data"):
        first, *others = ((folder / name).read_bytes() for folder in built)
        assert others == [first, first]


# --- tokenizers: what counts is tokenizer.json

TEXTS = ["hello world", " what is it?  turn", "the lamp<|end|>\n<|user|>\nkitchen", ""]
NEWER: dict[str, dict[str, Any]] = {
    "its base class": {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
    "extra tokens as a list": {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|end|>", "<|user|>"]},
    "extra tokens by name": {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "model_specific_special_tokens": {"end_token": "<|end|>"},
    },
    "a class that would add tokens": {
        "tokenizer_class": "LlamaTokenizer", "add_prefix_space": None, "backend": "tokenizers",
        "local_files_only": False, "sp_model_kwargs": {},
    },
    "a class of its own": {"tokenizer_class": "FineTunedTokenizer"},
    "no class that could be": {"tokenizer_class": ["LlamaTokenizer"]},
    "what it was last used for": {
        "tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "max_length": 8, "stride": 0,
        "pad_to_multiple_of": None, "truncation_side": "right", "truncation_strategy": "longest_first",
    },
}  # fmt: skip


@pytest.fixture
def words(folder: Path) -> Path:
    """The checkpoint with a tokenizer like Phi-3's."""
    save_tokenizer(folder, [" ".join(TEXTS)] * 4, 440)
    return folder


def view_of(folder: Path) -> Path:
    """The view of a checkpoint whose tokenizer has more tokens than its vocabulary, which is no matter here."""
    checkpoint = Checkpoint(folder, folder.name, CONFIG, read_architecture(CONFIG), [folder / "model.safetensors"])
    return builder_view(checkpoint, folder.parent / "view")


def saved_again(view: Path, folder: Path) -> Tokenizer:
    """The tokenizer as a model builder leaves it."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(view).save_pretrained(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def assert_same_ids(found: Tokenizer, expected: Tokenizer) -> None:
    for text in TEXTS:
        for special in (True, False):
            ids = expected.encode(text, add_special_tokens=special).ids
            assert found.encode(text, add_special_tokens=special).ids == ids, text


@pytest.mark.parametrize("kind", NEWER)
def test_a_tokenizer_that_transformers_5_describes_gives_the_same_ids(words: Path, tmp_path: Path, kind: str) -> None:
    described = json.loads((words / "tokenizer_config.json").read_text())
    write_json(words / "tokenizer_config.json", {**described, **NEWER[kind]})
    found = saved_again(view_of(words), tmp_path / "saved")
    assert_same_ids(found, Tokenizer.from_file(str(words / "tokenizer.json")))


def test_a_tokenizer_config_as_transformers_5_writes_it(words: Path, tmp_path: Path) -> None:
    source = shared_material() / "cases" / "tokenizer_config-transformers5.json"
    shutil.copyfile(source, words / "tokenizer_config.json")
    tokenizer = Tokenizer.from_file(str(words / "tokenizer.json"))
    found = saved_again(view_of(words), tmp_path / "saved")
    # The file lists added tokens of another tokenizer, too.
    assert found.get_vocab() == tokenizer.get_vocab()
    assert_same_ids(found, tokenizer)


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-3-medium", "phi-4-mini-json"])
def test_real_tokenizers_keep_their_ids(words: Path, tmp_path: Path, name: str) -> None:
    source = shared_material() / "real" / "tokenizers" / name
    with gzip.open(source / "tokenizer.json.gz") as packed:
        (words / "tokenizer.json").write_bytes(packed.read())
    eos = "<|endoftext|>"
    write_json(words / "tokenizer_config.json", {
        "backend": "tokenizers", "eos_token": eos, "extra_special_tokens": ["<|end|>"], "is_local": True,
        "tokenizer_class": "LlamaTokenizer",
    })  # fmt: skip
    expected = Tokenizer.from_file(str(words / "tokenizer.json"))
    found = saved_again(view_of(words), tmp_path / "saved")
    for text in [*TEXTS, "Ünïcode — 漢字 and\ttabs\n\n  spaces"]:
        assert found.encode(text).ids == expected.encode(text).ids


def test_truncation_and_padding_are_taken_out(words: Path, tmp_path: Path) -> None:
    """A tokenizer that was used for a padded batch carries both in its file."""
    tokenizer = Tokenizer.from_file(str(words / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_id=2, pad_token="</s>")
    tokenizer.save(str(words / "tokenizer.json"))
    before = (words / "tokenizer.json").read_bytes()
    view = view_of(words)
    assert (words / "tokenizer.json").read_bytes() == before, "the checkpoint itself is untouched"
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for found in (Tokenizer.from_file(str(view / "tokenizer.json")), saved_again(view, tmp_path / "saved")):
        assert found.truncation is None and found.padding is None
        assert_same_ids(found, tokenizer)


def test_both_forms_give_the_same_bundle(tmp_path: Path) -> None:
    older = save_checkpoint(tmp_path / "older" / "model", EMBEDDINGS["longrope, partial, theta"])
    newer = shutil.copytree(older, tmp_path / "models--some--one" / "snapshots" / ("1a" * 20))
    write_json(newer / "config.json", as_transformers_5(json.loads((older / "config.json").read_text())))
    described = json.loads((newer / "tokenizer_config.json").read_text())
    write_json(newer / "tokenizer_config.json", {**described, **NEWER["its base class"]})
    found, expected = (
        prepare_checkpoint(source, source.with_name("bundle"), BUNDLE).manifest for source in (newer, older)
    )
    assert found.architecture == expected.architecture
    assert found.tokenizer == expected.tokenizer
    assert (found.base.name, found.provenance["revision"]) == ("some/one", "1a" * 20)
    assert (expected.base.name, expected.provenance.get("revision")) == ("model", None)
    differ = {file.path for file in {*found.files} ^ {*expected.files}}
    assert differ <= {"config.json"}, "which says who wrote it"
