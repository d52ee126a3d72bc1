"""The rows of a run, read once, when it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgetune.config import TrainConfig
from edgetune.data.encode import Encoder, Example, load_encoder
from edgetune.data.examples import Examples, load_examples
from edgetune.data.source import is_lasting, name_of
from edgetune.devices.profile import Profile
from edgetune.formats.bundle import Bundle
from edgetune.formats.manifest import RowEncoding
from edgetune.formats.storage import sha256_of
from edgetune.planning.limits import longest_row


@dataclass(frozen=True)
class RunRows:
    """What is trained and measured on."""

    train: Examples
    valid: list[Example]
    """Empty where nothing is measured."""
    valid_sha256: str
    """Of the validation file when it was read: later it may be gone, or another. Empty where it was a pipe, which is
    gone."""


class RowReader:
    """Reads and encodes the files of a run.

    Args:
        bundle: Has the tokenizer, and says how long rows may be.
        config: Whether rows are cut, and how they are encoded.
        profile: The device's, where one was given.
        notice: Called with how many rows were cut or left out, and with what else is to be said of them.
    """

    def __init__(
        self, bundle: Bundle, config: TrainConfig, profile: Profile | None, notice: Callable[[str], None]
    ) -> None:
        self._bundle, self._truncate, self._notice = bundle, config.truncate, notice
        self._encoding = RowEncoding(raw_prompts=config.raw_prompts, content_as_text=config.content_as_text)
        self._most = longest_row(profile, bundle.manifest, config)

    def read(self, path: Path) -> Examples:
        """The rows of a JSONL file.

        Raises:
            UsageError: There is no such file.
            DataError: Naming every bad row; or every row is too long.
            IncompatibleError: The model's template does not fit the rows.
        """
        rows = load_examples(path, self._encoder, self._most, truncate=self._truncate)
        which = f"of {rows.rows:,} rows are longer than {self._most:,} tokens"
        if rows.truncated:
            self._notice(f"{name_of(path)}: {len(rows.truncated):,} {which} and were cut")
        if rows.too_long:
            advice = "their answers begin after that" if self._truncate else "--truncate cuts them instead"
            self._notice(f"{name_of(path)}: {len(rows.too_long):,} {which} and were left out; {advice}")
        for line in rows.notices:
            self._notice(line)
        return rows

    @cached_property
    def _encoder(self) -> Encoder:
        return load_encoder(self._bundle.path, self._bundle.manifest.tokenizer, self._encoding)


def read_run_rows(reader: RowReader, data: Path, valid: Path | None) -> RunRows:
    """Read the rows to train on, and those to measure on, if any; errors are those of `RowReader.read`."""
    train = reader.read(data)
    if valid is None:
        return RunRows(train, [], "")
    measured = reader.read(valid).examples
    return RunRows(train, measured, sha256_of(valid) if is_lasting(valid) else "")
