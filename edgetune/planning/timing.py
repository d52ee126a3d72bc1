"""How long a step takes on this machine: a few of the bundle's layers are run by the runtime and plan of the run.

Layers are alike, so that a model that is cut off after a few of them tells what the whole one takes: what does not
depend on the depth, and what every layer adds. Other shapes follow from the work that the manifest says they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

from edgetune.data.batches import Batch, make_batch
from edgetune.data.encode import Example
from edgetune.formats.bundle import Bundle
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.lora import initial_parameters
from edgetune.planning.choice import Choice
from edgetune.planning.cost import CostModel
from edgetune.planning.trainer import open_trainer
from edgetune.runtimes.contract import OptimizerConfig, Session
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.forward_only import ForwardOnlySession, QueryConfig

_AIM = 8.5
"""Seconds after which nothing more is begun; timing takes 10 at most about."""
_ALIKE = 1.1
"""Batches with less than so many times another's work tell the same."""
_LEAST_RATE, _MOST_RATE = 0.6, 1.5
"""What a layer's work takes, relative to that of a model of one layer: what is beyond is the machine's noise."""
_SLOW = 5e9
"""Products a second that every processor reaches: what takes long even so is measured on a few positions first."""
_LONG = 0.5
"""Seconds of such a step."""
_FEW = 64
"""Positions of that first batch."""
_ENOUGH = 1.0
"""Seconds of steps, unless they are few or many."""
_LEAST_TURNS, _MOST_TURNS = 2, 30
"""Steps of each shape that count."""
_STEPS, _STEPS_ONCE = 4, 2
"""That are made at least, and of a batch whose first step is of interest."""
_QUERIES = QueryConfig(queries=2, perturbation_size=1e-2, seed=0)
"""That are timed together where a step is made of such."""
_OPTIMIZER = OptimizerConfig(weight_decay=0.0, max_grad_norm=1.0)
"""Of the steps that are timed."""
_RATE = 1e-6
"""Learning rate of the steps that are timed; nothing of them is kept."""


@dataclass(frozen=True)
class Timing:
    """What was measured, and how to predict from it; where nothing was, starting takes no time."""

    points: tuple[tuple[float, float], ...]
    """Work of a pass and its seconds, in the order of the work; at least one."""
    start: float = 0.0
    """Work of a pass without positions."""
    first_seconds: float = 0.0
    """What the first step takes more than another."""
    shape_seconds: float = 0.0
    """What the first batch of another shape takes more than another of the same."""
    kept_seconds: float = 0.0
    """The same of a shape in `shapes`: its graphs were compiled and kept."""
    shapes: frozenset[tuple[int, ...]] = frozenset()
    """Sequences and positions of the batches that were measured."""
    took: float = 0.0
    """Seconds."""

    def seconds(self, work: float) -> float:
        """Of a pass with so much work: on the line between the nearest that were measured, or in proportion."""
        below = [point for point in self.points if point[0] <= work]
        above = [point for point in self.points if point[0] > work]
        if below and above:
            (less, short), (more, long) = below[-1], above[0]
            return short + (long - short) * (work - less) / (more - less)
        near, seconds = below[-1] if below else above[0]
        return seconds * (work + self.start) / (near + self.start)


@dataclass(frozen=True)
class _Times:
    first: float
    """What the first step took more than the others."""
    step: float


def time_steps(bundle: Bundle, choice: Choice, batches: Sequence[Batch]) -> Timing:
    """Time a few steps.

    Args:
        bundle: What is trained.
        choice: Runtime and plan.
        batches: Of the run, one of each shape that shall be measured.
    """
    begin = perf_counter()
    model = _cost_model(bundle, choice)
    layered = isinstance(choice.plan, LayeredPlan)
    shallow = _cut(bundle, choice, 1) if layered else (bundle, choice)
    shallow_model = _cost_model(*shallow)
    if not choice.compiles:
        batches = _distinct(batches, model)
    timings = _Sample(*shallow, begin).measure(_affordable(bundle, shallow_model, batches))
    compiling = min(timing.first for _, timing in timings)
    # A short row that was measured to be on the safe side is no shape of the run.
    timings = [each for each in timings if any(each[0] is batch for batch in batches)] or timings
    firsts = [timing.first for _, timing in timings]
    depth, added = 1 if layered else model.layers, 0.0
    if layered and model.layers > 1:
        (usual, before), others = timings[0], timings[1:] if choice.compiles else []
        growth = _cost_model(*_cut(bundle, choice, 2)).of(usual) / shallow_model.of(usual) - 1
        depth = _depth(before, [timing for _, timing in others], growth, model.layers, _AIM - (perf_counter() - begin))
        deep = _cut(bundle, choice, depth)
        found = _Sample(*deep, begin).measure(iter([usual]), [batch for batch, _ in others])
        firsts = [timing.first for _, timing in found]
        added = max(0.0, found[0][1].step - before.step) / (_cost_model(*deep).of(usual) - shallow_model.of(usual))
        if depth < model.layers:
            rate = before.step / shallow_model.of(usual)
            added = min(max(added, _LEAST_RATE * rate), _MOST_RATE * rate)
    points = []
    passes = _QUERIES.queries if choice.plan.forward_only else 1
    for batch, timing in timings:
        work = model.of(batch)
        points.append((work, (timing.step + added * (work - shallow_model.of(batch))) / passes))
    return Timing(
        points=tuple(sorted(points)),
        start=model.start,
        first_seconds=_first_seconds(choice, firsts, model.layers / depth),
        shape_seconds=compiling,
        kept_seconds=min(firsts),
        shapes=frozenset(batch.input_ids.shape for batch, _ in timings),
        took=perf_counter() - begin,
    )


def _distinct(batches: Sequence[Batch], model: CostModel) -> list[Batch]:
    """Without those that tell the same as one with less work."""
    taken: list[Batch] = []
    for batch in sorted(batches, key=model.of):
        if not taken or model.of(batch) > _ALIKE * model.of(taken[-1]):
            taken.append(batch)
    return taken


def _first_seconds(choice: Choice, firsts: Sequence[float], share: float) -> float:
    """What the first step of the whole depth takes more than others.

    Args:
        choice: Runtime and plan.
        firsts: What the first step of each shape took more, in the order in which they were measured.
        share: The whole depth by the measured one.
    """
    # A later shape compiles as well, but finds the weights unpacked.
    compiling = min(firsts[1:], default=firsts[0]) if choice.compiles else 0.0
    return compiling + max(0.0, firsts[0] - compiling) * share


def _affordable(bundle: Bundle, model: CostModel, batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches with less work first; where a step may take long, a short one before them."""
    ordered = sorted(batches, key=model.of)
    if model.of(ordered[0]) / _SLOW > _LONG:
        yield _row(bundle, _FEW)
    yield from ordered


class _Sample:
    """A session on the bundle, or the beginning of it, for as long as there is time.

    Args:
        bundle: What is run.
        choice: How.
        begin: When timing began.
    """

    def __init__(self, bundle: Bundle, choice: Choice, begin: float) -> None:
        self._bundle, self._choice, self._begin = bundle, choice, begin
        self._model = _cost_model(bundle, choice)

    def measure(self, batches: Iterator[Batch], once: Sequence[Batch] = ()) -> list[tuple[Batch, _Times]]:
        """Each batch and its times; instead of a batch that would take too long a shorter one, or none.

        Args:
            batches: That are timed again and again; the first in any case.
            once: Of which what the first step takes more is of interest, and which follow the others.
        """
        lora = self._choice.plan.trained_slots(self._bundle.manifest.lora)
        parameters = initial_parameters(lora, 0, read_row_norms(self._bundle))
        queries = _QUERIES if self._choice.plan.forward_only else None
        with open_trainer(self._bundle, parameters, self._choice, _OPTIMIZER, queries) as session:
            taken: list[Batch] = []
            seconds: list[list[float]] = []
            rate = None
            for batch in batches:
                given = batch if rate is None else self._shortened(batch, rate)
                if given is None:
                    break
                taken.append(given)
                seconds.append([_timed(session, given), _timed(session, given)])
                rate = seconds[-1][1] / self._model.of(given)
            # By turns, as in a run: when the shape changes, memory is given back and taken again.
            began = perf_counter()
            for turn in range(_MOST_TURNS):
                now = perf_counter()
                if now - self._begin > _AIM or (turn >= _LEAST_TURNS and now - began > _ENOUGH):
                    break
                for batch, found in zip(taken, seconds, strict=True):
                    found.append(_timed(session, batch))
            taken += once
            seconds += [[_timed(session, batch), _timed(session, batch)] for batch in once]
        usual = [median(found[2:] or found[1:]) for found in seconds]
        firsts = (max(0.0, found[0] - each) for found, each in zip(seconds, usual, strict=True))
        return [(batch, _Times(*times)) for batch, times in zip(taken, zip(firsts, usual, strict=True), strict=True)]

    def _shortened(self, batch: Batch, rate: float) -> Batch | None:
        """The batch if there is time for it, or a row that there is time for."""
        left = (_AIM - (perf_counter() - self._begin)) / 2
        if _STEPS * rate * self._model.of(batch) <= left:
            return batch
        length = 2 * _FEW
        while (work := self._model.work(2 * length, 4 * length**2, 2 * length)) * rate * _STEPS <= left:
            length *= 2
            if work >= self._model.of(batch):
                break
        row = _row(self._bundle, length)
        return row if _STEPS * rate * self._model.of(row) <= left else None


def _timed(session: Session, batch: Batch) -> float:
    """Seconds of a step; without a backward pass of `_QUERIES` passes."""
    begin = perf_counter()
    if isinstance(session, ForwardOnlySession):
        # A first step moves every matrix alone.
        session.gradient([batch])
    else:
        session.step([batch], _RATE)
    return perf_counter() - begin


def _depth(usual: _Times, others: Sequence[_Times], growth: float, layers: int, left: float) -> int:
    """How many layers there is time for, two at least.

    Args:
        usual: Times of the batch that is timed again and again, by one layer.
        others: Those of the others.
        growth: What another layer adds to a step, relative to a step of one.
        layers: Of the model.
        left: Seconds.
    """
    once = _STEPS * usual.step + sum(_STEPS_ONCE * timing.step for timing in others)
    first = usual.first + sum(timing.first for timing in others)
    return max(2, min(layers, 1 + int((left - first - once) / max(growth * once, 1e-3))))


def _cut(bundle: Bundle, choice: Choice, layers: int) -> tuple[Bundle, Choice]:
    """The bundle as if it had only so many layers above the trunk, and a layered plan in proportion."""
    if not isinstance(choice.plan, LayeredPlan):
        return bundle, choice
    manifest, trunk = bundle.manifest, choice.plan.trunk_layers
    share = layers / (manifest.architecture.num_hidden_layers - trunk)
    cut = replace(
        manifest,
        architecture=replace(manifest.architecture, num_hidden_layers=trunk + layers),
        lora=manifest.lora.of_layers(range(trunk, trunk + layers)),
    )
    end = trunk + layers
    backward = manifest.architecture.num_hidden_layers - choice.plan.first_trained
    plan = replace(
        choice.plan,
        layers=None if choice.plan.layers is None else range(end - max(1, round(share * backward)), end),
        kept_layers=round(share * choice.plan.kept_layers),
        exact_layers=round(share * choice.plan.exact_layers),
        # The same batch comes again and again: every pass would be one of a later epoch.
        states=None,
    )
    return Bundle(bundle.path, cut), replace(choice, plan=plan)


def _cost_model(bundle: Bundle, choice: Choice) -> CostModel:
    return CostModel(bundle.manifest, choice.plan, choice.footprint)


def _row(bundle: Bundle, length: int) -> Batch:
    """One row of so many tokens, all trained."""
    manifest = bundle.manifest
    ids = [number % manifest.architecture.vocab_size for number in range(length)]
    window = manifest.architecture.sliding_window
    return make_batch(
        [Example(1, ids, ids)], manifest.architecture.rope, manifest.tokenizer.pad_token_id, sliding_window=window
    )
