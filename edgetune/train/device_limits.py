"""What a device cannot do, whatever memory it has: rows that are too long, batches that are too large."""

from __future__ import annotations

from edgetune.device import Profile
from edgetune.errors import ResourceError
from edgetune.train.candidates import STOCK
from edgetune.train.choice import Choice

Bucket = tuple[int, int]
"""Rows and positions of a batch whose shape was fixed before."""


def require_fit(profile: Profile, choice: Choice, batch_size: int, longest: int) -> None:
    """Refuse what the device's profile excludes.

    Args:
        profile: The device's.
        choice: What shall run there.
        batch_size: Rows of a batch.
        longest: Tokens of the longest row.

    Raises:
        ResourceError: Naming each limit, what was asked for, and what would fit.
    """
    problems = []
    limits = profile.limits
    if limits.longest_row is not None and longest > limits.longest_row.value:
        most = limits.longest_row.value
        problems.append(f"rows of at most {most:,} tokens, the longest has {longest:,} (--truncate)")
    if limits.largest_batch is not None and batch_size > limits.largest_batch.value:
        problems.append(f"at most {limits.largest_batch.value} rows in a batch, not {batch_size} (--batch-size)")
    bound = profile.buckets is not None and on_accelerator(profile, choice)
    if not problems and bound and bucket(profile, batch_size, longest) is None:
        shapes = ", ".join(f"{rows} × {positions}" for rows, positions in _shapes(profile))
        asked = f"{batch_size} × {longest:,}"
        problems.append(f"batches of {shapes} positions only, not {asked} (--batch-size, --truncate)")
    if problems:
        raise ResourceError(f"{profile.name} takes {'; '.join(problems)}")


def on_accelerator(profile: Profile, choice: Choice) -> bool:
    """Whether the accelerator executes the steps: stock ONNX Runtime is the CPU's."""
    form = profile.placement.whole_step if choice.plan.form == "whole" else profile.placement.layered
    return form == "accelerator" and choice.name != STOCK


def bucket(profile: Profile, batch_size: int, longest: int) -> Bucket | None:
    """The smallest fixed shape that holds so many rows of so many tokens; none where nothing does."""
    fitting = (shape for shape in _shapes(profile) if shape[0] >= batch_size and shape[1] >= longest)
    return next(fitting, None)


def _shapes(profile: Profile) -> tuple[Bucket, ...]:
    return () if profile.buckets is None else profile.buckets.shapes
