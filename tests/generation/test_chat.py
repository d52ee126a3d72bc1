"""A conversation: transformers' answer to all turns, turns that are left out, adapters that change, and stopping."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.config import ChatConfig, ExportConfig
from edgetune.data.encode import load_encoder
from edgetune.errors import UsageError
from edgetune.exporting import export
from edgetune.generation.chat import Chat
from edgetune.generation.pieces import text_pieces
from support.several_adapters import save_several
from support.tiny_phi3 import bundle, checkpoint, greedy, torch_model

CONFIG = ChatConfig(max_new_tokens=12)


def torch_answer(messages: list[tuple[str, str]]) -> str:
    """PyTorch's, to what transformers makes of the messages."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint("grouped-query"))
    turns = [{"role": role, "content": content} for role, content in messages]
    ids = [int(token) for token in tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)]
    source = bundle("grouped-query", "int4")
    answer = greedy(torch_model("grouped-query", source.path), ids, 12)
    return "".join(text_pieces(load_encoder(source.path, source.manifest.tokenizer), answer))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two adapters for conversations, and one for raw prompts."""
    source = bundle("grouped-query", "int4")
    folder = tmp_path_factory.mktemp("several")
    export(source, save_several(folder, source), folder / "model", ExportConfig(merge=False))
    return folder / "model"


def test_each_answer_is_given_to_all_turns_before_it() -> None:
    chat = Chat(bundle("grouped-query", "int4"), CONFIG, system="tell me the answer")
    told = [("system", "tell me the answer")]
    for said in ("is the lamp on?", "turn it off", "hello world"):
        told.append(("user", said))
        answer = "".join(chat.answer(said))
        assert answer == torch_answer(told)
        told.append(("assistant", answer))
    assert [(turn.role, turn.content) for turn in chat.turns] == told[1:]
    chat.reset()
    assert chat.turns == ()
    assert "".join(chat.answer("is the lamp on?")) == torch_answer(told[:2])


def test_the_oldest_turns_are_left_out_and_that_is_said() -> None:
    told: list[str] = []
    chat = Chat(bundle("grouped-query", "int4"), CONFIG, say=told.append)
    questions = [f"is the lamp in the kitchen on now, {number}?" for number in range(12)]
    for question in questions:
        list(chat.answer(question))
    assert told and all("oldest turns are left out: the model takes 256 tokens" in line for line in told)
    assert 4 <= len(chat.turns) < 24
    assert chat.turns[0].role == "user"
    assert [turn.content for turn in chat.turns[::2]] == questions[-len(chat.turns) // 2 :]
    messages = [(turn.role, turn.content) for turn in chat.turns]
    assert messages[-1][1] == torch_answer(messages[:-1])
    before = chat.turns
    with pytest.raises(UsageError, match="shorten it"):
        list(chat.answer("what is it? " * 200))
    assert chat.turns == before, "what was refused is not remembered, and nothing is forgotten for it"


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_was_said() -> None:
    chat = Chat(bundle("grouped-query", "int4"), CONFIG)
    pieces = chat.answer("is the lamp on?")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert [turn.content for turn in chat.turns] == ["is the lamp on?", said]
    answer = "".join(chat.answer("go on"))
    assert answer == torch_answer([("user", "is the lamp on?"), ("assistant", said), ("user", "go on")])


def test_adapters_change_within_a_conversation(several: Path) -> None:
    chat = Chat(several, CONFIG)
    assert (chat.adapter, chat.adapters) == ("first", ["first", "second", "raw"])
    answers = {}
    for name in ("first", "second", "base"):
        chat.reset()
        chat.use(name)
        answers[name] = "".join(chat.answer("is the lamp on?"))
        alone = Chat(several, replace(CONFIG, adapter=name))
        assert "".join(alone.answer("is the lamp on?")) == answers[name]
    assert len(set(answers.values())) == 3
    assert answers["base"] == torch_answer([("user", "is the lamp on?")])
    for name, why in (
        ("raw", "adapter raw was trained on raw prompts, so it holds no conversation"),
        ("x", "no adapter 'x'"),
    ):
        with pytest.raises(UsageError, match=why):
            chat.use(name)
    assert chat.adapter == "base"
    assert len(chat.turns) == 2


def test_a_model_without_a_template_holds_no_conversation(tmp_path: Path) -> None:
    from edgetune.formats.bundle import list_files, load_bundle, seal_bundle

    source = bundle("grouped-query", "int4")
    folder = Path(shutil.copytree(source.path, tmp_path / "bundle"))
    (folder / "chat_template.jinja").unlink()
    seal_bundle(folder, replace(source.manifest, files=list_files(folder, without="manifest.json")))
    with pytest.raises(UsageError, match="has no chat template, so it holds no conversation"):
        Chat(load_bundle(folder), CONFIG)
