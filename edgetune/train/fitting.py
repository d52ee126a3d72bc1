"""The largest batch that fits a device, and the plan that trains it; where nothing fits, what would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from edgetune.bundle import Bundle
from edgetune.byte_size import bytes_text
from edgetune.config import TrainConfig
from edgetune.data.encode import Example
from edgetune.device import Profile
from edgetune.errors import ResourceError
from edgetune.footprint import Work
from edgetune.train.choice import Choice, choose
from edgetune.train.device_limits import in_fixed_shapes, require_fit, require_place
from edgetune.train.trunk_plan import plan_of_trunk
from edgetune.train.workload import Workload


class Fitting:
    """Finds the batch and the plan of a run.

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

    def workload(self, config: TrainConfig) -> Workload:
        """The run by that configuration, in the shapes that the device takes.

        Raises:
            ResourceError: The device excludes it.
            UsageError: Warm-up takes the whole run.
        """
        workload = Workload(self._bundle.manifest, self._rows, self._valid, config)
        require_fit(self._profile, config, workload.longest())
        return in_fixed_shapes(workload, self._profile, config)

    def find(self, config: TrainConfig, *, pick_batch: bool) -> tuple[TrainConfig, Choice, list[str]]:
        """The configuration with a batch that fits, what executes it, and what is to be said of that.

        Args:
            config: How to train.
            pick_batch: Where its batch does not fit, take the largest that does, and accumulate gradients.

        Raises:
            IncompatibleError: The device does not run what was asked for, or the bundle lacks it.
            MissingDependencyError: The runtime's package is not installed.
            ResourceError: Nothing fits; the message says what would.
        """
        try:
            return config, *self._choose(config)
        except ResourceError as error:
            smaller = next(self._smaller(config), None)
            if pick_batch and smaller is not None:
                return smaller
            raise ResourceError(f"{error}\nwhat would fit: {self._advice(config, smaller)}") from error

    def _choose(self, config: TrainConfig) -> tuple[Choice, list[str]]:
        notes: list[str] = []
        work = self.workload(config).work()
        manifest = self._bundle.manifest
        trunk = plan_of_trunk(self._bundle, config, [*self._rows, *self._valid])
        choice = choose(manifest, config, work, notes.append, self._profile, trunk, elsewhere=not self._here)
        require_place(self._profile, choice, notes.append)
        return choice, notes

    def _smaller(self, config: TrainConfig) -> Iterator[tuple[TrainConfig, Choice, list[str]]]:
        """Smaller batches that fit, the largest first, with as many rows a step."""
        for size in range(config.batch_size - 1, 0, -1):
            if config.batch_size % size:
                continue
            share = config.batch_size // size
            accumulated = config.gradient_accumulation_steps * share
            smaller = replace(config, batch_size=size, gradient_accumulation_steps=accumulated)
            try:
                choice, notes = self._choose(smaller)
            except ResourceError:
                continue
            said = f"{size} rows a batch instead of {config.batch_size}, {share} times as many batches a step"
            yield smaller, choice, [*notes, said]

    def _advice(self, config: TrainConfig, smaller: tuple[TrainConfig, Choice, list[str]] | None) -> str:
        if smaller is not None:
            fitting, choice, _ = smaller
            return (
                f"--batch-size {fitting.batch_size} --gradient-accumulation-steps "
                f"{fitting.gradient_accumulation_steps} ({choice.plan}{_memory(choice)})"
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
        return choose(
            self._bundle.manifest, config, work, lambda text: None, self._profile, trunk, elsewhere=not self._here
        )


def _memory(choice: Choice) -> str:
    peak = choice.predicted_peak_bytes
    return "" if peak is None else f", about {bytes_text(peak)}"
