"""The shapes, the plan and the passes of a run, held to a device; or what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from edgetune.config import TrainConfig
from edgetune.data.encode import Example
from edgetune.devices.profile import Profile
from edgetune.errors import IncompatibleError, ResourceError
from edgetune.formats.bundle import Bundle
from edgetune.formats.trunk import read_trunk_info
from edgetune.planning.choice import Choice, TooLargeError, choose
from edgetune.planning.cost_model import CostModel
from edgetune.planning.limits import in_fixed_shapes, require_fit, require_place
from edgetune.planning.memory import Work
from edgetune.planning.workload import Workload
from edgetune.runtimes.execution import ExecutionPlan
from edgetune.text.byte_size import bytes_text, parse_bytes

_FLOAT = 4


@dataclass(frozen=True)
class Fit:
    """How a run fits."""

    workload: Workload
    """In the shapes that the device takes, and in as many passes a step as are fastest."""
    choice: Choice
    notes: tuple[str, ...] = ()
    """What is to be said of it."""


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
        """The run by that configuration: on the fastest runtime that fits, with the least work.

        In several passes a batch takes less memory than in one, and weights are read more often; activations that are
        computed again have their price, too. The plan and the number of passes are chosen together.

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
            fit = self._fastest(config)
        except ResourceError as error:
            raise ResourceError(f"{error}\nwhat would fit: {self._advice(config)}") from error
        for note in fit.notes:
            notice(note)
        require_place(self._profile, fit.choice, notice)
        return fit

    def _fastest(self, config: TrainConfig) -> Fit:
        """As `fit`, wherever the device's profile says that it runs, and without advice where nothing fits."""
        workload = Workload(self._bundle.manifest, self._rows, self._valid, config)
        require_fit(self._profile, config, workload.longest())
        trunk = plan_of_trunk(self._bundle, config, [*self._rows, *self._valid])
        found: dict[Work, Fit] = {}
        refused: list[TooLargeError] = []
        for rows in self._pass_rows(config):
            divided = in_fixed_shapes(workload.in_passes(rows), self._profile, config)
            work = divided.work()
            if work in found:
                continue
            notes: list[str] = []
            try:
                choice = choose(
                    self._bundle.manifest, config, work, notes.append, self._profile, trunk, elsewhere=not self._here
                )
            except TooLargeError as error:
                refused.append(error)
                continue
            found[work] = Fit(divided, choice, tuple(notes))
            if choice.free:
                break
        if not found:
            raise min(refused, key=lambda error: error.peak)
        return min(found.values(), key=self._order)

    def _order(self, fit: Fit) -> tuple[bool, int, float]:
        """The least is the best: it fits, its runtime is the fastest, and then it has the least work.

        Of what does not fit, and is tried nevertheless, the least memory.
        """
        choice = fit.choice
        if not choice.fits:
            return True, 0, choice.predicted_peak_bytes or 0
        steps = fit.workload.step_shapes
        return False, choice.place, CostModel(self._bundle, choice).of_passes(each for step in steps for each in step)

    def _pass_rows(self, config: TrainConfig) -> Iterator[int]:
        """For how many rows a pass may have room: a batch, or what the device takes of it, half of that, and so on."""
        limit = None if self._profile is None else self._profile.limits.largest_batch
        rows = config.batch_size if limit is None else min(config.batch_size, limit.value)
        yield rows
        rows = min(rows, max(len(self._rows), len(self._valid)))
        while rows > 1:
            rows = -(-rows // 2)
            yield rows

    def _advice(self, config: TrainConfig) -> str:
        """The longest rows that fit."""
        fits, too_long = 0, max(len(row.input_ids) for row in (*self._rows, *self._valid))
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
        """With rows that are cut to that length."""
        cut, valid = (
            [replace(row, input_ids=row.input_ids[:length], labels=row.labels[:length]) for row in rows]
            for rows in (self._rows, self._valid)
        )
        return Fitting(self._bundle, cut, valid, self._profile, here=self._here)._fastest(config).choice


def plan_of_trunk(bundle: Bundle, config: TrainConfig, examples: Sequence[Example]) -> ExecutionPlan | None:
    """What the plan says of the trunk; none where it wants no trunk.

    Args:
        bundle: It was split, if the plan is `split`.
        config: How to train.
        examples: All rows that will come.

    Raises:
        IncompatibleError: The bundle has no trunk, or a row does not fit it.
        VerificationError: The trunk's description is broken.
    """
    if config.plan != "split":
        return None
    info = read_trunk_info(bundle)
    longest = max(len(example.input_ids) for example in examples)
    if longest > info.length:
        raise IncompatibleError(
            f"the longest row has {longest} tokens, the bundle's trunk takes {info.length}; split the bundle again "
            f"with --length {longest} or more, or leave longer rows out"
        )
    tokens = sum(len(example.input_ids) for example in examples)
    states = _FLOAT * tokens * bundle.manifest.architecture.hidden_size
    return ExecutionPlan(
        "layered",
        trunk_layers=info.layers,
        trunk_cache_bytes=min(parse_bytes(config.trunk_cache), states),
        vitisai_config=config.vitisai_config,
    )
