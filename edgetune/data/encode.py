"""A row to token ids and labels: which tokens it has, and which of them are trained."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.data.answers import Answer, common_length, is_shown, render_conversation
from edgetune.data.control_tokens import ContentAsText, ControlTokens
from edgetune.data.rows import ChatRow, CompletionRow, Message, Row, TextRow
from edgetune.data.template import ChatTemplate
from edgetune.errors import DataError, IncompatibleError
from edgetune.formats import manifest

if TYPE_CHECKING:
    import tokenizers

IGNORED = -100
"""Label of a token that is not trained (Hugging Face's convention)."""
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer.json"
_WINDOW = 256
"""Characters around the end of an answer within which a tokenizer's choice of tokens can depend on what follows."""


class Remark(StrEnum):
    """Something that is trained all the same, but that whoever wrote the row may not have meant."""

    SYSTEM_LEFT_OUT = "the chat template leaves the system's text out; put it into the user's first message"
    MESSAGE_LEFT_OUT = "the chat template leaves messages out, which are not trained"
    TOOLS_LEFT_OUT = "the chat template leaves the tools out, so that the model is not told of them"
    CONTROL_TOKENS = (
        "messages spell control tokens of the model, which steer it as the chat template's own do; "
        "--content-as-text takes them as text"
    )


@dataclass(frozen=True)
class Example:
    """A row as the model sees it."""

    line: int
    """Line of the file, counted from 1."""
    input_ids: Sequence[int]
    labels: Sequence[int]
    """At each position the same token id, or `IGNORED` where it is not trained."""
    remarks: frozenset[Remark] = frozenset()

    @property
    def trained_tokens(self) -> int:
        """Tokens that are trained; the first one never is, because nothing precedes it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class _Token:
    id: int
    start: int
    end: int
    closes: bool
    """Whether it can close a turn: it is the end of the sequence or another special token, such as `<|end|>`."""


class Encoder:
    """Turns rows into token ids and labels, and ids back into text.

    Args:
        tokenizer: The model's tokenizer, without truncation and padding.
        eos_token_id: Ends a row that nothing else ends.
        template: The model's chat template, when it has one.
        encoding: How rows are encoded where there is a choice.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eos_token_id: int,
        template: ChatTemplate | None,
        encoding: manifest.RowEncoding = manifest.RowEncoding(),
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_id = eos_token_id
        self.template = template
        self.encoding = encoding
        special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._closing_ids = special | {eos_token_id}
        self._control = ControlTokens(tokenizer)

    def encode(self, row: Row) -> Example:
        """Token ids and labels of a row.

        A conversation is trained on each answer and on what ends it: the special token that closes the turn, or the
        end of the sequence after the last answer where the template has no such token. Prompt/completion is a
        conversation of two turns; without a template, or as raw prompts, it is trained on the completion and the end
        of the sequence. Text is trained whole.

        Raises:
            DataError: The row cannot be trained on; the one problem is the reason, without a place.
            IncompatibleError: The model's template is missing or broken.
        """
        match row:
            case ChatRow(line, messages):
                example = self._encode_chat(line, messages)
            case CompletionRow(line, prompt, completion) if self.asks_raw:
                example = self._encode_plain(line, prompt + completion, len(prompt))
            case CompletionRow(line, prompt, completion):
                example = self._encode_chat(line, (Message("user", prompt), Message("assistant", completion)))
            case TextRow(line, text):
                example = self._encode_plain(line, text, None)
        if not example.trained_tokens:
            raise DataError(["no token of this row would be trained; give it a longer answer"])
        return example

    @property
    def asks_raw(self) -> bool:
        """Whether prompts are taken as they are: they are raw, or the model has no chat template."""
        return self.encoding.raw_prompts or self.template is None

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer, as training saw it.

        Raises:
            DataError: The template refuses the conversation.
            IncompatibleError: The model's template is missing or broken.
        """
        return [token.id for token in self._tokens(self._render(messages, add_generation_prompt=True))]

    def shows(self, index: int, messages: Sequence[Message]) -> bool:
        """Whether the prompt of `encode_prompt` shows the message at `index`; errors are the same."""
        return is_shown(self._render, messages, index)

    def encode_raw_prompt(self, prompt: str) -> list[int]:
        """Token ids of a text that the model shall go on with, as training saw a raw prompt."""
        _check_text(prompt)
        ids: list[int] = self._reader.encode(prompt, add_special_tokens=True).ids
        return ids[:-1] if ids[-1:] == [self._eos_token_id] else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def remarks_of(self, messages: Sequence[Message]) -> frozenset[Remark]:
        """What is to be said of the messages, whatever the template makes of them."""
        if self.encoding.content_as_text or not any(map(self.spells_control_tokens, messages)):
            return frozenset()
        return frozenset([Remark.CONTROL_TOKENS])

    def spells_control_tokens(self, message: Message) -> bool:
        """Whether a message has control tokens of the model in its text."""
        return self._control.spelt_in(message.content) or self._control.spelt_in(message.tools or "")

    def knows_token(self, text: str) -> bool:
        """Whether a text is one token of the model."""
        return self._tokenizer.token_to_id(text) is not None

    def _leaves_tools_out(self, messages: Sequence[Message], text: str) -> bool:
        """Whether the template renders a conversation alike with and without its tools."""
        bare = [replace(message, tools=None) for message in messages]
        return self._render(bare, add_generation_prompt=False) == text

    def _encode_chat(self, line: int, messages: Sequence[Message]) -> Example:
        conversation = render_conversation(self._render, messages)
        tokens = self._tokens(conversation.text)
        starts = [token.start for token in tokens]
        ids = [token.id for token in tokens]
        labels = [IGNORED] * len(tokens)
        closed = True
        for answer in conversation.answers:
            end = self._end_of_turn(answer, conversation.text, tokens, starts)
            closed = end is not None
            if not messages[answer.index].trained:
                continue
            end = self._end_of_text(answer, conversation.text) if end is None else end
            trained = slice(bisect_left(starts, answer.begin), bisect_left(starts, end))
            labels[trained] = ids[trained]
        if conversation.ends_with_answer and not closed and messages[conversation.answers[-1].index].trained:
            _end_sequence(ids, labels, self._eos_token_id)
        remarks = self.remarks_of(messages)
        if any(message.tools for message in messages) and self._leaves_tools_out(messages, conversation.text):
            remarks |= {Remark.TOOLS_LEFT_OUT}
        for role in conversation.left_out:
            remarks |= {Remark.SYSTEM_LEFT_OUT if role == "system" else Remark.MESSAGE_LEFT_OUT}
        return Example(line, ids, labels, remarks)

    def _end_of_turn(self, answer: Answer, text: str, tokens: Sequence[_Token], starts: Sequence[int]) -> int | None:
        """Where the special token ends that closes an answer, whatever turn comes next; None where there is none."""
        end = answer.content_end
        agreed = end + common_length(text[end : end + len(answer.closing)], answer.closing)
        for index in range(bisect_left(starts, end), len(tokens)):
            if tokens[index].end > agreed:
                break
            if tokens[index].closes:
                return tokens[index].end
        return None

    def _end_of_text(self, answer: Answer, text: str) -> int:
        """Where an answer ends that text alone closes: with the last token that is the same without a next turn."""
        end = answer.content_end
        if text[end:] == answer.closing:
            return len(text)
        begin = max(0, end - _WINDOW)
        here = self._tokens(text[begin : end + len(answer.closing) + _WINDOW])
        alone = self._tokens(text[begin:end] + answer.closing)
        common = common_length([token.id for token in here], [token.id for token in alone])
        return begin + here[common - 1].end if common else begin

    def _encode_plain(self, line: int, text: str, prompt_end: int | None) -> Example:
        _check_text(text)
        encoding = self._reader.encode(text, add_special_tokens=True)
        ids: list[int] = encoding.ids
        if prompt_end is None:
            labels = list(ids)
        else:
            # Specials that the tokenizer itself puts around the text have no place in it: they are not trained.
            offsets = zip(ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
            labels = [id if start >= prompt_end and not added else IGNORED for id, (start, _), added in offsets]
        _end_sequence(ids, labels, self._eos_token_id)
        return Example(line, ids, labels)

    @property
    def _reader(self) -> tokenizers.Tokenizer:
        """What reads text: rendered conversations, raw prompts, plain text."""
        return self._as_text.tokenizer if self.encoding.content_as_text else self._tokenizer

    @cached_property
    def _as_text(self) -> ContentAsText:
        return ContentAsText(self._tokenizer)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        if self.template is None:
            raise IncompatibleError(
                "the model has no chat template, so it takes no conversations; "
                'write rows as {"prompt": "…", "completion": "…"} or {"text": "…"}'
            )
        if not self.encoding.content_as_text:
            return self.template.render(messages, add_generation_prompt=add_generation_prompt)
        hidden = [_with_texts(message, self._as_text.hidden) for message in messages]
        rendered = self.template.render(hidden, add_generation_prompt=add_generation_prompt)
        plain = [_with_texts(message, self._as_text.harmless) for message in hidden]
        if plain != hidden:
            # What was hidden apart may spell a control token where the template puts it together.
            expected = self.template.render(plain, add_generation_prompt=add_generation_prompt)
            self._as_text.require_equal(rendered, expected)
        return self._as_text.named(rendered)

    def _tokens(self, text: str) -> list[_Token]:
        _check_text(text)
        encoding = self._reader.encode(text, add_special_tokens=False)
        added = self._added
        tokens = []
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            bare = text[start:end].strip() if id in added else ""
            if bare:
                # An added token may swallow the white space around it (`rstrip`, `lstrip`): that is not its own.
                start = text.index(bare, start)
                end = start + len(bare)
            tokens.append(_Token(id, start, end, bool(bare) and id in self._closing_ids))
        return tokens

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())


def load_encoder(
    folder: Path,
    tokenizer: manifest.Tokenizer,
    encoding: manifest.RowEncoding = manifest.RowEncoding(),
) -> Encoder:
    """The encoder of a verified bundle, adapter or model folder.

    Args:
        folder: Holds `tokenizer.json` and, when the model has a template, `chat_template.jinja`.
        tokenizer: The tokenizer's entry in the manifest.
        encoding: How rows are encoded where there is a choice.

    Raises:
        IncompatibleError: The files are not what the manifest says.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the only class that tokenizers raises
        raise IncompatibleError(f"{path}: not a tokenizer that this edgetune reads ({error})") from error
    loaded.no_truncation()
    loaded.no_padding()
    eos_token_id = loaded.token_to_id(tokenizer.eos_token)
    if eos_token_id is None:
        raise IncompatibleError(
            f"{path}: has no token {tokenizer.eos_token!r}, which the manifest calls the last of a row"
        )
    template = None
    if (folder / TEMPLATE_FILE).is_file():
        try:
            source = (folder / TEMPLATE_FILE).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise IncompatibleError(
                f"{folder / TEMPLATE_FILE}: is not UTF-8 ({error.reason}); save it as UTF-8"
            ) from error
        template = ChatTemplate(source, tokenizer.bos_token, tokenizer.eos_token)
    return Encoder(loaded, eos_token_id, template, encoding)


def _with_texts(message: Message, change: Callable[[str], str]) -> Message:
    """A message with its content, and the tools that it names, changed."""
    tools = None if message.tools is None else change(message.tools)
    return replace(message, content=change(message.content), tools=tools)


def _end_sequence(ids: list[int], labels: list[int], eos_token_id: int) -> None:
    """Let the row end with the end of the sequence, and train it."""
    if ids[-1:] != [eos_token_id]:
        ids.append(eos_token_id)
        labels.append(IGNORED)
    labels[-1] = eos_token_id


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a prompt from a terminal that is not UTF-8
        broken = f"\\u{ord(text[error.start]):04x}"
        raise DataError([f"the text has half a surrogate pair ({broken}), which is no character; remove it"]) from error
