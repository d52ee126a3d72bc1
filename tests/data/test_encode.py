"""Token ids and labels against transformers, for tokenizers of both Phi-3 kinds."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from edgetune.data import template as templates
from edgetune.data.encode import IGNORED, Encoder, Remark, load_encoder
from edgetune.data.examples import Examples, load_examples
from edgetune.data.rows import ChatRow, CompletionRow, Message, TextRow
from edgetune.data.template import ChatTemplate
from edgetune.errors import DataError, EdgetuneError, IncompatibleError, UsageError
from edgetune.formats import bundle as bundles
from edgetune.formats.manifest import BaseModel, BundleManifest, RowEncoding
from edgetune.formats.storage import sha256_of
from edgetune.host.rope_config import rope_from_config
from edgetune.model.architecture import Architecture
from edgetune.model.lora import Lora
from edgetune.preview import preview
from support.chat_templates import BARE_TEMPLATES, ENDED, TEMPLATES
from support.tokenizer_models import (
    EOS,
    KINDS,
    MANIFEST,
    Model,
    bytes_kind,
    dicts,
    tokenizer_model,
    trained_runs,
    turns,
)

Models = Callable[[str, str | None], Model]


@pytest.fixture
def model() -> Models:
    return tokenizer_model


CONVERSATIONS = {
    "one turn": turns("turn the lamp off", "the lamp is off now"),
    "three turns": turns("hello", "hello there", "what is on?", "the lamp", "yes?", "yes"),
    "system": turns("hello", "the answer is yes", system="the kitchen"),
    "emoji": turns("🙂?", "🙂👩‍👩‍👧 é ﬁ 中文", "and 🙂", "🙂"),
    "the answer repeats the question": turns("yes", "yes", "yes", "yes"),
    "lines": turns("the\n\nlamp ", "the answer:\n\n  - yes\n  - on", "hello\n", "yes\tand\u00a0now"),
    "ends in user": turns("hello", "yes", "and now?"),
    "two answers": (Message("user", "hello"), Message("assistant", "yes"), Message("assistant", "and now")),
    "empty question": turns("", "yes"),
    "special tokens inside": turns("say <|end|>", "it is <|end|> and <|user|> yes"),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_chat_is_encoded_as_transformers_does(model: Models, kind: str, name: str, conversation: str) -> None:
    """Ids, and the tokens that `{% generation %}` marks in the oracle's template, which edgetune does not look at."""
    made, messages = model(kind, TEMPLATES[name]), CONVERSATIONS[conversation]
    example = made.encoder.encode(ChatRow(1, messages))
    assert example.input_ids == made.oracle.apply_chat_template(dicts(messages))
    # The oracle's template marks everything that any role says; look at one answer at a time.
    marked = made.oracle.apply_chat_template(
        dicts(messages),
        chat_template=TEMPLATES[name].replace(
            ENDED, f"{{% if message['role'] == 'assistant' %}}{ENDED}{{% else %}}{_bare(ENDED)}{{% endif %}}"
        ),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert marked["input_ids"] == example.input_ids
    trained = [int(label != IGNORED) for label in example.labels]
    assert trained == marked["assistant_masks"]
    end = made.oracle.convert_tokens_to_ids("<|end|>")
    answers = [message for message in messages if message.role == "assistant"]
    assert all(run[-1] == end for run in trained_runs(example.input_ids, example.labels))
    spoken = made.oracle.decode([label for label in example.labels if label != IGNORED])
    expected = "".join(answer.content + "<|end|>" for answer in answers)
    assert spoken.replace(" ", "") == expected.replace(" ", "")  # decoding moves spaces around special tokens


def _bare(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_what_training_saw_before_the_answer(model: Models, kind: str, name: str) -> None:
    made, messages = model(kind, TEMPLATES[name]), turns("hello", "yes, it is on", system="the kitchen")
    prompt = made.encoder.encode_prompt(messages[:-1])
    assert prompt == made.oracle.apply_chat_template(dicts(messages[:-1]), add_generation_prompt=True)
    example = made.encoder.encode(ChatRow(1, messages))
    assert example.input_ids[: len(prompt)] == prompt
    assert set(example.labels[: len(prompt)]) == {IGNORED}
    assert example.labels[len(prompt)] != IGNORED
    assert made.encoder.decode([label for label in example.labels if label != IGNORED]) == "yes, it is on"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(
        st.text(max_size=12) | st.sampled_from(["<|end|>", " <|assistant|>\n", "▁", " yes ", "hello\n"]),
        min_size=2,
        max_size=5,
    ),
    kind=st.sampled_from(sorted(KINDS)),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_any_conversation(model: Models, contents: list[str], kind: str, name: str) -> None:
    """Ids as transformers', only whole tokens of answers trained, each answer with its end."""
    made, messages = model(kind, TEMPLATES[name]), turns(*contents)
    answers = [message.content for message in messages if message.role == "assistant"]
    assume(all(answer.strip() for answer in answers))
    example = made.encoder.encode(ChatRow(1, messages))
    assert example.input_ids == made.oracle.apply_chat_template(dicts(messages))
    ends = example.labels.count(made.oracle.convert_tokens_to_ids("<|end|>"))
    assert ends >= len(answers)
    assert example.trained_tokens >= len(answers)


def test_white_space_that_a_special_token_swallows_is_not_trained(model: Models) -> None:
    made = model("llama", TEMPLATES["headed"])
    example = made.encoder.encode(ChatRow(1, turns("hello", "\n  yes \n")))
    (run,) = trained_runs(example.input_ids, example.labels)
    assert made.oracle.convert_ids_to_tokens(run)[-1] == "<|end|>"
    assert made.oracle.decode(run).startswith("yes")


OTHER_TEMPLATES = {
    "strips": "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "newline after the prompt": "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content }}"
    "{{ '\\n<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "no prompt": "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}",
    "whole conversations only": "{% if messages[-1].role != 'assistant' or not messages[1] %}"
    "{{ raise_exception('no answer') }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}",
}


ANSWERS = {
    "newline after the prompt": ("yes\n<|end|>", "itison\n<|end|>"),
    # Nothing asks for an answer: the model has to write its own header, as `generate` asks without it.
    "no prompt": ("<|assistant|>yes<|end|>", "<|assistant|>itison<|end|>"),
}


@pytest.mark.parametrize("name", OTHER_TEMPLATES)
def test_other_templates(model: Models, name: str) -> None:
    made, messages = model("bytes", OTHER_TEMPLATES[name]), turns(" yes ", " yes ", "yes", "it is on")
    example = made.encoder.encode(ChatRow(1, messages))
    assert example.input_ids == made.oracle.apply_chat_template(dicts(messages))
    runs = trained_runs(example.input_ids, example.labels)
    assert [made.oracle.decode(run).replace(" ", "").strip() for run in runs] == [
        made.oracle.decode(made.oracle.encode(text)).replace(" ", "").strip()
        for text in ANSWERS.get(name, ("yes<|end|>", "itison<|end|>"))
    ]


@pytest.mark.parametrize("end", ["<|end|>", "\n\n"])
def test_a_long_conversation_takes_no_time(model: Models, end: str) -> None:
    made = model("llama", TEMPLATES["headed"].replace("<|end|>", end.replace("\n", "\\n")))
    started = time.monotonic()
    example = made.encoder.encode(ChatRow(1, turns(*["yes " * 250] * 200)))
    assert len(trained_runs(example.input_ids, example.labels)) == 100
    assert len(example.input_ids) > 40_000
    assert time.monotonic() - started < 10


def test_where_text_alone_closes_answers_the_last_one_ends_with_the_end_of_the_sequence(model: Models) -> None:
    template = "{% for message in messages %}{{ message.role }}:\n{{ message.content }}\n\n{% endfor %}"
    made = model("bytes", template + "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}")
    example = made.encoder.encode(ChatRow(1, turns("hello", "yes", "and", "no")))
    rendered = made.oracle.apply_chat_template(dicts(turns("hello", "yes", "and", "no")))
    assert example.input_ids == [*rendered, made.oracle.eos_token_id]
    first, last = trained_runs(example.input_ids, example.labels)
    assert made.oracle.decode(first).strip() == "yes"
    assert made.oracle.decode(last) == f"no\n\n{EOS}"


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ m.content | reverse }}<|end|>{% endfor %}", "{{ messages[0].content }}", "nothing"],
)
def test_an_answer_that_the_template_does_not_show_is_a_problem_of_its_row(
    model: Models, template: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *({"messages": dicts(turns("hello", "yes"))} for _ in range(2)))
    with pytest.raises(DataError) as caught:
        load_examples(path, model("bytes", template).encoder, 100, truncate=False)
    first, second = caught.value.problems
    reason = "changes the answer in turn 2" if "reverse" in template else "shows no answer"
    assert first.startswith(f"{path}:1: the chat template {reason}")
    assert second == first.replace(f"{path}:1:", f"{path}:2:")


RENDERED = {
    **TEMPLATES,
    **OTHER_TEMPLATES,
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'a': '<é>'} | tojson(ensure_ascii=True) }}",
    "date": "{{ strftime_now('%Y') }}",
    "loop controls": "{% for m in messages %}\n  {% if loop.last %}\n{% break %}{% endif %}{{ m.role }}\n{% endfor %}",
    "undefined": "{{ tools is none }}{{ documents is none }}{{ absent is defined }}{{ absent }}{{ eos_token }}",
    "methods": "{{ messages[0]['content'].upper().split('L') | join('-') }}{% set x = namespace(a=1) %}{{ x.a }}",
}


@pytest.mark.parametrize("name", RENDERED)
def test_text_is_that_of_transformers(model: Models, name: str) -> None:
    made, messages = model("bytes", None), turns("hello 🙂", "yes & <b>no</b>", system="the 'kitchen'")
    template = ChatTemplate(RENDERED[name], "<s>", EOS)
    for prompt in (False, True) if name != "whole conversations only" else (False,):
        expected = made.oracle.apply_chat_template(
            dicts(messages), chat_template=RENDERED[name], tokenize=False, add_generation_prompt=prompt
        )
        assert template.render(messages, add_generation_prompt=prompt) == expected


def test_without_bos_token_it_is_undefined() -> None:
    template = ChatTemplate("{{ bos_token is defined }}", None, EOS)
    assert template.render(turns("a"), add_generation_prompt=False) == "False"


HOSTILE = {
    "syntax": "{% for %}",
    "unknown filter": "{{ 1 | nonsense }}",
    "undefined": "{{ absent.absent }}",
    "type": "{{ 1 + 'a' }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "change": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "big range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "product": "{{ 'x' * 10 ** 12 }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "width": "{{ '%1000000000000d' % 1 }}",
    "flood": "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_neither_hangs_nor_floods(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "TIME_LIMIT", 1.0)
    template = ChatTemplate(HOSTILE[name], "<s>", EOS)
    for _ in range(2):  # the second time it fails in the same way, and not because the first one broke something
        started = time.monotonic()
        with pytest.raises(IncompatibleError, match=r"chat template is broken \(.+\)"):
            template.render(turns("hello"), add_generation_prompt=False)
        assert time.monotonic() - started < 5


def test_a_template_works_again_after_it_was_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "{% if messages | length > 1 %}" + HOSTILE["loops"] + "{% endif %}fine"
    template = ChatTemplate(slow, None, EOS)
    assert template.render(turns("a"), add_generation_prompt=False) == "fine"
    with monkeypatch.context() as patch:
        patch.setattr(templates, "TIME_LIMIT", 0.5)
        with pytest.raises(IncompatibleError, match=r"does not finish in 0\.5 seconds"):
            template.render(turns("a", "b"), add_generation_prompt=False)
    assert template.render(turns("a"), add_generation_prompt=False) == "fine"


def test_the_process_ends_with_the_template() -> None:
    template = ChatTemplate("fine", None, EOS)
    template.render(turns("a"), add_generation_prompt=False)
    process = template._process
    assert process is not None and process.poll() is None
    del template
    gc.collect()
    assert process.poll() is not None


@pytest.mark.parametrize("kind", KINDS)
def test_completions_and_texts(model: Models, kind: str) -> None:
    made = model(kind, None)
    for prompt, completion in [("the lamp", " is on"), ("", "yes"), ("🙂", "🙂"), ("the answer: ", "yes")]:
        example = made.encoder.encode(CompletionRow(3, prompt, completion))
        text = made.encoder.encode(TextRow(3, prompt + completion))
        expected = made.oracle(prompt + completion)["input_ids"] + [made.oracle.eos_token_id]
        assert example.line == 3
        assert example.input_ids == text.input_ids == text.labels == expected
        (run,) = trained_runs(example.input_ids, example.labels)
        assert run[-1] == made.oracle.eos_token_id
        decoded = made.oracle.decode(run[:-1]).strip()
        # "▁yes" and " yes" hold the prompt's last space: such a token belongs to both and is not trained
        assert decoded == completion.strip() or (prompt.endswith(" ") and decoded in completion)


def test_a_token_that_straddles_prompt_and_completion_is_not_trained(model: Models) -> None:
    made = model("bytes", None)
    assert len(made.oracle.encode("the answer")) < len(made.oracle.encode("the ans")) + len(made.oracle.encode("wer"))
    example = made.encoder.encode(CompletionRow(1, "the ans", "wer"))
    assert [label for label in example.labels if label != IGNORED] == [made.oracle.eos_token_id]


def test_an_answer_ends_with_its_token_where_the_tokenizer_trims_spaces_off() -> None:
    tokenizer = bytes_kind()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoder = Encoder(tokenizer, tokenizer.token_to_id(EOS), ChatTemplate(BARE_TEMPLATES["dense"], None, EOS))
    example = encoder.encode(ChatRow(1, turns("hello", "yes ")))
    [run] = trained_runs(example.input_ids, example.labels)
    assert run[-1] == tokenizer.token_to_id("<|end|>")


def test_the_end_of_a_text_is_not_written_twice(model: Models) -> None:
    encoder = model("bytes", None).encoder
    assert encoder.encode(TextRow(1, f"yes{EOS}")).input_ids == encoder.encode(TextRow(1, "yes")).input_ids


def test_specials_that_the_tokenizer_puts_around_a_text(model: Models, tmp_path: Path) -> None:
    tokenizer = bytes_kind()
    eos = tokenizer.token_to_id(EOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {EOS}", special_tokens=[("<s>", tokenizer.token_to_id("<s>")), (EOS, eos)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    example = load_encoder(tmp_path, MANIFEST).encode(CompletionRow(1, "", "yes"))
    assert example.input_ids.count(eos) == 1 and example.labels[-1] == eos
    assert example.labels[0] == IGNORED
    assert example.labels[1:] == example.input_ids[1:]


def test_a_model_without_template_says_how_to_go_on(model: Models) -> None:
    encoder = model("bytes", None).encoder
    with pytest.raises(IncompatibleError, match=r'no chat template.*"completion"'):
        encoder.encode(ChatRow(1, turns("a", "b")))
    with pytest.raises(IncompatibleError, match="no chat template"):
        encoder.encode_prompt(turns("a"))


def test_text_that_is_no_text(model: Models) -> None:
    made = model("bytes", TEMPLATES["dense"])
    with pytest.raises(DataError, match=r"\\udcff"):
        made.encoder.encode_prompt(turns("a\udcff"))


def test_decode(model: Models) -> None:
    for kind in KINDS:
        made = model(kind, None)
        ids = made.oracle.encode("<|user|>the lamp 🙂<|end|>", add_special_tokens=False)
        assert made.encoder.decode(ids) == "the lamp 🙂"
        assert "<|end|>" in made.encoder.decode(ids, skip_special_tokens=False)


def test_truncation_and_padding_of_the_tokenizer_file_are_off(tmp_path: Path) -> None:
    tokenizer = bytes_kind()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    example = load_encoder(tmp_path, MANIFEST).encode(TextRow(1, "the lamp is on"))
    assert 2 < len(example.input_ids) < 64


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"tokenizer\.json: not a tokenizer"):
        load_encoder(tmp_path, MANIFEST)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(IncompatibleError, match=r"tokenizer\.json: not a tokenizer"):
        load_encoder(tmp_path, MANIFEST)
    bytes_kind().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(IncompatibleError, match="'</s>'"):
        load_encoder(tmp_path, replace(MANIFEST, eos_token="</s>"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(IncompatibleError, match="not UTF-8"):
        load_encoder(tmp_path, MANIFEST)


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PICKY = "{% if messages[0].role != 'user' %}{{ raise_exception('user first, please') }}{% endif %}" + TEMPLATES["dense"]


def test_problems_of_rows_are_told_with_their_place(model: Models, tmp_path: Path) -> None:
    encoder = model("bytes", PICKY).encoder
    fine = {"messages": dicts(turns("hello", "yes"))}
    refused = {"messages": dicts(turns("hello", "yes", system="the kitchen"))}
    path = write_rows(tmp_path / "rows.jsonl", fine, refused, fine, refused)
    with pytest.raises(DataError) as caught:
        load_examples(path, encoder, 100, truncate=False)
    assert caught.value.problems == [
        f"{path}:{line}: the chat template refuses this conversation: user first, please" for line in (2, 4)
    ]


def test_rows_that_do_not_fit_the_model_are_told_with_their_place(model: Models, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"messages": dicts(turns("hello", "yes"))})
    with pytest.raises(IncompatibleError, match=r"rows\.jsonl:1: the model has no chat template"):
        load_examples(path, model("bytes", None).encoder, 100, truncate=False)
    with pytest.raises(UsageError):
        load_examples(tmp_path / "absent", model("bytes", None).encoder, 100, truncate=False)


def test_everything_masked(model: Models, tmp_path: Path) -> None:
    """An answer that the header's token swallows whole leaves nothing to train."""
    made = model("llama", "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="no token of this row would be trained"):
        made.encoder.encode(ChatRow(1, (Message("assistant", " "), Message("user", "hello"))))


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path / "rows.jsonl",
        {"prompt": "yes", "completion": " yes"},
        {"prompt": "yes", "completion": " 1234567890"},
        {"prompt": "1234567890", "completion": " yes"},
    )


def test_long_rows_are_left_out_and_counted(model: Models, long_rows: Path) -> None:
    encoder = model("bytes", None).encoder
    lengths = [len(example.input_ids) for example in load_examples(long_rows, encoder, 100, truncate=False).examples]
    assert lengths[0] < 8 < min(lengths[1:])
    found = load_examples(long_rows, encoder, lengths[0], truncate=False)
    assert [example.line for example in found.examples] == [1]
    assert found == Examples(
        found.examples,
        3,
        2,
        0,
        found.examples[0].trained_tokens,
        RowEncoding(),
        [],
    )
    whole = load_examples(long_rows, encoder, max(lengths), truncate=False)
    assert not whole.too_long
    assert whole.trained_tokens == sum(example.trained_tokens for example in whole.examples)


def test_long_rows_are_cut_where_something_is_left_to_train(model: Models, long_rows: Path) -> None:
    encoder = model("bytes", None).encoder
    whole = load_examples(long_rows, encoder, 100, truncate=False).examples
    found = load_examples(long_rows, encoder, 6, truncate=True)
    assert [example.line for example in found.examples] == [1, 2]
    assert found.examples[1].input_ids == whole[1].input_ids[:6]
    assert found.examples[1].labels == whole[1].labels[:6]
    assert (found.truncated, found.too_long) == (1, 1)


@pytest.mark.parametrize("truncate", [False, True])
def test_nothing_left(model: Models, long_rows: Path, truncate: bool) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: all 3 rows are longer than 1 tokens") as caught:
        load_examples(long_rows, model("bytes", None).encoder, 1, truncate=truncate)
    assert ("--truncate" in str(caught.value)) != truncate


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.text(max_size=8), max_size=4), template=st.sampled_from([PICKY, TEMPLATES["opened"], None]))
def test_no_row_brings_anything_but_an_edgetune_error(
    model: Models, tmp_path: Path, data: list[str], template: str | None
) -> None:
    roles = ["assistant", "user", "system", "assistant"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, data, strict=False)]
    path = write_rows(tmp_path / "rows.jsonl", {"messages": messages})
    try:
        load_examples(path, model("llama", template).encoder, 30, truncate=True)
    except EdgetuneError as error:
        assert str(error).startswith(f"{path}:1: ")


@pytest.mark.parametrize("kind", KINDS)
def test_preview(model: Models, kind: str, tmp_path: Path) -> None:
    made = model(kind, TEMPLATES["headed"])
    data = write_rows(
        tmp_path / "rows.jsonl",
        {"messages": dicts(turns("hello 🙂", "🙂 the lamp", "and", "yes"))},
        {"messages": dicts(turns("hello", "yes " * 80))},
    )
    folder = seal(made, tmp_path / "bundle", max_length=60)
    first, second = preview(folder, data, say=pytest.fail)
    assert (first.line, second.line, first.too_long, second.too_long) == (1, 2, False, True)
    example = made.encoder.encode(ChatRow(1, turns("hello 🙂", "🙂 the lamp", "and", "yes")))
    assert (first.input_ids, first.labels) == (example.input_ids, example.labels)
    assert [piece.text.strip() for piece in first.pieces if piece.trained] == ["🙂 the lamp<|end|>", "yes<|end|>"]
    assert "".join(piece.text for piece in first.pieces) == made.oracle.decode(first.input_ids)


def seal(made: Model, folder: Path, max_length: int) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_bytes((made.folder / name).read_bytes())
    rope = rope_from_config({"hidden_size": 32, "num_attention_heads": 4})
    manifest = BundleManifest(
        format="edgetune-bundle",
        format_version=1,
        base=BaseModel("tiny", "0" * 64, "fp32"),
        architecture=Architecture(32, 64, 1, 4, 4, 8, 420, 4096, None, False, rope),
        tokenizer=replace(
            MANIFEST,
            sha256=sha256_of(folder / "tokenizer.json"),
            chat_template_sha256=sha256_of(folder / "chat_template.jinja"),
        ),
        lora=Lora(8, 16.0, ["o_proj"], []),
        max_length=max_length,
        graphs=[],
        gradient_coverage={},
        provenance={},
        files=bundles.list_files(folder, without="manifest.json"),
    )
    bundles.seal_bundle(folder, manifest)
    return folder


@pytest.mark.parametrize("name", [*BARE_TEMPLATES, "closed by text"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_of_weight_zero_is_read_and_not_trained(model: Models, kind: str, name: str) -> None:
    text = "{% for m in messages %}### {{ m.role }}:\n{{ m.content + '\n\n' }}{% endfor %}"
    made = model(kind, BARE_TEMPLATES.get(name, text))
    messages = turns("hello", "yes", "and now?", "no, it is off")
    full = made.encoder.encode(ChatRow(1, messages))
    runs = trained_runs(list(full.input_ids), list(full.labels))
    assert len(runs) == 2
    for silent, spoken in ((1, 1), (3, 0)):
        weighed = tuple(replace(turn, trained=index != silent) for index, turn in enumerate(messages))
        found = made.encoder.encode(ChatRow(1, weighed))
        assert trained_runs(list(found.input_ids), list(found.labels)) == [runs[spoken]]
        # What no template closes has no end of the sequence either where it is not trained.
        assert found.input_ids == full.input_ids[: len(found.input_ids)]
        assert len(full.input_ids) - len(found.input_ids) in ((0, 1) if silent == 3 else (0,))


@pytest.mark.parametrize("content_as_text", [False, True])
def test_tools_of_the_system_turn_are_shown_where_the_template_has_a_place_for_them(content_as_text: bool) -> None:
    encoding = RowEncoding(content_as_text=content_as_text)
    messages = turns("hello", "yes", system="the kitchen")
    told = (replace(messages[0], tools='[{"name": "lamp"}]'), *messages[1:])
    made = tokenizer_model("bytes", BARE_TEMPLATES["dense"])
    shown = made.encodes(encoding).encode(ChatRow(1, told))
    oracle = [
        {**turn, "tools": message.tools} if message.tools else turn
        for turn, message in zip(dicts(told), told, strict=True)
    ]
    assert shown.input_ids == made.oracle.apply_chat_template(oracle)
    assert '{"name": "lamp"}' in made.encoder.decode(shown.input_ids)
    assert Remark.TOOLS_LEFT_OUT not in shown.remarks
    other = tokenizer_model("bytes", BARE_TEMPLATES["headed"]).encodes(encoding)
    assert other.encode(ChatRow(1, told)).remarks == {Remark.TOOLS_LEFT_OUT}
    assert other.encode(ChatRow(1, messages)).remarks == frozenset()


def test_further_keys_are_told_once_for_a_file(tmp_path: Path) -> None:
    made, path = tokenizer_model("bytes", BARE_TEMPLATES["dense"]), tmp_path / "rows.jsonl"
    rows = [{"text": "a"}, {"text": "b", "id": 1}, {"text": "c", "id": 2, "source": "d"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_examples(path, made.encoder, 100, truncate=False)
    assert loaded.notices == [f'{path}:2: further keys are ignored: "id", "source" (in 2 of 3 rows, this is the first)']
