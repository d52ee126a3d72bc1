"""The shapes and the plan of a run, held to a device; the largest batch that fits it, or what else would."""

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

    config: TrainConfig
    workload: Workload
    """In the shapes that the device takes."""
    choice: Choice


class Fitting:
    """Finds shapes, plan and batch of a run.

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
        """The run by that configuration.

        Args:
            config: How to train.
            notice: Hears what is to be said of the choice.

        Raises:
            IncompatibleError: The device does not run what was asked for, or the bundle lacks it.
            MissingDependencyError: The runtime's package is not installed.
            ResourceError: It does not fit.
            UsageError: Warm-up takes the whole run, or a row fits into none of the shapes that were asked for.
        """
        workload = Workload(self._bundle.manifest, self._rows, self._valid, config)
        require_fit(self._profile, config, workload.longest())
        workload = in_fixed_shapes(workload, self._profile, config)
        trunk = plan_of_trunk(self._bundle, config, [*self._rows, *self._valid])
        choice = self._choose(config, workload.work(), notice, trunk)
        require_place(self._profile, choice, notice)
        return Fit(config, workload, choice)

    def find(self, config: TrainConfig, notice: Callable[[str], None], *, pick_batch: bool) -> Fit:
        """The run with a batch that fits.

        Args:
            config: How to train.
            notice: Hears what is to be said of it.
            pick_batch: Where its batch does not fit, take the largest that does, and accumulate gradients.

        Raises:
            IncompatibleError: The device does not run what was asked for, or the bundle lacks it.
            MissingDependencyError: The runtime's package is not installed.
            ResourceError: Nothing fits; the message says what would.
            UsageError: As `fit`.
        """
        notes: list[str] = []
        try:
            found = self.fit(config, notes.append)
        except ResourceError as error:
            smaller = next(self._smaller(config), None)
            if not pick_batch or smaller is None:
                raise ResourceError(f"{error}\nwhat would fit: {self._advice(config, smaller)}") from error
            found, notes = smaller
        for note in notes:
            notice(note)
        return found

    def _choose(
        self, config: TrainConfig, work: Work, notice: Callable[[str], None], trunk: ExecutionPlan | None
    ) -> Choice:
        return choose(self._bundle.manifest, config, work, notice, self._profile, trunk, elsewhere=not self._here)

    def _smaller(self, config: TrainConfig) -> Iterator[tuple[Fit, list[str]]]:
        """Smaller batches that fit, the largest first, with as many rows a step."""
        for size in range(config.batch_size - 1, 0, -1):
            if config.batch_size % size:
                continue
            share = config.batch_size // size
            accumulated = config.gradient_accumulation_steps * share
            smaller = replace(config, batch_size=size, gradient_accumulation_steps=accumulated)
            notes: list[str] = []
            try:
                found = self.fit(smaller, notes.append)
            except ResourceError:
                continue
            said = f"{size} rows a batch instead of {config.batch_size}, {share} times as many batches a step"
            yield found, [*notes, said]

    def _advice(self, config: TrainConfig, smaller: tuple[Fit, list[str]] | None) -> str:
        if smaller is not None:
            fit, _ = smaller
            return (
                f"--batch-size {fit.config.batch_size} --gradient-accumulation-steps "
                f"{fit.config.gradient_accumulation_steps} ({fit.choice.plan}{_memory(fit.choice)})"
            )
        single = replace(config, batch_size=1)
        fits, too_long = 0, max(len(row.input_ids) for row in self._rows)
        found = None
        while too_long - fits > 1:
            length = (fits + too_long) // 2
            try:
                found, fits = self._choose_length(single, length), length
            except ResourceError:
                too_long = length
        if found is None:
            return "nothing of this bundle; use a smaller model, or a device with more memory"
        return f"rows of at most {fits:,} tokens with --batch-size 1 ({found.plan}{_memory(found)})"

    def _choose_length(self, config: TrainConfig, length: int) -> Choice:
        cut = [replace(row, input_ids=row.input_ids[:length], labels=row.labels[:length]) for row in self._rows]
        require_fit(self._profile, config, length)
        work = Work(length, length**2, rows=sum(row.memory for row in cut))
        trunk = plan_of_trunk(self._bundle, config, cut)
        return self._choose(config, work, lambda text: None, trunk)


def _memory(choice: Choice) -> str:
    peak = choice.predicted_peak_bytes
    return "" if peak is None else f", about {bytes_text(peak)}"
