"""Answers: the ids that training saw in, PyTorch's greedy ids out, and nothing loaded that was not verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.config import ExportConfig, GenerateConfig, SearchConfig
from edgetune.data.encode import Remark, load_encoder
from edgetune.data.rows import Message
from edgetune.errors import IncompatibleError, UsageError, VerificationError
from edgetune.exporting import export
from edgetune.formats.bundle import list_files
from edgetune.formats.genai import MANIFEST, adapter_file, open_model
from edgetune.formats.manifest import AdapterManifest, ModelManifest, RowEncoding
from edgetune.formats.manifest_json import read_manifest, write_manifest
from edgetune.generation import generate, generate_ids
from edgetune.generation.loaded import LoadedModel
from edgetune.generation.pieces import text_pieces
from support.several_adapters import save_several
from support.shared_material import shared_material
from support.tiny_phi3 import bundle, checkpoint, greedy, save_adapter, torch_model

ADAPTER = adapter_file("adapter")
CONFIG = GenerateConfig(max_new_tokens=16)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = bundle("grouped-query", "int4")
    folder = tmp_path_factory.mktemp("kept")
    adapter = save_adapter(folder / "adapter", source)
    export(source, adapter, folder / "model", ExportConfig(merge=False))
    return folder / "model"


@pytest.fixture
def model(kept: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(kept, tmp_path / "model"))


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest fit what lies in the folder, as one who wants to deceive would."""
    manifest = read_manifest((folder / MANIFEST).read_bytes(), ModelManifest, MANIFEST)
    changes = {"files": list_files(folder, without=MANIFEST)} | changes
    (folder / MANIFEST).write_bytes(write_manifest(replace(manifest, **changes)))


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    change(config)
    (folder / "genai_config.json").write_text(json.dumps(config))
    reseal(folder)


def template_ids(messages: list[dict[str, str]]) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint("grouped-query"))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    return [int(token) for token in ids]


def torch_answer(ids: list[int], count: int) -> str:
    source = bundle("grouped-query", "int4")
    answer = greedy(torch_model("grouped-query", source.path), ids, count)
    # Random models write bytes that are no characters: transformers' decoding serves the test of the pieces alone.
    return "".join(text_pieces(load_encoder(source.path, source.manifest.tokenizer), answer))


@pytest.mark.parametrize("system", [None, "tell me the answer"])
def test_answer_is_transformers_answer(system: str | None) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    ids = template_ids([*messages, {"role": "user", "content": "is the lamp on?"}])
    pieces = list(generate(bundle("grouped-query", "int4").path, "is the lamp on?", CONFIG, system=system))
    assert "".join(pieces) == torch_answer(ids, 16)
    assert len(pieces) > 3, "not streamed"
    assert all(pieces)


def test_kept_adapter_is_active_by_itself(kept: Path, model: Path) -> None:
    base = list(generate(bundle("grouped-query", "int4").path, "hello", CONFIG))
    adapted = list(generate(kept, "hello", CONFIG))
    assert adapted != base
    reseal(model, adapter=None)
    assert list(generate(model, "hello", CONFIG)) == base


def test_stops_where_the_model_ends() -> None:
    source = bundle("grouped-query", "int4")
    prompt = [int(token) for token in np.random.default_rng(34).integers(10, 440, 80)]
    expected = greedy(torch_model("grouped-query", source.path), prompt, 40)
    assert 0 < len(expected) < 40, "this prompt was chosen because the model ends its answer"
    assert generate_ids(source.path, prompt, 40) == expected


def test_length_limits() -> None:
    source = bundle("multi-head", "fp32")
    assert len(generate_ids(source.path, [5, 6, 7], 4)) == 4
    assert len(generate_ids(source.path, [5] * 250, 100)) == 6, "256 positions for prompt and answer"
    with pytest.raises(UsageError, match=r"256 tokens.*takes 256"):
        generate_ids(source.path, [5] * 256, 1)
    with pytest.raises(UsageError, match="shorten it"):
        generate(source.path, "what is it? " * 200, CONFIG)
    with pytest.raises(UsageError, match="empty"):
        generate(source.path, "", CONFIG)


def test_without_a_template_the_prompt_is_continued(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    reseal(model, adapter=None)
    from transformers import AutoTokenizer

    ids = [int(token) for token in AutoTokenizer.from_pretrained(checkpoint("grouped-query"))("hello world").input_ids]
    assert "".join(generate(model, "hello world", CONFIG)) == torch_answer(ids, 16)
    with pytest.raises(UsageError, match="no chat template"):
        generate(model, "hello", CONFIG, system="be kind")


@pytest.mark.parametrize("text", ["is the lamp on now", "naïve café", "日本語 and 🙂🙃", "a  b \n c", "🙂", "", "x 🙂"])
def test_pieces_are_whole_characters(text: str) -> None:
    source = bundle("multi-head", "fp32")
    encoder = load_encoder(source.path, source.manifest.tokenizer)
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(source.path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    pieces = list(text_pieces(encoder, ids))
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(source.path).decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == expected == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_stall_nothing() -> None:
    source = bundle("multi-head", "fp32")
    encoder = load_encoder(source.path, source.manifest.tokenizer)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source.path / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in ("<0xCC>", "<0x99>", "<0x99>", "t", "h", "e")]
    assert list(text_pieces(encoder, ids)) == ["\u0319", "\ufffd\ufffd\ufffdt", "h", "e"]


def test_cut_character_is_shown_at_the_end() -> None:
    source = bundle("multi-head", "fp32")
    encoder = load_encoder(source.path, source.manifest.tokenizer)
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(source.path / "tokenizer.json")).encode("x 🙂", add_special_tokens=False).ids[:-1]
    assert "".join(text_pieces(encoder, ids)) == encoder.decode(ids)


def test_missing_folder() -> None:
    with pytest.raises(UsageError, match="no model here"):
        generate(Path("nowhere"), "hello", CONFIG)


def test_model_without_a_manifest_is_refused(model: Path) -> None:
    (model / MANIFEST).unlink()
    with pytest.raises(VerificationError, match=r"without edgetune\.json"):
        generate(model, "hello", CONFIG)


def test_other_format_is_refused(model: Path) -> None:
    record = json.loads((model / MANIFEST).read_text())
    (model / MANIFEST).write_text(json.dumps(record | {"format": "edgetune-adapter"}))
    with pytest.raises(IncompatibleError, match="edgetune-adapter"):
        open_model(model)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", ADAPTER])
def test_flipped_byte_is_found(model: Path, name: str) -> None:
    data = bytearray((model / name).read_bytes())
    data[len(data) // 2] ^= 1
    (model / name).write_bytes(data)
    with pytest.raises(VerificationError, match="was changed"):
        generate(model, "hello", CONFIG)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "custom_ops_library": lambda config: config["model"]["decoder"]["session_options"].update(
        custom_ops_library="libevil.so"
    ),
    "engine": lambda config: config.update(engine={}),
    "vision": lambda config: config["model"].update(vision={"filename": "../evil.onnx"}),
    "pipeline": lambda config: config["model"]["decoder"].update(pipeline=[{"x": {"filename": "/evil.onnx"}}]),
    "provider_options": lambda config: config["model"]["decoder"]["session_options"].update(
        provider_options=[{"qnn": {"backend_path": "libevil.so"}}]
    ),
    "filename": lambda config: config["model"]["decoder"].update(filename="../model/model.onnx"),
    "context_length": lambda config: config["model"].update(context_length="long"),
    "eos_token_id": lambda config: config["model"].update(eos_token_id=[2, "x"]),
    "decoder": lambda config: config["model"].update(decoder=[]),
    "model is missing": lambda config: config.pop("model"),
    "model.decoder is missing": lambda config: config["model"].pop("decoder"),
    "eos_token_id is": lambda config: config["model"].update(eos_token_id=[]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_dangerous_configuration_is_refused_before_loading(
    model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime_genai.Model", None)
    change_config(model, CHANGES[name])
    with pytest.raises(VerificationError, match=name):
        generate(model, "hello", CONFIG)


def test_link_and_unlisted_files_are_refused(model: Path, tmp_path: Path) -> None:
    weights = model / "model.onnx.data"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationError, match=r"model\.onnx\.data is a link\n.*cp -rL"):
        generate(model, "hello", CONFIG)
    weights.unlink()
    (tmp_path / "elsewhere").rename(weights)
    open_model(model)
    manifest = open_model(model).manifest
    for name in ("model.onnx.data", "chat_template.jinja"):
        reseal(model, files=[file for file in manifest.files if file.path != name])
        with pytest.raises(VerificationError, match=f"does not list {name}"):
            generate(model, "hello", CONFIG)
    reseal(model, adapter="../adapter.onnx_adapter")
    with pytest.raises(VerificationError, match="not a listed file"):
        generate(model, "hello", CONFIG)


@pytest.mark.parametrize("merge", [False, True])
def test_prompts_are_encoded_as_the_adapters_rows_were(tmp_path: Path, merge: bool) -> None:
    """An adapter that was trained on raw prompts is asked with them, once it is exported; `raw` asks any model so."""
    source = bundle("grouped-query", "int4")
    plain = save_adapter(tmp_path / "plain", source)
    prompt = "is the lamp <|end|> on?"
    encoder = load_encoder(source.path, source.manifest.tokenizer)
    as_text = load_encoder(source.path, source.manifest.tokenizer, RowEncoding(content_as_text=True))
    asked = {
        RowEncoding(): encoder.encode_prompt([Message("user", prompt)]),
        RowEncoding(raw_prompts=True): encoder.encode_raw_prompt(prompt),
        RowEncoding(content_as_text=True): as_text.encode_prompt([Message("user", prompt)]),
        RowEncoding(raw_prompts=True, content_as_text=True): as_text.encode_raw_prompt(prompt),
    }
    assert len({tuple(ids) for ids in asked.values()}) == 4
    answers = set()
    for number, (encoding, ids) in enumerate(asked.items()):
        adapter = Path(shutil.copytree(plain, tmp_path / f"adapter{number}"))
        contract = read_manifest((adapter / MANIFEST).read_bytes(), AdapterManifest, MANIFEST)
        (adapter / MANIFEST).write_bytes(write_manifest(replace(contract, encoding=encoding)))
        model = tmp_path / f"model{number}"
        export(source, adapter, model, ExportConfig(merge=merge))
        expected = "".join(text_pieces(encoder, generate_ids(model, ids, 16)))
        assert "".join(generate(model, prompt, CONFIG)) == expected
        answers.add(expected)
        config = replace(CONFIG, raw=encoding.raw_prompts, content_as_text=encoding.content_as_text)
        other = "".join(text_pieces(encoder, generate_ids(tmp_path / "model0", ids, 16)))
        assert "".join(generate(tmp_path / "model0", prompt, config)) == other
    assert len(answers) > 1
    with pytest.raises(UsageError, match="the prompt is raw, so a system text has no place"):
        generate(tmp_path / "model1", prompt, CONFIG, system="be kind")


def test_what_the_prompt_and_the_template_do_not_get_along_with(model: Path) -> None:
    said: list[str] = []
    generate(model, "hello <|end|>", CONFIG, say=said.append)
    assert said == [Remark.CONTROL_TOKENS]
    generate(model, "hello <|end|>", replace(CONFIG, content_as_text=True), say=said.append)
    generate(model, "hello", CONFIG, say=said.append)
    assert len(said) == 1
    template = (shared_material() / "cases" / "template-without-system.jinja").read_bytes()
    (model / "chat_template.jinja").write_bytes(template)
    reseal(model, adapter=None)
    with pytest.raises(UsageError, match="leaves the system's text out"):
        generate(model, "hello", CONFIG, system="be kind")


# Several adapters, and sampling


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two adapters that answer differently, and a third that was trained on raw prompts."""
    source = bundle("grouped-query", "int4")
    folder = tmp_path_factory.mktemp("several")
    adapters = save_several(folder, source)
    export(source, adapters, folder / "model", ExportConfig(merge=False))
    for name, path in adapters.items():
        export(source, path, folder / f"only-{name}", ExportConfig(merge=False))
    return folder


def test_each_of_several_adapters_answers_as_it_does_alone(several: Path) -> None:
    def answer(model: Path | str, adapter: str | None = None) -> str:
        return "".join(generate(model, "is the lamp on?", replace(CONFIG, adapter=adapter)))

    alone = {name: answer(several / f"only-{name}") for name in ("first", "second", "raw")}
    alone["base"] = answer(bundle("grouped-query", "int4").path)
    assert len(set(alone.values())) == 4
    assert {name: answer(several / "model", name) for name in alone} == alone
    assert answer(several / "model") == alone["first"]
    assert answer(several / "only-second", "second") == alone["second"]
    assert answer(several / "only-second", "base") == alone["base"]
    assert open_model(several / "model").adapters == ["first", "second", "raw"]


def test_an_adapter_that_is_not_there_is_refused_by_name(several: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no adapter 'secand'; did you mean 'second'.*there are first, second, raw, base"
    ):
        generate(several / "model", "hello", replace(CONFIG, adapter="secand"))
    with pytest.raises(UsageError, match="has no adapters beside its base"):
        generate(bundle("grouped-query", "int4").path, "hello", replace(CONFIG, adapter="first"))


def test_a_manifest_that_lists_adapters_without_their_files_is_refused(several: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(several / "model", tmp_path / "model"))
    reseal(model, adapters={"first": RowEncoding(), "../../evil": RowEncoding()})
    with pytest.raises(VerificationError, match=r"adapters/\.\./\.\./evil\.onnx_adapter.*is not a listed file"):
        open_model(model)
    reseal(model, adapters={"second": RowEncoding()})
    with pytest.raises(VerificationError, match="is not one of its adapters"):
        open_model(model)


def test_drawn_tokens_follow_the_seed_and_the_likeliest_come_without_one() -> None:
    source = bundle("grouped-query", "int4").path

    def answer(**options: Any) -> str:
        return "".join(generate(source, "is the lamp on?", replace(CONFIG, **options)))

    greedy_answer = answer()
    drawn = [answer(temperature=1.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({greedy_answer, *drawn}) > 2
    assert answer(temperature=5.0, top_k=1, seed=4) == answer(temperature=5.0, top_p=1e-6, seed=5) == greedy_answer
    assert len({answer(temperature=1.0) for _ in range(4)}) > 1, "without a seed, others each time"


def test_a_temperature_flattens_the_probabilities() -> None:
    """Of the first token, against the softmax of PyTorch's logits: drawn often enough, shares are probabilities."""
    import torch

    source = bundle("multi-head", "fp32")
    prompt, temperature, draws = [5, 6, 7], 4.0, 300
    with torch.no_grad():
        logits = torch_model("multi-head", source.path)(torch.tensor([prompt])).logits[0, -1]
    probabilities = torch.softmax(logits / temperature, -1).numpy()
    likeliest = np.argsort(-probabilities)[:5]
    opened = open_model(source)
    loaded = LoadedModel(opened, None)
    found = np.zeros(len(probabilities))
    for seed in range(draws):
        search = SearchConfig(max_new_tokens=1, temperature=temperature, top_k=5, seed=seed)
        for token in loaded.stream(prompt, search, opened.answering()):
            found[token] += 1
    expected = probabilities[likeliest] / probabilities[likeliest].sum()
    assert found[likeliest].sum() == draws
    # Three standard deviations of a share.
    assert found[likeliest] / draws == pytest.approx(expected, abs=3 * 0.5 / draws**0.5)
