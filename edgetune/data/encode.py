"""Rows to token ids and labels: which tokens a row has, and which of them are trained."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import manifest
from edgetune.data.answers import answer_spans
from edgetune.data.rows import ChatRow, CompletionRow, Message, Problems, Row, TextRow, read_rows
from edgetune.data.source import Source, name_of
from edgetune.data.template import ChatTemplate
from edgetune.errors import DataError, IncompatibleError

if TYPE_CHECKING:
    import tokenizers

IGNORED = -100
"""Label of a token that is not trained (Hugging Face's convention)."""
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer.json"
_OBJECTS = 290
"""Measured bytes of an example beside its tokens."""
_NO_SPACE = re.compile(r"\S")


@dataclass(frozen=True)
class Example:
    """A row as the model sees it."""

    line: int
    """Line of the file, counted from 1."""
    input_ids: Sequence[int]
    labels: Sequence[int]
    """At each position the same token id, or `IGNORED` where it is not trained."""

    @property
    def trained_tokens(self) -> int:
        """Tokens that are trained; the first one never is, because nothing precedes it."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def memory(self) -> int:
        """Bytes that it takes when it is compact."""
        return _OBJECTS + 8 * len(self.input_ids)

    def compact(self) -> Example:
        """The same in `memory` bytes, a fifth of what lists take."""
        return Example(self.line, array("i", self.input_ids), array("i", self.labels))


@dataclass(frozen=True)
class Examples:
    """The encoded rows of a file, and which rows were left out or cut."""

    examples: list[Example]
    rows: int
    """Rows in the file."""
    too_long: list[tuple[int, int]]
    """Line and length in tokens of every row that was left out."""
    truncated: list[tuple[int, int]]
    """Line and length in tokens, before the cut, of every row that was cut."""
    trained_tokens: int


@dataclass(frozen=True)
class _Token:
    id: int
    start: int
    end: int
    special: bool
    """One of the tokenizer's added tokens, such as `<|end|>`."""


class Encoder:
    """Turns rows into token ids and labels, and ids back into text.

    Args:
        tokenizer: The model's tokenizer, without truncation and padding.
        eos_token_id: Ends a row that is not a conversation.
        template: The model's chat template, when it has one.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_token_id: int, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._eos_token_id = eos_token_id
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        self.template = template

    def encode(self, row: Row) -> Example:
        """Token ids and labels of a row.

        A conversation is trained on each answer and on the special token that ends it, prompt/completion on the
        completion and the end of the sequence, text on everything.

        Raises:
            DataError: The row cannot be trained on; the one problem is the reason, without a place.
            IncompatibleError: The model's template is missing, broken, or does not show the answers.
        """
        match row:
            case ChatRow(line, messages):
                example = self._encode_chat(line, messages)
            case CompletionRow(line, prompt, completion):
                example = self._encode_plain(line, prompt + completion, len(prompt))
            case TextRow(line, text):
                example = self._encode_plain(line, text, None)
        if not example.trained_tokens:
            raise DataError(["no token of this row would be trained; give it a longer answer"])
        return example

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that waits for the assistant's answer, as training saw it.

        Raises:
            DataError: The template refuses the conversation.
            IncompatibleError: The model's template is missing or broken.
        """
        text = self._require_template().render(messages, add_generation_prompt=True)
        return [token.id for token in self._tokens(text)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def _encode_chat(self, line: int, messages: Sequence[Message]) -> Example:
        template = self._require_template()
        text = template.render(messages, add_generation_prompt=False)
        tokens = self._tokens(text)
        starts = [token.start for token in tokens]
        labels = [IGNORED] * len(tokens)
        for start, end in answer_spans(template, messages, text):
            end = _end_of_turn(tokens, starts, text, end)
            for index in range(bisect_left(starts, start), bisect_left(starts, end)):
                if tokens[index].end <= end:
                    labels[index] = tokens[index].id
        return Example(line, [token.id for token in tokens], labels)

    def _encode_plain(self, line: int, text: str, prompt_end: int | None) -> Example:
        _check_text(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=True)
        ids: list[int] = encoding.ids
        if prompt_end is None:
            labels = list(ids)
        else:
            # Specials that the tokenizer itself puts around the text have no place in it: they are not trained.
            offsets = zip(ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
            labels = [id if start >= prompt_end and not added else IGNORED for id, (start, _), added in offsets]
        if ids[-1:] != [self._eos_token_id]:
            ids, labels = [*ids, self._eos_token_id], [*labels, IGNORED]
        labels[-1] = self._eos_token_id
        return Example(line, ids, labels)

    def _tokens(self, text: str) -> list[_Token]:
        _check_text(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = []
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            special = id in self._added
            if special and (bare := text[start:end].strip()):
                # A special token may swallow the white space around it (`rstrip`, `lstrip`): that is not its own.
                start = text.index(bare, start)
                end = start + len(bare)
            tokens.append(_Token(id, start, end, special))
        return tokens

    def _require_template(self) -> ChatTemplate:
        if self.template is None:
            raise IncompatibleError(
                "the model has no chat template, so it takes no conversations; "
                'write rows as {"prompt": "…", "completion": "…"} or {"text": "…"}'
            )
        return self.template


def load_encoder(folder: Path, tokenizer: manifest.Tokenizer) -> Encoder:
    """The encoder of a verified bundle, adapter or model folder.

    Args:
        folder: Holds `tokenizer.json` and, when the model has a template, `chat_template.jinja`.
        tokenizer: The tokenizer's entry in the manifest.

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
    return Encoder(loaded, eos_token_id, template)


def encode_rows(path: Source, encoder: Encoder) -> Iterator[Example]:
    """Read and encode the rows of a file; problems are reported together once the last row is through.

    Raises:
        UsageError: There is no such file.
        DataError: Naming every line that is wrong or cannot be trained on, and why.
        IncompatibleError: The model's template does not fit the rows.
    """
    problems = Problems(path)
    for row in read_rows(path, problems):
        try:
            yield encoder.encode(row)
        except DataError as error:
            for reason in error.problems:
                problems.add(row.line, reason)
        except IncompatibleError as error:
            raise IncompatibleError(f"{name_of(path)}:{row.line}: {error}") from error
    problems.raise_if_any()


def load_examples(path: Source, encoder: Encoder, max_length: int, *, truncate: bool) -> Examples:
    """Read and encode a file of rows.

    Args:
        path: JSONL, in a file or from a pipe.
        encoder: The encoder of the model to be trained.
        max_length: Longest row that is taken, in tokens.
        truncate: Cut longer rows instead of leaving them out. One whose trained tokens are all cut off is left out.

    Raises:
        UsageError: There is no such file.
        DataError: Naming every bad row; or every row is too long.
        IncompatibleError: The model's template does not fit the rows.
    """
    examples: list[Example] = []
    too_long: list[tuple[int, int]] = []
    truncated: list[tuple[int, int]] = []
    for example in encode_rows(path, encoder):
        length = len(example.input_ids)
        if length <= max_length:
            examples.append(example.compact())
            continue
        cut = Example(example.line, example.input_ids[:max_length], example.labels[:max_length])
        if truncate and cut.trained_tokens:
            examples.append(cut.compact())
            truncated.append((example.line, length))
        else:
            too_long.append((example.line, length))
    count = len(examples) + len(too_long)
    if not examples:
        line, length = min(too_long, key=lambda entry: entry[1])
        fix = "their answers begin after that" if truncate else "shorten them, or cut them with --truncate"
        raise DataError(
            [
                f"{name_of(path)}:{line}: all {count:,} rows are longer than {max_length:,} tokens, this one has the "
                f"fewest ({length:,}); {fix}, or prepare the model with a larger --max-length"
            ]
        )
    return Examples(examples, count, too_long, truncated, sum(example.trained_tokens for example in examples))


def _end_of_turn(tokens: Sequence[_Token], starts: Sequence[int], text: str, end: int) -> int:
    """End of the special token that closes an answer; `end` when the next thing after white space is none."""
    if (following := _NO_SPACE.search(text, end)) is not None:
        for token in tokens[bisect_left(starts, following.start()) :]:
            if token.start != following.start():
                break
            # A space before it stands at the same place where the tokenizer trims spaces off.
            if token.special:
                return token.end
    return end


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a prompt from a terminal that is not UTF-8
        broken = f"\\u{ord(text[error.start]):04x}"
        raise DataError([f"the text has half a surrogate pair ({broken}), which is no character; remove it"]) from error
