"""What `edgetune data check` does: what rows will be to a model, counted before anything is trained on them."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from edgetune.data.encode import Encoder, Example, Remark, load_encoder
from edgetune.data.examples import Tally, encoded_rows
from edgetune.data.folder import training_files
from edgetune.data.rows import ChatRow, CompletionRow, Row
from edgetune.formats.bundle import Bundle, as_bundle
from edgetune.formats.manifest import RowEncoding
from edgetune.text.pulse import Pulse, silent

SHOWN = 5
"""Rows that are named of those that share something."""


@dataclass(frozen=True)
class Lengths:
    """How many rows are how long."""

    least: int
    """Tokens of the shortest row that is counted here, at least."""
    most: int
    """Tokens of the longest, at most; a power of two."""
    rows: int


@dataclass(frozen=True)
class WordyRow:
    """A row with many tokens for its words, as text has that the tokenizer hardly knows."""

    line: int
    tokens: int
    words: int


@dataclass(frozen=True)
class SameRows:
    """A row that is another one's double: the same tokens, of which the same are trained."""

    line: int
    first_line: int
    """Of the other one."""


@dataclass(frozen=True)
class Check:
    """What the rows of a file are."""

    path: str
    kind: str
    """`messages`, `prompt/completion` or `text`."""
    rows: int
    messages: dict[str, int]
    """Of conversations, how many messages each role has."""
    untrained_answers: int
    """Answers of weight 0."""
    tokens: int
    trained_tokens: int
    shortest: int
    """Tokens of the shortest row."""
    longest: int
    lengths: list[Lengths]
    max_length: int
    """Tokens of the longest row that the bundle takes."""
    too_long: int
    """Rows that are longer; they are left out, or cut with `--truncate`."""
    cut_tokens: int
    """Tokens that `--truncate` cuts off."""
    cut_away: int
    """Rows that are left out even so: their answers begin after the cut."""
    duplicates: int
    """Rows that were there before."""
    first_duplicates: list[SameRows]
    in_valid: int
    """Rows of the validation file that are in this one as well."""
    first_in_valid: list[SameRows]
    """Their lines in the validation file, and the first lines here."""
    control_token_rows: int
    """Rows in which a message spells a control token."""
    first_control_token_rows: list[int]
    """Their lines."""
    wordiest: list[WordyRow]
    """Rows with the most tokens a word."""

    @property
    def trained_share(self) -> float:
        """Share of the tokens that are trained."""
        return self.trained_tokens / self.tokens


def check(
    data: str | PathLike[str],
    bundle: Bundle | str | PathLike[str],
    *,
    valid: str | PathLike[str] | None = None,
    encoding: RowEncoding = RowEncoding(),
    say: Callable[[str], None] = silent,
) -> Check:
    """Count what the rows of a file are to a bundle's model. Of each row no more than a hash is kept.

    Args:
        data: JSONL rows; `-` is standard input. Of a folder, its `train.jsonl`.
        bundle: What would be trained: its path, or what `load_bundle` gave.
        valid: Rows to be measured on; without it, the `valid.jsonl` of a folder of rows.
        encoding: How rows are encoded where there is a choice.
        say: Called with one line of text from time to time, and for each thing that is to be said of the rows.

    Raises:
        UsageError: There is no such bundle or file.
        DataError: Naming every row that is wrong.
        IncompatibleError: The bundle does not fit this edgetune or the rows.
        VerificationError: A file of the bundle was changed.
    """
    path, measured = training_files(Path(data), None if valid is None else Path(valid))
    opened = as_bundle(bundle)
    encoder = load_encoder(opened.path, opened.manifest.tokenizer, encoding)
    count = _Count(path, opened.manifest.max_length)
    _read(path, encoder, count.add, say)
    doubles: list[SameRows] = []
    if measured is not None:

        def compare(row: Row, example: Example) -> None:
            if (first := count.lines.get(_digest(example))) is not None:
                doubles.append(SameRows(row.line, first))

        _read(measured, encoder, compare, say)
    return replace(count.result(), in_valid=len(doubles), first_in_valid=doubles[:SHOWN])


def _read(path: Path, encoder: Encoder, take: Callable[[Row, Example], None], say: Callable[[str], None]) -> None:
    tally, pulse = Tally(path), Pulse(say, "read {} rows")
    for row, example in encoded_rows(path, encoder, tally):
        take(row, example)
        pulse.add(1)
    for line in tally.notices():
        say(line)


class _Count:
    """Counts rows one after the other."""

    def __init__(self, path: Path, max_length: int) -> None:
        self._path, self._max_length = path, max_length
        self.lines: dict[bytes, int] = {}
        """The first line of each row, by its hash."""
        self._kind = ""
        self._messages: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._rows = self._tokens = self._trained = self._untrained_answers = self._longest = 0
        self._shortest = 0
        self._too_long = self._cut_tokens = self._cut_away = self._duplicates = self._with_control = 0
        self._first_duplicates: list[SameRows] = []
        self._first_control: list[int] = []
        self._wordiest: list[tuple[float, int, WordyRow]] = []

    def add(self, row: Row, example: Example) -> None:
        """Count a row and what it became."""
        length = len(example.input_ids)
        self._rows += 1
        self._kind = self._kind or _kind_of(row)
        self._tokens += length
        self._trained += example.trained_tokens
        self._shortest = min(self._shortest or length, length)
        self._longest = max(self._longest, length)
        self._lengths[max(0, length - 1).bit_length()] += 1
        if isinstance(row, ChatRow):
            self._messages.update(message.role for message in row.messages)
            self._untrained_answers += sum(not message.trained for message in row.messages)
        if length > self._max_length:
            self._too_long += 1
            cut = replace(
                example, input_ids=example.input_ids[: self._max_length], labels=example.labels[: self._max_length]
            )
            self._cut_away += not cut.trained_tokens
            self._cut_tokens += length - self._max_length
        first = self.lines.setdefault(_digest(example), row.line)
        if first != row.line:
            self._duplicates += 1
            if len(self._first_duplicates) < SHOWN:
                self._first_duplicates.append(SameRows(row.line, first))
        if Remark.CONTROL_TOKENS in example.remarks:
            self._with_control += 1
            if len(self._first_control) < SHOWN:
                self._first_control.append(row.line)
        words = max(1, len(_text_of(row).split()))
        heapq.heappush(self._wordiest, (length / words, -row.line, WordyRow(row.line, length, words)))
        if len(self._wordiest) > SHOWN:
            heapq.heappop(self._wordiest)

    def result(self) -> Check:
        """What was counted."""
        lengths = [
            Lengths((1 << each) // 2 + 1 if each else 1, 1 << each, self._lengths[each])
            for each in _span(self._lengths)
        ]
        return Check(
            path=str(self._path),
            kind=self._kind,
            rows=self._rows,
            messages=dict(self._messages),
            untrained_answers=self._untrained_answers,
            tokens=self._tokens,
            trained_tokens=self._trained,
            shortest=self._shortest,
            longest=self._longest,
            lengths=lengths,
            max_length=self._max_length,
            too_long=self._too_long,
            cut_tokens=self._cut_tokens,
            cut_away=self._cut_away,
            duplicates=self._duplicates,
            first_duplicates=self._first_duplicates,
            in_valid=0,
            first_in_valid=[],
            control_token_rows=self._with_control,
            first_control_token_rows=self._first_control,
            wordiest=[row for _, _, row in sorted(self._wordiest, reverse=True)],
        )


def _span(counts: Counter[int]) -> range:
    """All from the first to the last that was counted."""
    return range(min(counts, default=0), max(counts, default=-1) + 1)


def _digest(example: Example) -> bytes:
    ids = array("i", example.input_ids).tobytes() + array("i", example.labels).tobytes()
    return hashlib.blake2b(ids, digest_size=16).digest()


def _kind_of(row: Row) -> str:
    if isinstance(row, ChatRow):
        return "messages"
    return "prompt/completion" if isinstance(row, CompletionRow) else "text"


def _text_of(row: Row) -> str:
    """What a row says, without what the template puts around it."""
    if isinstance(row, ChatRow):
        return " ".join(f"{message.content} {message.tools or ''}" for message in row.messages)
    return f"{row.prompt} {row.completion}" if isinstance(row, CompletionRow) else row.text
