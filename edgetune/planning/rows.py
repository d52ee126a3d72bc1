"""The rows of a run, read once, when it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from edgetune.data.encode import Encoder, Example, load_encoder
from edgetune.data.examples import Examples, load_examples
from edgetune.data.source import is_lasting, name_of
from edgetune.formats.bundle import Bundle
from edgetune.formats.storage import sha256_of
from edgetune.planning.limits import longest_read
from edgetune.planning.run import RunRequest


@dataclass(frozen=True)
class RunRows:
    """What is trained and measured on."""

    train: Examples
    valid: Sequence[Example]
    """Empty where nothing is measured."""
    valid_sha256: str
    """Of the validation file when it was read: later it may be gone, or another. Empty where it was a pipe, which is
    gone."""


class RowReader:
    """Reads and encodes the files of a run.

    Args:
        bundle: Has the tokenizer, and says how long rows may be.
        request: What the run asks for: whether rows are cut, and how they are encoded.
    """

    def __init__(self, bundle: Bundle, request: RunRequest) -> None:
        self._bundle, self._truncate, self._encoding = bundle, request.truncate, request.encoding
        self._most = longest_read(request, bundle.manifest)

    def read(self, path: Path) -> Examples:
        """The rows of a JSONL file; its notices begin with how many of them were cut or left out.

        Raises:
            UsageError: There is no such file.
            DataError: Naming every bad row; or every row is too long.
            IncompatibleError: The model's template does not fit the rows.
        """
        rows = load_examples(path, self._encoder, self._most, truncate=self._truncate)
        notices = []
        which = f"of {rows.rows:,} rows are longer than {self._most:,} tokens"
        if rows.truncated:
            notices.append(f"{name_of(path)}: {rows.truncated:,} {which} and were cut")
        if rows.too_long:
            advice = "their answers begin after that" if self._truncate else "--truncate cuts them instead"
            notices.append(f"{name_of(path)}: {rows.too_long:,} {which} and were left out; {advice}")
        return replace(rows, notices=[*notices, *rows.notices])

    @cached_property
    def _encoder(self) -> Encoder:
        return load_encoder(self._bundle.path, self._bundle.manifest.tokenizer, self._encoding)


def fingerprint(path: Path | None) -> str:
    """SHA-256 of a file of rows, by which `export` finds it again; empty without one, or where it was a pipe."""
    return "" if path is None or not is_lasting(path) else sha256_of(path)
