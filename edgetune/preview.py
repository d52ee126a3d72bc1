"""What `edgetune preview` shows: the exact token ids and labels that each row becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from pathlib import Path

from edgetune.data.encode import IGNORED, Encoder, Example, load_encoder
from edgetune.data.examples import Tally, encode_rows
from edgetune.data.folder import rows_file
from edgetune.formats.bundle import Bundle, as_bundle
from edgetune.formats.manifest import RowEncoding
from edgetune.text.pulse import silent


@dataclass(frozen=True)
class Piece:
    """A run of tokens that are all trained, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Preview:
    """One row."""

    line: int
    input_ids: list[int]
    labels: list[int]
    """At each position the same token id, −100 where it is not trained."""
    pieces: list[Piece]
    """The row's text for people, special tokens included."""
    too_long: bool
    """Longer than the bundle's maximum: training leaves it out or cuts it."""


def preview(
    bundle: Bundle | str | PathLike[str],
    data: str | PathLike[str],
    *,
    encoding: RowEncoding = RowEncoding(),
    say: Callable[[str], None] = silent,
) -> Iterator[Preview]:
    """What training would see of each row of `data`.

    Args:
        bundle: What would be trained: its path, or what `load_bundle` gave.
        data: JSONL rows. Of a folder, its `train.jsonl`.
        encoding: How they are encoded where there is a choice.
        say: Called after the last row with one line of text for each thing that is to be said of the rows.

    Raises:
        UsageError: There is no such bundle or file.
        DataError: Naming every row that is wrong, after the others.
        IncompatibleError: The bundle does not fit this edgetune or the rows.
        VerificationError: A file of the bundle was changed.
    """
    opened, data = as_bundle(bundle), rows_file(Path(data), "train")
    encoder = load_encoder(opened.path, opened.manifest.tokenizer, encoding)
    tally = Tally(data)
    for example in encode_rows(data, encoder, tally):
        too_long = len(example.input_ids) > opened.manifest.max_length
        yield Preview(example.line, list(example.input_ids), list(example.labels), _pieces(example, encoder), too_long)
    for line in tally.notices():
        say(line)


def _pieces(example: Example, encoder: Encoder) -> list[Piece]:
    # Decoded from the start each time: tokenizers of the Llama kind drop the space before a piece decoded alone.
    pieces: list[Piece] = []
    end, shown = 0, ""
    for trained, run in groupby(example.labels, key=lambda label: label != IGNORED):
        end += len(list(run))
        text = encoder.decode(example.input_ids[:end], skip_special_tokens=False)
        pieces.append(Piece(text[len(shown) :], trained))
        shown = text
    return pieces
