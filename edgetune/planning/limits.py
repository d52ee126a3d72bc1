"""What a device cannot do, whatever memory it has: rows that are too long, shapes that it does not take."""

from __future__ import annotations

from collections.abc import Callable

from edgetune.config import TrainConfig
from edgetune.data.buckets import Bucket, default_buckets, parse_buckets
from edgetune.devices.profile import Profile
from edgetune.errors import IncompatibleError, ResourceError, UsageError
from edgetune.formats.manifest import BundleManifest
from edgetune.planning.accelerator import is_accelerated
from edgetune.planning.candidates import STOCK
from edgetune.planning.choice import Choice
from edgetune.planning.workload import Workload
from edgetune.runtimes.execution import ExecutionPlan

_FORMS = {
    "whole_step": "the whole step as one graph",
    "layered": "training layer by layer",
    "split_trunk": "a split bundle's trunk",
    "forward_only": "forward-only training",
}
"""What a profile places, as messages call it."""
_OF_TRUNK = "VitisAIExecutionProvider"
"""The provider that a trunk asks for itself; its placement says what became of that."""


def require_place(profile: Profile | None, choice: Choice, notice: Callable[[str], None]) -> None:
    """Refuse what the device's profile says runs nowhere on it.

    Args:
        profile: The device's, where one was given.
        choice: What shall run there.
        notice: Hears that the CPU computes what the device's accelerator could.

    Raises:
        IncompatibleError: The device does not run this form of training.
    """
    if profile is None:
        return
    form = _form(choice.plan)
    place = getattr(profile.placement, form)
    if place == "no":
        key = form.replace("_", "-")
        raise IncompatibleError(
            f"{profile.name} does not run {_FORMS[form]} (placement.{key} is 'no'); choose another --plan or --method"
        )
    provider = profile.runtime.provider
    if place == "accelerator" and not choice.on_accelerator and not (form == "split_trunk" and provider == _OF_TRUNK):
        notice(f"{profile.name}: {_FORMS[form]} does not reach its accelerator on {choice.name}; the CPU computes")


def _form(plan: ExecutionPlan) -> str:
    if plan.trunk_layers:
        return "split_trunk"
    if plan.forward_only:
        return "forward_only"
    return "whole_step" if plan.form == "whole" else "layered"


def longest_row(profile: Profile | None, manifest: BundleManifest, config: TrainConfig) -> int:
    """Tokens of the longest row that is read; with `--truncate` no more than `longest_taken`."""
    return longest_taken(profile, manifest, config) if config.truncate else manifest.max_length


def longest_taken(profile: Profile | None, manifest: BundleManifest, config: TrainConfig) -> int:
    """Tokens of the longest row that the bundle and the device take.

    Args:
        profile: The device's, where one was given.
        manifest: The bundle's.
        config: How to train, as it holds on the device.
    """
    lengths = [manifest.max_length, *(bucket.length for bucket in _own_shapes(profile, config)[-1:])]
    if profile is not None and (limit := profile.limits.longest_row) is not None:
        lengths.append(limit.value)
    return min(lengths)


def require_fit(profile: Profile | None, config: TrainConfig, longest: int) -> None:
    """Refuse what the device's profile excludes.

    Args:
        profile: The device's, where one was given.
        config: How to train, as it holds on the device.
        longest: Tokens of the longest row.

    Raises:
        ResourceError: Naming each limit, what was asked for, and what would fit.
    """
    if profile is None:
        return
    problems = []
    limits = profile.limits
    own = _own_shapes(profile, config)
    if limits.longest_row is not None and longest > (most := limits.longest_row.value):
        problems.append(f"rows of at most {most:,} tokens, the longest has {longest:,} (--truncate)")
    if own and longest > (most := own[-1].length):
        cpu = f", or --runtime {STOCK} on the CPU" if STOCK in profile.runtime.names else ""
        problems.append(
            f"in fixed shapes rows of at most {most:,} tokens, the longest has {longest:,} (--truncate{cpu})"
        )
    if problems:
        raise ResourceError(f"{profile.name} takes {'; '.join(problems)}")


def in_fixed_shapes(workload: Workload, profile: Profile | None, config: TrainConfig) -> Workload:
    """The workload in the only shapes that graphs are compiled for; as it is where any shape may come.

    Args:
        workload: Of the run.
        profile: The device's, where one was given.
        config: How to train, as it holds on the device.

    Raises:
        UsageError: The device does not take a shape that was asked for, or a row fits into none of them.
    """
    if not is_accelerated(config.runtime, config.plan):
        return workload
    asked, own = _asked_shapes(config), _own_shapes(profile, config)
    if profile is not None:
        _require_shapes(profile, asked, own)
    return workload.within(asked or own or default_buckets(workload.capacity()))


def _require_shapes(profile: Profile, asked: list[Bucket], own: list[Bucket]) -> None:
    limit = profile.limits.largest_batch
    if limit is not None and (large := [bucket for bucket in asked if bucket.batch > limit.value]):
        raise UsageError(
            f"{profile.name} takes batches of at most {limit.value} rows, not {_text(large)}; give smaller ones to "
            "--buckets, or leave it out"
        )
    if own and (strange := [bucket for bucket in asked if bucket not in own]):
        raise UsageError(
            f"{profile.name} takes batches of {_text(own)} only, not {_text(strange)}; give some of these to "
            "--buckets, or leave it out"
        )


def _asked_shapes(config: TrainConfig) -> list[Bucket]:
    return [] if config.buckets is None else parse_buckets(config.buckets)


def _own_shapes(profile: Profile | None, config: TrainConfig) -> list[Bucket]:
    """The device's, the shortest sequences first; none where the plan takes any shape."""
    if profile is None or profile.buckets is None or not is_accelerated(config.runtime, config.plan):
        return []
    return sorted(Bucket(positions, rows) for rows, positions in profile.buckets.shapes)


def _text(buckets: list[Bucket]) -> str:
    return ", ".join(map(str, buckets))
