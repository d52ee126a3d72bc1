"""The shapes, the plan and the passes of a run, held to a device; or what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from edgetune.bundle import Bundle
from edgetune.byte_size import bytes_text
from edgetune.config import TrainConfig
from edgetune.data.encode import Example
from edgetune.device import Profile
from edgetune.errors import ResourceError
from edgetune.execution import ExecutionPlan
from edgetune.footprint import Work
from edgetune.train.choice import Choice, choose
from edgetune.train.device_limits import in_fixed_shapes, require_fit, require_place
from edgetune.train.trunk_plan import plan_of_trunk
from edgetune.train.workload import Workload


@dataclass(frozen=True)
class Fit:
    """How a run fits."""

    workload: Workload
    """In the shapes that the device takes, and in as many passes a step as are fastest."""
    choice: Choice


class Fitting:
    """Finds shapes, plan and passes of a run.

    Args:
        bundle: What would be trained.
        rows: To train on.
        valid: To measure on.
        profile: Of the device; without one it is this machine.
        here: The device is this machine.
    """

    def __init__(
        self, bundle: Bundle, rows: Sequence[Example], valid: Sequence[Example], profile: Profile | None, *, here: bool
    ) -> None:
        self._bundle, self._rows, self._valid, self._profile, self._here = bundle, rows, valid, profile, here

    def fit(self, config: TrainConfig, notice: Callable[[str], None]) -> Fit:
        """The run by that configuration: on the fastest runtime that fits, in the fastest way.

        A batch takes less memory in several passes than in one, for the price of reading the weights more often, which
        is less than that of computing activations again.

        Args:
            config: How to train.
            notice: Hears what is to be said of the choice.

        Raises:
            IncompatibleError: The device does not run what was asked for, or the bundle lacks it.
            MissingDependencyError: The runtime's package is not installed.
            ResourceError: Nothing fits; the message says what would.
            UsageError: Warm-up takes the whole run, or a row fits into none of the shapes that were asked for.
        """
        try:
            fit, notes = self._fastest(config)
        except ResourceError as error:
            raise ResourceError(f"{error}\nwhat would fit: {self._advice(config)}") from error
        for note in notes:
            notice(note)
        require_place(self._profile, fit.choice, notice)
        return fit

    def _fastest(self, config: TrainConfig) -> tuple[Fit, list[str]]:
        """What fits and is the fastest, and what is to be said of it."""
        workload = Workload(self._bundle.manifest, self._rows, self._valid, config)
        require_fit(self._profile, config, workload.longest())
        trunk = plan_of_trunk(self._bundle, config, [*self._rows, *self._valid])
        found: list[tuple[Fit, list[str]]] = []
        refused: list[ResourceError] = []
        for rows in self._pass_rows(config):
            notes: list[str] = []
            divided = in_fixed_shapes(workload.in_passes(rows), self._profile, config)
            try:
                choice = self._choose(config, divided.work(), notes.append, trunk)
            except ResourceError as error:
                refused.append(error)
                continue
            found.append((Fit(divided, choice), notes))
            if choice.is_ideal(self._bundle.manifest):
                break
        if not found:
            raise refused[-1]
        return min(found, key=lambda each: each[0].choice.order)

    def _pass_rows(self, config: TrainConfig) -> Iterator[int]:
        """How many rows a pass may hold: all of a batch that the device takes, half of them, and so on."""
        limit = None if self._profile is None else self._profile.limits.largest_batch
        rows = config.batch_size if limit is None else min(config.batch_size, limit.value)
        yield rows
        while rows > 1:
            rows = -(-rows // 2)
            yield rows

    def _choose(
        self, config: TrainConfig, work: Work, notice: Callable[[str], None], trunk: ExecutionPlan | None
    ) -> Choice:
        return choose(self._bundle.manifest, config, work, notice, self._profile, trunk, elsewhere=not self._here)

    def _advice(self, config: TrainConfig) -> str:
        """The longest rows that fit."""
        fits, too_long = 0, max(len(row.input_ids) for row in self._rows)
        found = None
        while too_long - fits > 1:
            length = (fits + too_long) // 2
            try:
                found, fits = self._choose_length(config, length), length
            except ResourceError:
                too_long = length
        if found is None:
            return "nothing of this bundle; use a smaller model, or a device with more memory"
        peak = found.predicted_peak_bytes
        memory = "" if peak is None else f", about {bytes_text(peak)}"
        return f"rows of at most {fits:,} tokens ({found.plan}{memory})"

    def _choose_length(self, config: TrainConfig, length: int) -> Choice:
        """For passes of one row."""
        cut = [replace(row, input_ids=row.input_ids[:length], labels=row.labels[:length]) for row in self._rows]
        require_fit(self._profile, config, length)
        work = Work(length, length**2, rows=sum(row.memory for row in cut))
        trunk = plan_of_trunk(self._bundle, config, cut)
        return self._choose(config, work, lambda text: None, trunk)
