"""Which tokens of a conversation are trained, over forms of chat templates, against rendering its prefixes.

The oracle is transformers: it renders the conversation, and for each answer the earlier turns with the generation
prompt. Each form says what it writes for an answer; the tokens of that, and no others, are trained.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgetune.data import template as templates
from edgetune.data.control_tokens import ContentAsText, ControlTokens
from edgetune.data.encode import IGNORED, Encoder, Remark, load_encoder
from edgetune.data.examples import load_examples
from edgetune.data.rows import ChatRow, CompletionRow, Message, TextRow
from edgetune.data.template import ChatTemplate
from edgetune.errors import DataError, IncompatibleError
from edgetune.formats.manifest import RowEncoding
from edgetune.formats.manifest import Tokenizer as TokenizerManifest
from edgetune.preparation.conversations import Conversations, try_conversations
from support.shared_material import shared_material
from support.tokenizer_models import EOS, KINDS, bytes_kind, dicts, tokenizer_model, turns

Shown = Callable[[int, Sequence[Message]], str | None]


def as_it_is(index: int, messages: Sequence[Message]) -> str | None:
    return messages[index].content


def trimmed(index: int, messages: Sequence[Message]) -> str | None:
    return messages[index].content.strip()


def last_pair_only(index: int, messages: Sequence[Message]) -> str | None:
    return messages[index].content if index == len(messages) - 1 else None


def without_earlier_thoughts(index: int, messages: Sequence[Message]) -> str | None:
    content = messages[index].content
    return content if index == len(messages) - 1 else content.rsplit("</think>", 1)[-1].lstrip("\n")


def with_empty_thoughts(index: int, messages: Sequence[Message]) -> str | None:
    thoughts = "<think>\n\n</think>\n\n" if index == len(messages) - 1 else ""
    return thoughts + messages[index].content


@dataclass(frozen=True)
class Form:
    template: str
    closing: str
    """What closes an answer, up to the special token that the model learns to end with, or all of it."""
    special: bool = True
    """Whether `closing` ends with a special token; otherwise the last answer ends with the end of the sequence."""
    shown: Shown = as_it_is
    """What is written for an answer between prompt and closing; none where it is left out."""


HEADER = "{{ '<|' + m.role + '|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
FORMS = {
    "by token": Form(f"{{% for m in messages %}}{HEADER}{{{{ m.content }}}}<|end|>\n{{% endfor %}}{PROMPT}", "<|end|>"),
    "by token, then the end of the sequence": Form(
        f"{{% for m in messages %}}{HEADER}{{{{ m.content }}}}<|end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "by token after a line": Form(
        f"{{% for m in messages %}}{HEADER}{{{{ m.content + '\n' }}}}<|end|>\n{{% endfor %}}{PROMPT}", "\n<|end|>"
    ),
    "by the end of the sequence": Form(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content + eos_token }}"
        "{% else %}[{{ m.role }}] {{ m.content }} [/{{ m.role }}]{% endif %}{% endfor %}",
        EOS,
        shown=lambda index, messages: f" {messages[index].content}",
    ),
    "by text": Form(
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
        "\n\n",
        special=False,
    ),
    "by text, the next turn begins with a token": Form(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "\n",
        special=False,
    ),
    "by a tag": Form(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        "</assistant>\n",
        special=False,
    ),
    "system dropped": Form(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}",
        "<|end|>",
    ),
    "system merged into the user's turn": Form(
        "{% set n = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set n.system = m.content + '\n\n' %}{% elif m.role == 'user' %}"
        "{{ '<|user|>' + n.system + m.content + '<|end|>' }}{% set n.system = '' %}"
        "{% else %}{{ '<|assistant|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|end|>",
    ),
    "trimmed": Form(
        f"{{% for m in messages %}}{HEADER}{{{{ m.content | trim }}}}<|end|>\n{{% endfor %}}{PROMPT}",
        "<|end|>",
        shown=trimmed,
    ),
    "thoughts of earlier answers cut off": Form(
        f"{{% for m in messages %}}{HEADER}{{% if m.role == 'assistant' and not loop.last %}}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
        f"{PROMPT}",
        "<|end|>",
        shown=without_earlier_thoughts,
    ),
    "empty thoughts written": Form(
        f"{{% for m in messages %}}{HEADER}{{% if m.role == 'assistant' and loop.last %}}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
        f"{PROMPT}",
        "<|end|>",
        shown=with_empty_thoughts,
    ),
    "generation tags": Form(
        f"{{% for m in messages %}}{HEADER}{{% if m.role == 'assistant' %}}{{% generation %}}{{{{ m.content }}}}<|end|>"
        f"{{% endgeneration %}}{{% else %}}{{{{ m.content }}}}<|end|>{{% endif %}}{{{{ '\n' }}}}{{% endfor %}}{PROMPT}",
        "<|end|>",
    ),
    "strict alternation": Form(
        "{% set turns = messages[1:] if messages and messages[0].role == 'system' else messages %}"
        "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}"
        f"{HEADER}{{{{ m.content }}}}<|end|>\n{{% endfor %}}{PROMPT}",
        "<|end|>",
    ),
    "tests how a content ends": Form(
        f"{{% for m in messages %}}{HEADER}{{{{ m.content }}}}{{% if m.role == 'user' and m.content.endswith('?') %}}"
        f"(a question){{% endif %}}<|end|>\n{{% endfor %}}{PROMPT}",
        "<|end|>",
    ),
    "only the last pair": Form(
        f"{{% for m in messages[-1:] if add_generation_prompt %}}{HEADER}{{{{ m.content }}}}<|end|>\n{{% endfor %}}"
        f"{{% for m in messages[-2:] if not add_generation_prompt %}}{HEADER}{{{{ m.content }}}}<|end|>\n{{% endfor %}}"
        f"{PROMPT}",
        "<|end|>",
        shown=last_pair_only,
    ),
}
CONVERSATIONS = {
    "one turn": turns("turn the lamp off", "the lamp is off now"),
    "three turns": turns("hello", "hello there", "what is on?", "the lamp", "yes?", "yes"),
    "system": turns("hello", "the answer is yes", "and now?", "no", system="the kitchen"),
    "repeated": turns("yes", "yes", "yes", "yes", "yes", "yes", system="yes"),
    "the system says the answer, then the user": turns("is it on?", "yes", "yes or no?", "no", system="yes"),
    "repeats the system's text": turns("repeat your system prompt", "be brief.", system="be brief."),
    "empty question": turns("", "yes", "", "no"),
    "nested": turns("on", "on on", "on on on", "on", "off on", "on off on"),
    "begins like another": turns("a", "yes", "yes, it is", "yes, it is on", "yes", "yes, it"),
    "control tokens": turns("say <|end|>\n<|assistant|>\n", "it is <|end|>", "<|end|>", f"<|user|> {EOS} yes"),
    "headers as text": turns("### assistant:\n", "### user:\nyes", "</assistant>", "<assistant>yes</assistant>\n"),
    "white space": turns(" the lamp ", "\n the answer:\n\n - yes \n", "hello\n", "  yes\tand "),
    "thoughts": turns("hello", "<think>\nhello\n</think>\n\nyes", "now?", "<think>\nnow?\n</think>\n\nno"),
    "ends in user": turns("hello", "yes", "and now?"),
    "emoji": turns("🙂?", "🙂👩‍👩‍👧 é ﬁ 中文", "and 🙂", "🙂"),
}


PAIRS = [
    (name, conversation)
    for name in FORMS
    for conversation in CONVERSATIONS
    # This pair shows an answer without its question.
    if (name, conversation) != ("only the last pair", "ends in user")
]


@pytest.mark.parametrize(("name", "conversation"), PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_prompt_up_to_its_closing_is_trained(kind: str, name: str, conversation: str) -> None:
    form, messages = FORMS[name], CONVERSATIONS[conversation]
    made = tokenizer_model(kind, form.template)
    expected = labels_by_prefixes(made.oracle, form, messages)
    if expected is None:
        with pytest.raises(DataError):
            made.encoder.encode(ChatRow(1, messages))
        return
    example = made.encoder.encode(ChatRow(1, messages))
    ids, labels = expected
    assert example.input_ids == ids
    assert example.labels == labels


def labels_by_prefixes(oracle: Any, form: Form, messages: Sequence[Message]) -> tuple[list[int], list[int]] | None:
    """Ids and labels; None where transformers refuses the conversation, or shows no answer."""

    def rendered(count: int, *, prompt: bool) -> str:
        turns = dicts(tuple(messages[:count]))
        text: str = oracle.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        return text

    def tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = oracle(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]

    try:
        text = rendered(len(messages), prompt=False)
    except Exception:
        return None
    ids, offsets = tokens(text)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        written = form.shown(index, messages) if message.role == "assistant" else None
        if written is None:
            continue
        begin = len(rendered(index, prompt=True))
        answer = written + form.closing
        assert text[begin:].startswith(answer), "the form says something else than its template does"
        alone, _ = tokens(rendered(index + 1, prompt=False))
        same = next((at for at, (one, other) in enumerate(zip(ids, alone, strict=False)) if one != other), len(alone))
        for place, (start, end) in enumerate(offsets):
            bare = text[start:end].strip() if ids[place] in oracle.added_tokens_decoder else text[start:end]
            first = text.index(bare, start) if bare else start
            inside = begin <= first and first + len(bare) <= begin + len(answer)
            # Text may be cut into other tokens when another turn follows.
            if inside and (form.special or place < same):
                labels[place] = ids[place]
    if all(label == IGNORED for label in labels):
        return None
    if not form.special and messages[-1].role == "assistant":
        ids, labels = [*ids, oracle.eos_token_id], [*labels, oracle.eos_token_id]
    return ids, labels


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("by token", "hello there<|end|>yes<|end|>"),
        ("system dropped", "hello there<|end|>yes<|end|>"),
        # Without a next turn, the two lines after the first answer would be one token.
        ("by text", f"hello thereyes\n\n{EOS}"),
    ],
)
def test_a_conversation_that_begins_with_an_answer(name: str, expected: str) -> None:
    """transformers renders no empty conversation, so there is no prompt to compare with."""
    form, messages = FORMS[name], (Message("assistant", "hello there"), *turns("hello", "yes"))
    made = tokenizer_model("bytes", form.template)
    example = made.encoder.encode(ChatRow(1, messages))
    trained = made.oracle.decode([label for label in example.labels if label != IGNORED])
    assert trained == expected


R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
"""As DeepSeek's R1 has it: the prompt opens a chain of thought that the rendered answer does not have."""


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        ("yes", "yes"),
        ("<think>\nwell\n</think>\n\nyes", "\n\nyes"),
        ("<think>\nwell</think><html>", "<html>"),
        ("<think>\nwell</think>\n<think> is what I print", "\n<think> is what I print"),
        ("\n\n  yes", "\n\n  yes"),
    ],
)
def test_an_answer_whose_prompt_opens_thoughts_that_it_does_not_have(answer: str, trained: str) -> None:
    made = tokenizer_model("bytes", R1.replace("<|user|>", "user>").replace("<|assistant|>", "assistant>"))
    example = made.encoder.encode(ChatRow(1, turns("hello", answer, "and now?", answer)))
    assert example.input_ids == made.oracle.apply_chat_template(dicts(turns("hello", answer, "and now?", answer)))
    labels = [label for label in example.labels if label != IGNORED]
    assert made.encoder.decode(labels, skip_special_tokens=False) == f"{trained}{EOS}" * 2


def test_a_prompt_that_shows_the_last_question_only_is_not_taken_for_an_earlier_one() -> None:
    template = FORMS["by token"].template.replace(
        "in messages", "in (messages[-1:] if add_generation_prompt else messages)"
    )
    made, plain = (tokenizer_model("bytes", each) for each in (template, FORMS["by token"].template))
    row = ChatRow(1, CONVERSATIONS["repeated"][1:])
    assert made.encoder.encode(row) == plain.encoder.encode(row)


def test_a_template_that_takes_no_empty_conversation() -> None:
    template = "{% if messages[0].role == 'user' %}{% endif %}" + FORMS["by token"].template
    made, plain = (tokenizer_model("bytes", each) for each in (template, FORMS["by token"].template))
    row = ChatRow(1, (Message("assistant", "hello there"), *turns("hello", "yes")))
    assert made.encoder.encode(row) == plain.encoder.encode(row)


def test_a_template_that_cuts_an_answer_is_a_problem_of_the_row() -> None:
    made = tokenizer_model("bytes", FORMS["by token"].template.replace("m.content", "m.content.split('#')[0]"))
    assert made.encoder.encode(ChatRow(1, turns("hello # there", "yes"))).remarks == {Remark.MESSAGE_LEFT_OUT}
    with pytest.raises(DataError, match="changes the answer in turn 2"):
        made.encoder.encode(ChatRow(1, turns("hello", "yes # it is")))


def test_a_template_whose_prompt_is_broken_or_hangs_is_no_matter_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on such a template, an adapter could not be asked."""
    monkeypatch.setattr(templates, "TIME_LIMIT", 1.0)
    loops = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    for wrong, message in (("{{ nothing.here }}", "is broken"), (loops, "does not finish")):
        broken = FORMS["by token"].template.replace("%}{{ '<|assistant|>", f"%}}{wrong}{{{{ '<|assistant|>")
        assert wrong in broken
        made = tokenizer_model("bytes", broken)
        with pytest.raises(IncompatibleError, match=message):
            made.encoder.encode(ChatRow(1, turns(*["yes"] * 40)))


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (FORMS["by token"].template, True),
        (FORMS["system dropped"].template, False),
        # Neither renders the conversation without the system's turn.
        ("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}<|end|>", False),
        ("{{ messages[0].content }}{{ messages[1].content }}", True),
        # What stands there otherwise says the same.
        ("{{ messages[0].content if messages[0].role == 'system' else 'be kind' }}{{ messages[-1].content }}", True),
    ],
)
def test_whether_a_prompt_shows_the_system(template: str, shown: bool) -> None:
    encoder = tokenizer_model("bytes", template).encoder
    assert encoder.shows(0, [Message("system", "be kind"), Message("user", "hello")]) is shown


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "obey<|en", "d|>yes"),
        ("{% for m in messages %}{{ m.content.replace('()', '') }}<|end|>{% endfor %}", "hello", "<|en()d|>yes"),
    ],
)
def test_content_that_a_template_joins_to_a_control_token_is_refused(template: str, first: str, second: str) -> None:
    encoder = tokenizer_model("bytes", template).encodes(RowEncoding(content_as_text=True))
    with pytest.raises(DataError, match="joins the messages"):
        encoder.encode(ChatRow(1, turns(first, second)))
    encoder.encode(ChatRow(1, turns("a < b", "b > a")))


def test_of_control_tokens_that_begin_alike_the_longest_is_meant() -> None:
    tokenizer = bytes_kind()
    tokenizer.add_special_tokens(["<|end|>x"])
    as_text = ContentAsText(tokenizer)
    assert ControlTokens(tokenizer).pattern.findall("<|end|>xy<|end|>") == ["<|end|>x", "<|end|>"]
    named = as_text.tokenizer.encode(as_text.named("<|end|>x<|end|>"), add_special_tokens=False).ids
    assert named == [tokenizer.token_to_id("<|end|>x"), tokenizer.token_to_id("<|end|>")]


PHI = {
    "phi-3": ("<s>", "phi-3.jinja"),
    "phi-3-mini": ("<s>", "phi-3-mini.jinja"),
    "phi-3-medium": ("<s>", "phi-3-medium.jinja"),
    "phi-4-mini": (EOS, "phi-4-mini.jinja"),
    "phi-4-mini-reasoning": (EOS, "phi-4-mini-reasoning.jinja"),
}


@pytest.fixture(scope="module", params=PHI)
def phi(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Encoder, Encoder]:
    """A published tokenizer with its template: transformers', edgetune's, and edgetune's with content as text."""
    transformers = pytest.importorskip("transformers")
    folder, material = tmp_path_factory.mktemp("phi"), shared_material() / "real"
    source = "phi-4-mini-json" if request.param.startswith("phi-4") else request.param
    record = json.loads(gzip.decompress((material / "tokenizers" / source / "tokenizer.json.gz").read_bytes()))
    config = json.loads((material / "tokenizers" / request.param / "tokenizer_config.json").read_text())
    for id, token in config["added_tokens_decoder"].items():
        if int(id) not in {known["id"] for known in record["added_tokens"]}:
            record["added_tokens"].append({"id": int(id), **token})
    record["added_tokens"].sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(record))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    bos, template = PHI[request.param]
    (folder / "chat_template.jinja").write_text((material / "templates" / template).read_text())
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    described = TokenizerManifest("", None, bos, EOS, 0)
    as_text = load_encoder(folder, described, RowEncoding(content_as_text=True))
    return oracle, load_encoder(folder, described), as_text


PUBLISHED = Form("", "<|end|>")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_published_tokenizers_and_templates(phi: tuple[Any, Encoder, Encoder], conversation: str) -> None:
    oracle, encoder, as_text = phi
    messages = CONVERSATIONS[conversation]
    example = encoder.encode(ChatRow(1, messages))
    assert (example.input_ids, example.labels) == labels_by_prefixes(oracle, PUBLISHED, messages)
    spelt = any(token in message.content for message in messages for token in oracle.get_added_vocab())
    assert (Remark.CONTROL_TOKENS in example.remarks) == spelt
    if not spelt:
        assert as_text.encode(ChatRow(1, messages)) == example


def test_control_tokens_in_content_are_text_where_that_is_asked(phi: tuple[Any, Encoder, Encoder]) -> None:
    """All ids but those of the content stay, and the content's decode to what was written."""
    _, encoder, as_text = phi
    inside = "I obey<|end|>\n<|assistant|>\n<s></s><|endoftext|>\n\nno"
    messages, plain = turns(inside, inside, "x", "y"), turns("q", "a", "x", "y")
    found, expected = (as_text.encode(ChatRow(1, each)) for each in (messages, plain))
    added = {id for id, _ in encoder._tokenizer.get_added_tokens_decoder().items()}
    control = [id for id in found.input_ids if id in added]
    assert control == [id for id in expected.input_ids if id in added]
    assert sum(label in added for label in found.labels) == sum(label in added for label in expected.labels) == 2
    assert encoder.decode(found.input_ids, skip_special_tokens=False).count(inside) == 2
    assert encoder.decode([label for label in found.labels if label != IGNORED]).startswith(inside)
    assert as_text.encode_prompt(messages[:1]) == found.input_ids[: len(as_text.encode_prompt(messages[:1]))]
    for row in (TextRow(1, inside), CompletionRow(1, "", inside)):
        ids = as_text.encode(row).input_ids
        assert inside in as_text.decode(ids, skip_special_tokens=False)


def test_names_that_hide_control_tokens_cannot_be_spelt() -> None:
    encoder = tokenizer_model("bytes", FORMS["by token"].template).encodes(RowEncoding(content_as_text=True))
    for strange in "\ufdd0", "\ufdd1":
        with pytest.raises(DataError, match="noncharacter"):
            encoder.encode(ChatRow(1, turns(f"{strange}1{strange}", "yes")))


def small_encoder(template: str) -> Encoder:
    """The tokenizer of a tiny model with a template of the material."""
    made = tokenizer_model("bytes", FORMS["by token"].template)
    source = (shared_material() / template).read_text()
    return Encoder(made.encoder._tokenizer, made.oracle.eos_token_id, ChatTemplate(source, "<s>", EOS))


@pytest.mark.parametrize(
    ("file", "answers"),
    [
        ("wrong_labels.jsonl", "Yes<|end|>No<|end|>"),
        ("wrong_labels2.jsonl", "OK<|end|>It is off.<|end|>"),
        ("refused.jsonl", "Be brief.<|end|>"),
        ("dropped_system.jsonl", "Yes<|end|>"),
    ],
)
def test_answers_stand_where_the_prompt_ends_when_the_system_is_left_out(file: str, answers: str) -> None:
    rows = shared_material() / "cases" / file
    encoder = small_encoder("real/templates/phi-3-medium.jinja")
    loaded = load_examples(rows, encoder, 500, truncate=False)
    (example,) = loaded.examples
    assert encoder.decode([label for label in example.labels if label != IGNORED], skip_special_tokens=False) == answers
    assert loaded.notices == [f"{rows}:1: {Remark.SYSTEM_LEFT_OUT} (in 1 of 1 rows, this is the first)"]


def test_an_end_is_learnt_where_the_template_has_none() -> None:
    encoder = small_encoder("cases/template-without-end.jinja")
    (example,) = load_examples(shared_material() / "cases" / "one.jsonl", encoder, 500, truncate=False).examples
    trained = [label for label in example.labels if label != IGNORED]
    assert encoder.decode(trained, skip_special_tokens=False) == f"boiler shut now light six boiler\n\n{EOS}"


@pytest.mark.parametrize("file", ["special-in-user.jsonl", "special-in-answer.jsonl"])
def test_control_tokens_of_people_are_told_and_can_be_text(file: str) -> None:
    rows = shared_material() / "cases" / file
    made = tokenizer_model("llama", FORMS["by token"].template)
    loaded = load_examples(rows, made.encoder, 500, truncate=False)
    assert loaded.notices == [f"{rows}:1: {Remark.CONTROL_TOKENS} (in 1 of 1 rows, this is the first)"]
    (example,) = loaded.examples
    messages = json.loads(rows.read_text())["messages"]
    assert list(example.input_ids) == made.oracle.apply_chat_template(messages)
    as_text = load_examples(rows, made.encodes(RowEncoding(content_as_text=True)), 500, truncate=False)
    (text,) = as_text.examples
    assert as_text.notices == []
    end, header = (made.oracle.convert_tokens_to_ids(token) for token in ("<|end|>", "<|assistant|>"))
    assert (list(text.input_ids).count(end), list(text.input_ids).count(header)) == (2, 1)


def test_published_prompt_rows_are_asked_as_they_are_trained() -> None:
    rows = shared_material() / "real" / "rows" / "mlx-examples" / "wwdc25_valid.jsonl"
    made = tokenizer_model("llama", FORMS["by token"].template)
    loaded = load_examples(rows, made.encoder, 2000, truncate=False)
    records = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(loaded.examples) == len(records) > 10
    for example, record in zip(loaded.examples, records, strict=True):
        asked = made.encoder.encode_prompt([Message("user", record["prompt"])])
        assert list(example.input_ids[: len(asked)]) == asked
        assert set(example.labels[: len(asked)]) == {IGNORED}
        expected = turns(record["prompt"], record["completion"])
        assert list(example.input_ids) == made.oracle.apply_chat_template(dicts(expected))


def test_what_is_said_of_the_rows_of_a_file(tmp_path: Path) -> None:
    """One line for each kind of remark, with the count and the place of the first row."""
    made = tokenizer_model("bytes", FORMS["only the last pair"].template)
    conversations = [
        turns("hello", "yes"),
        turns("hello<|end|>", "yes"),
        turns("a", "b", "c", "d"),
        turns("hello", "<|user|>yes"),
        turns("hello", "yes", system="the kitchen"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": dicts(each)}) + "\n" for each in conversations))
    notices = load_examples(path, made.encoder, 500, truncate=False).notices
    assert sorted(notices) == sorted(
        [
            f"{path}:2: {Remark.CONTROL_TOKENS} (in 2 of 5 rows, this is the first)",
            f"{path}:3: {Remark.MESSAGE_LEFT_OUT} (in 1 of 5 rows, this is the first)",
            f"{path}:5: {Remark.SYSTEM_LEFT_OUT} (in 1 of 5 rows, this is the first)",
        ]
    )


@pytest.mark.parametrize("prompt", ["hello", "", " the lamp\n"])
def test_prompt_and_completion_are_a_conversation_of_two_turns(prompt: str) -> None:
    made = tokenizer_model("llama", FORMS["by token"].template)
    row = CompletionRow(1, prompt, "yes, it is")
    assert made.encoder.encode(row) == made.encoder.encode(ChatRow(1, turns(prompt, "yes, it is")))
    raw = made.encodes(RowEncoding(raw_prompts=True)).encode(row)
    assert raw.input_ids == [*made.oracle(prompt + "yes, it is")["input_ids"], made.oracle.eos_token_id]


@pytest.mark.parametrize(
    ("name", "end", "closed_by_text", "shows_system"),
    [
        ("by token", "<|end|>", False, True),
        ("by the end of the sequence", EOS, False, True),
        ("by text", EOS, True, True),
        ("system dropped", "<|end|>", False, False),
        ("strict alternation", "<|end|>", False, False),
    ],
)
def test_what_prepare_finds_in_a_template(name: str, end: str, closed_by_text: bool, shows_system: bool) -> None:
    made = tokenizer_model("bytes", FORMS[name].template)
    expected = Conversations(made.oracle.convert_tokens_to_ids(end), closed_by_text, shows_system)
    assert try_conversations(made.encoder) == expected
