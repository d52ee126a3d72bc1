"""How much of a device's flash a run takes: the bundle, the adapter, and what is compiled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from edgetune.devices.place import Place
from edgetune.errors import ResourceError
from edgetune.formats.adapter import most_bytes
from edgetune.formats.bundle import MANIFEST, Bundle
from edgetune.model.architecture import tensor_shapes
from edgetune.planning.fit import Fit
from edgetune.runtimes.execution import LayeredPlan, WholePlan
from edgetune.runtimes.whole.contexts import most_context_bytes
from edgetune.text.byte_size import bytes_text


@dataclass(frozen=True)
class Flash:
    """Bytes on the disk."""

    bundle: int
    adapter: int
    cache: int
    """Compiled models, at most."""
    states: int = 0
    """What enters the lowest trained layer, while the run goes on."""

    @property
    def total(self) -> int:
        """All together."""
        return self.bundle + self.adapter + self.cache + self.states


def flash_of(bundle: Bundle, fit: Fit) -> Flash:
    """What a run takes.

    Args:
        bundle: What is trained.
        fit: How it is.
    """
    manifest, choice, workload = bundle.manifest, fit.choice, fit.workload
    files = sum(file.size for file in manifest.files) + (bundle.path / MANIFEST).stat().st_size
    adapter = sum(most_bytes(manifest.lora, workload.schedule.total_steps).values())
    cache = 0 if choice.footprint is None else choice.footprint.cache_bytes
    if isinstance(choice.plan, WholePlan) and choice.plan.accelerator is not None:
        weights = sum(math.prod(shape) for shape in tensor_shapes(manifest.architecture).values())
        training = {(shape.sequences, shape.length) for step in workload.step_shapes for shape in step}
        measuring = {(shape.sequences, shape.length) for shape in workload.validation_shapes}
        # Measuring takes a graph of its own, which is all that forward-only training takes.
        graphs = len(training | measuring) if choice.plan.forward_only else len(training) + len(measuring)
        cache = most_context_bytes(weights, graphs)
    states = choice.plan.states if isinstance(choice.plan, LayeredPlan) else None
    return Flash(files, adapter, cache, 0 if states is None else states.most_bytes)


def within_flash(bundle: Bundle, fit: Fit, place: Place) -> Fit:
    """The run with no more kept of what enters its lowest trained layer than the device's flash has room for.

    Args:
        bundle: What is trained.
        fit: How it is.
        place: Where.

    Raises:
        ResourceError: It takes more even without that.
    """
    flash, limit, plan = flash_of(bundle, fit), place.flash_limit(), fit.choice.plan
    require_flash(replace(flash, states=0), bundle, place)
    if limit is None or flash.total <= limit or not isinstance(plan, LayeredPlan) or plan.states is None:
        return fit
    left = limit - (flash.total - flash.states)
    plan = replace(plan, states=replace(plan.states, most_bytes=left))
    return replace(fit, choice=replace(fit.choice, plan=plan))


def require_flash(flash: Flash, bundle: Bundle, place: Place) -> None:
    """Refuse a run that takes more flash than the device has.

    Raises:
        ResourceError: Naming what takes how much, and what would help.
    """
    limit = place.flash_limit()
    if limit is None or flash.total <= limit:
        return
    smaller = "" if bundle.manifest.base.weights == "int4" else ", or prepare it with --base int4"
    raise ResourceError(
        f"{place.name} has {bytes_text(limit)} of flash, the run needs {bytes_text(flash.total)}: bundle "
        f"{bytes_text(flash.bundle)}, adapter {bytes_text(flash.adapter)}, cache {bytes_text(flash.cache)}; use a "
        f"smaller model{smaller}"
    )
