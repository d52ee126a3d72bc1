"""What a device cannot do, whatever memory it has: rows that are too long, shapes that it does not take."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.data.buckets import Bucket, default_buckets
from edgetune.errors import IncompatibleError, ResourceError, UsageError
from edgetune.formats.manifest import BundleManifest
from edgetune.planning.candidates import STOCK
from edgetune.planning.choice import Choice
from edgetune.planning.run import RunRequest
from edgetune.planning.workload import Workload
from edgetune.runtimes.execution import ExecutionPlan, WholePlan

_FORMS = {
    "whole_step": "the whole step as one graph",
    "layered": "training layer by layer",
    "split_trunk": "a split bundle's trunk",
    "forward_only": "forward-only training",
}
"""What a profile places, as messages call it."""
_OF_TRUNK = "VitisAIExecutionProvider"
"""The provider that a trunk asks for itself; its placement says what became of that."""


def require_form(request: RunRequest, choice: Choice) -> list[str]:
    """Refuse a form of training that the device's profile says runs nowhere on it.

    Args:
        request: What the run asks for.
        choice: What shall run there.

    Returns:
        That the CPU computes what the device's accelerator could, where it does.

    Raises:
        IncompatibleError: The device does not run this form of training.
    """
    profile = request.place.profile
    if profile is None:
        return []
    form = _form(choice.plan)
    where = getattr(profile.placement, form)
    if where == "no":
        key = form.replace("_", "-")
        other = "leave --trunk out" if form == "split_trunk" else "choose another --plan or --method"
        raise IncompatibleError(f"{profile.name} does not run {_FORMS[form]} (placement.{key} is 'no'); {other}")
    provider = profile.runtime.provider
    if where == "accelerator" and not choice.on_accelerator and not (form == "split_trunk" and provider == _OF_TRUNK):
        return [f"{profile.name}: {_FORMS[form]} does not reach its accelerator on {choice.name}; the CPU computes"]
    return []


def _form(plan: ExecutionPlan) -> str:
    if plan.trunk_layers:
        return "split_trunk"
    if plan.forward_only:
        return "forward_only"
    return "whole_step" if isinstance(plan, WholePlan) else "layered"


def longest_read(request: RunRequest, manifest: BundleManifest) -> int:
    """To how many tokens rows are read: what is longer is cut or left out.

    With `--truncate` a device's own limit counts as well; without it, such a row is read, and refused by its limit.
    """
    return longest_taken(request, manifest) if request.truncate else manifest.max_length


def longest_taken(request: RunRequest, manifest: BundleManifest) -> int:
    """Tokens of the longest row that the bundle and the device take.

    Args:
        request: What the run asks for.
        manifest: The bundle's.
    """
    lengths = [manifest.max_length, *(bucket.length for bucket in request.device_shapes()[-1:])]
    if (limit := request.place.longest_row()) is not None:
        lengths.append(limit)
    return min(lengths)


def require_rows_fit(request: RunRequest, longest: int) -> None:
    """Refuse rows that are longer than the device takes.

    Args:
        request: What the run asks for.
        longest: Tokens of the longest row.

    Raises:
        ResourceError: Naming each limit, and the longest row; `Fitting` adds what would fit.
    """
    profile = request.place.profile
    if profile is None:
        return
    problems = []
    own = request.device_shapes()
    if (most := request.place.longest_row()) is not None and longest > most:
        problems.append(f"rows of at most {most:,} tokens, the longest has {longest:,} (--truncate)")
    if own and longest > (most := own[-1].length):
        cpu = f", or --runtime {STOCK} on the CPU" if STOCK in profile.runtime.names else ""
        problems.append(
            f"in fixed shapes rows of at most {most:,} tokens, the longest has {longest:,} (--truncate{cpu})"
        )
    if problems:
        raise ResourceError(f"{profile.name} takes {'; '.join(problems)}")


def in_fixed_shapes(workload: Workload, request: RunRequest) -> Workload:
    """The workload in the only shapes that graphs are compiled for; as it is where any shape may come.

    Args:
        workload: Of the run.
        request: What the run asks for.

    Raises:
        UsageError: The device does not take a shape that was asked for, or a row fits into none of them.
    """
    if request.accelerator is None:
        return workload
    asked, own = request.shapes, request.device_shapes()
    limit, name = request.place.largest_batch(), request.place.name
    if limit is not None and (large := [bucket for bucket in asked if bucket.batch > limit]):
        raise UsageError(
            f"{name} takes batches of at most {limit} rows, not {_text(large)}; give smaller ones to "
            "--buckets, or leave it out"
        )
    if own and (strange := [bucket for bucket in asked if bucket not in own]):
        raise UsageError(
            f"{name} takes batches of {_text(own)} only, not {_text(strange)}; give some of these to "
            "--buckets, or leave it out"
        )
    return workload.within(asked or own or default_buckets(workload.capacity()))


def _text(buckets: Sequence[Bucket]) -> str:
    return ", ".join(map(str, buckets))
