"""The rows of a run, read once, when it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetune.bundle import Bundle
from edgetune.config import TrainConfig
from edgetune.data.encode import Example, Examples, load_encoder, load_examples
from edgetune.device import Profile
from edgetune.storage import sha256_of
from edgetune.train.device_limits import longest_row


@dataclass(frozen=True)
class RunRows:
    """What is trained and measured on."""

    train: Examples
    valid: list[Example]
    """Empty where nothing is measured."""
    valid_sha256: str
    """Of the validation file when it was read: later it may be gone, or another."""


def read_run_rows(
    bundle: Bundle,
    data: Path,
    valid: Path | None,
    config: TrainConfig,
    profile: Profile | None,
    notice: Callable[[str], None],
) -> RunRows:
    """Read and encode the rows of a run.

    Args:
        bundle: Has the tokenizer, and says how long rows may be.
        data: JSONL rows to train on.
        valid: JSONL rows to measure on, if any.
        config: Whether rows are cut.
        profile: The device's, where one was given.
        notice: Hears how many rows were cut or left out.

    Raises:
        UsageError: There is no such file.
        DataError: Naming every bad row; or every row is too long.
        IncompatibleError: The model's template does not fit the rows.
    """
    manifest = bundle.manifest
    encoder = load_encoder(bundle.path, manifest.tokenizer)
    most = longest_row(profile, manifest, config)

    def read(path: Path) -> Examples:
        rows = load_examples(path, encoder, most, truncate=config.truncate)
        limit = f"longer than {most:,} tokens"
        if rows.truncated:
            notice(f"{path}: {len(rows.truncated):,} of {rows.rows:,} rows are {limit} and were cut")
        if rows.too_long:
            advice = "their answers begin after that" if config.truncate else "--truncate cuts them instead"
            notice(f"{path}: {len(rows.too_long):,} of {rows.rows:,} rows are {limit} and were left out; {advice}")
        return rows

    train = read(data)
    return RunRows(train, [], "") if valid is None else RunRows(train, read(valid).examples, sha256_of(valid))
