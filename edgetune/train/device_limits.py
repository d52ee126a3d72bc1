"""What a device cannot do, whatever memory it has: rows too long, batches too large, shapes that it does not take."""

from __future__ import annotations

from edgetune.config import TrainConfig
from edgetune.data.buckets import Bucket, default_buckets, parse_buckets
from edgetune.device import Profile
from edgetune.errors import ResourceError
from edgetune.train.choice import Choice
from edgetune.train.workload import Workload


def require_fit(profile: Profile | None, choice: Choice, config: TrainConfig, longest: int) -> None:
    """Refuse what the device's profile excludes.

    Args:
        profile: The device's, where one was given.
        choice: What shall run there.
        config: How to train: batch size, and the shapes that were asked for.
        longest: Tokens of the longest row.

    Raises:
        ResourceError: Naming each limit, what was asked for, and what would fit.
    """
    if profile is None:
        return
    problems = []
    limits = profile.limits
    own = _own_shapes(profile, choice)
    rows = [bucket.length for bucket in own[-1:]] + ([limits.longest_row.value] if limits.longest_row else [])
    if rows and longest > min(rows):
        problems.append(f"rows of at most {min(rows):,} tokens, the longest has {longest:,} (--truncate)")
    if limits.largest_batch is not None and config.batch_size > limits.largest_batch.value:
        problems.append(f"at most {limits.largest_batch.value} rows in a batch, not {config.batch_size} (--batch-size)")
    strange = [bucket for bucket in _asked_shapes(config) if own and bucket not in own]
    if strange:
        problems.append(f"batches of {_text(own)} only, not {_text(strange)} (--buckets)")
    if problems:
        raise ResourceError(f"{profile.name} takes {'; '.join(problems)}")


def in_fixed_shapes(workload: Workload, profile: Profile | None, choice: Choice, config: TrainConfig) -> Workload:
    """The workload in the only shapes that graphs are compiled for; as it is where any shape may come.

    Args:
        workload: Of the run.
        profile: The device's, where one was given.
        choice: What executes it.
        config: How to train.

    Raises:
        UsageError: A row fits into none of the shapes that were asked for.
    """
    if choice.plan.accelerator is None:
        return workload
    return workload.within(_asked_shapes(config) or _own_shapes(profile, choice) or default_buckets(workload.room()))


def _asked_shapes(config: TrainConfig) -> list[Bucket]:
    return [] if config.buckets is None else parse_buckets(config.buckets)


def _own_shapes(profile: Profile | None, choice: Choice) -> list[Bucket]:
    """The device's, the shortest sequences first; none where the plan takes any shape."""
    if profile is None or profile.buckets is None or choice.plan.accelerator is None:
        return []
    return sorted(Bucket(positions, rows) for rows, positions in profile.buckets.shapes)


def _text(buckets: list[Bucket]) -> str:
    return ", ".join(map(str, buckets))
