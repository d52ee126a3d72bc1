"""The encoded rows of a file: those to train on, those left out, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgetune.data.encode import Encoder, Example, Remark
from edgetune.data.problems import Problems
from edgetune.data.rows import CompletionRow, Row, read_rows
from edgetune.data.source import Source, name_of
from edgetune.data.stored_examples import StoredExamples
from edgetune.errors import DataError, IncompatibleError
from edgetune.formats.manifest import RowEncoding

_MOST_NAMES = 12
"""Of further keys that are named."""


class Tally:
    """Counts the rows of a file, and the remarks on them.

    Args:
        path: The file.
    """

    def __init__(self, path: Source) -> None:
        self._path = path
        self._rows = 0
        self._remarks: dict[Remark, tuple[int, int]] = {}
        self._ignored: set[str] = set()
        self._with_ignored = (0, 0)
        self.prompts = 0
        """Prompt/completion rows."""

    def add(self, row: Row, example: Example) -> None:
        """Count a row and what it became."""
        self._rows += 1
        self.prompts += isinstance(row, CompletionRow)
        for remark in example.remarks:
            count, first = self._remarks.get(remark, (0, example.line))
            self._remarks[remark] = (count + 1, first)
        if row.ignored:
            count, first = self._with_ignored
            self._with_ignored = (count + 1, first or row.line)
            if len(self._ignored) < _MOST_NAMES:
                self._ignored |= row.ignored

    def notices(self) -> list[str]:
        """One line for each kind of remark: the place of the first row, what it is, and in how many rows."""
        told = [(remark.value, *place) for remark, place in sorted(self._remarks.items())]
        if self._ignored:
            names = ", ".join(sorted(self._ignored)[:_MOST_NAMES])
            more = ", …" if len(self._ignored) > _MOST_NAMES else ""
            told.insert(0, (f"further keys are ignored: {names}{more}", *self._with_ignored))
        return [
            f"{name_of(self._path)}:{first}: {text} (in {count:,} of {self._rows:,} rows, this is the first)"
            for text, count, first in told
        ]


@dataclass(frozen=True)
class Examples:
    """The encoded rows of a file, and which rows were left out or cut."""

    examples: StoredExamples
    rows: int
    """Rows in the file."""
    too_long: int
    """Rows that were left out."""
    truncated: int
    """Rows that were cut."""
    trained_tokens: int
    encoding: RowEncoding
    """How prompts are to be encoded, so that what was trained is what is asked."""
    notices: list[str]
    """What is to be said of them, each line with the place of the first row that it is about."""


def encode_rows(path: Source, encoder: Encoder, tally: Tally) -> Iterator[Example]:
    """What the rows of a file are to the model; arguments and errors are those of `encoded_rows`."""
    return (example for _, example in encoded_rows(path, encoder, tally))


def encoded_rows(path: Source, encoder: Encoder, tally: Tally) -> Iterator[tuple[Row, Example]]:
    """Read and encode the rows of a file; problems are reported together once the last row is through.

    Args:
        path: JSONL, in a file or from a pipe.
        encoder: The encoder of the model to be trained.
        tally: Counts the rows.

    Raises:
        UsageError: There is no such file.
        DataError: Naming every line that is wrong or cannot be trained on, and why.
        IncompatibleError: The model's template does not fit the rows.
    """
    problems = Problems(path)
    for row in read_rows(path, problems):
        try:
            example = encoder.encode(row)
        except DataError as error:
            for reason in error.problems:
                problems.add(row.line, reason)
        except IncompatibleError as error:
            raise IncompatibleError(f"{name_of(path)}:{row.line}: {error}") from error
        else:
            tally.add(row, example)
            yield row, example
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
    examples = StoredExamples()
    trained_tokens = truncated = too_long = 0
    shortest = (0, 0)
    tally = Tally(path)
    for example in encode_rows(path, encoder, tally):
        length = len(example.input_ids)
        taken = example
        if length > max_length:
            taken = replace(example, input_ids=example.input_ids[:max_length], labels=example.labels[:max_length])
            if not (truncate and taken.trained_tokens):
                too_long += 1
                shortest = (length, example.line) if too_long == 1 else min(shortest, (length, example.line))
                continue
            truncated += 1
        examples.add(taken)
        trained_tokens += taken.trained_tokens
    count = len(examples) + too_long
    if not examples:
        length, line = shortest
        fix = "their answers begin after that" if truncate else "shorten them, or cut them with --truncate"
        raise DataError(
            [
                f"{name_of(path)}:{line}: all {count:,} rows are longer than {max_length:,} tokens, this one has the "
                f"fewest ({length:,}); {fix}, or prepare the model with a larger --max-length"
            ]
        )
    raw_prompts = encoder.asks_raw and encoder.template is not None and tally.prompts > 0
    encoding = replace(encoder.encoding, raw_prompts=raw_prompts)
    return Examples(examples, count, too_long, truncated, trained_tokens, encoding, tally.notices())
