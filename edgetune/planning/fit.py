"""The shapes, the plan and the passes of a run, held to a device; or what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from edgetune.data.encode import Example
from edgetune.data.stored_examples import ShortenedExamples, longest
from edgetune.errors import IncompatibleError, ResourceError, UsageError
from edgetune.formats.bundle import Bundle
from edgetune.formats.manifest import BundleManifest
from edgetune.formats.trunk import read_trunk_info
from edgetune.planning.choice import Choice, TooLargeError, choose
from edgetune.planning.cost import CostModel
from edgetune.planning.limits import in_fixed_shapes, require_form, require_rows_fit
from edgetune.planning.memory import Work
from edgetune.planning.run import RunRequest
from edgetune.planning.workload import Workload
from edgetune.runtimes.execution import KeptStates, LayeredPlan, TrunkUse
from edgetune.runtimes.layered.cached_states import record_bytes
from edgetune.text.byte_size import bytes_text


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
        request: What the run asks for.
    """

    def __init__(self, bundle: Bundle, rows: Sequence[Example], valid: Sequence[Example], request: RunRequest) -> None:
        self._bundle, self._rows, self._valid, self._request = bundle, rows, valid, request

    def fit(self) -> Fit:
        """The run as it fits: on the fastest runtime that fits, with the least work.

        In several passes a batch takes less memory than in one, and weights are read more often; activations that are
        computed again have their price, too. The plan and the number of passes are chosen together.

        Raises:
            IncompatibleError: The device does not run what was asked for, or the bundle lacks it.
            MissingDependencyError: The runtime's package is not installed.
            ResourceError: Nothing fits; the message says what would.
            UsageError: Warm-up takes the whole run, or a row fits into none of the shapes that were asked for.
        """
        try:
            fit = self._fastest()
        except ResourceError as error:
            # Of memory or of the length of rows: for both, shorter rows are what would fit.
            raise ResourceError(f"{error}\nwhat would fit: {self._advice()}") from error
        try:
            notes = require_form(self._request, fit.choice)
        except IncompatibleError as error:
            raise IncompatibleError("\n".join([*fit.notes, str(error)])) from error
        return replace(fit, notes=(*fit.notes, *notes))

    def _fastest(self) -> Fit:
        """As `fit`, wherever the device's profile says that it runs, and without advice where nothing fits."""
        asked = self._request.optimizer_states
        if asked != "auto":
            return self._fastest_with(eight_bit_states=asked == "8bit")
        exact = self._attempt(eight_bit_states=False)
        if isinstance(exact, Fit) and exact.choice.fits:
            return exact
        # A small adapter saves less than what is needed to change it.
        coded = self._attempt(eight_bit_states=True)
        smaller = min(exact, coded, key=_peak)
        if isinstance(smaller, TooLargeError):
            raise smaller
        if smaller is exact:
            return smaller
        note = (
            f"the optimizer's states are kept in 8 bits: in 32 the smallest plan needs {bytes_text(_peak(exact))}, and "
            "there is less memory"
        )
        return replace(smaller, notes=(*smaller.notes, note))

    def _attempt(self, *, eight_bit_states: bool) -> Fit | TooLargeError:
        """The fastest run that fits, or why none does."""
        try:
            return self._fastest_with(eight_bit_states=eight_bit_states)
        except TooLargeError as error:
            return error

    def _fastest_with(self, *, eight_bit_states: bool) -> Fit:
        """The same, with optimizer states in 8 bits or in 32."""
        request = self._request
        workload = Workload(self._bundle.manifest, self._rows, self._valid, request)
        require_rows_fit(request, workload.longest())
        trunk = trunk_use(self._bundle, request, workload.longest())
        layers = trained_layers(self._bundle.manifest, request, 0 if trunk is None else trunk.layers)
        given = LayeredPlan(trunk=trunk, layers=layers, eight_bit_states=eight_bit_states)
        given = replace(given, states=kept_states(self._bundle.manifest, request, workload, given.first_trained))
        found: dict[Work, Fit] = {}
        refused: list[TooLargeError] = []
        for rows in self._pass_rows():
            divided = in_fixed_shapes(workload.in_passes(rows), request)
            work = divided.work()
            if work in found:
                continue
            try:
                choice = choose(self._bundle.manifest, request, work, given)
            except TooLargeError as error:
                refused.append(error)
                continue
            found[work] = Fit(divided, choice, choice.notes)
            if choice.unconstrained:
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
        model = CostModel(self._bundle.manifest, choice.plan, choice.footprint)
        return False, choice.speed_order, model.of_passes(each for step in steps for each in step)

    def _pass_rows(self) -> Iterator[int]:
        """For how many rows a pass may have room: a batch, or what the device takes of it, half of that, and so on."""
        limit, rows = self._request.place.largest_batch(), self._request.batching.batch_size
        rows = rows if limit is None else min(rows, limit)
        yield rows
        rows = min(rows, max(len(self._rows), len(self._valid)))
        while rows > 1:
            rows = -(-rows // 2)
            yield rows

    def _advice(self) -> str:
        """The longest rows that fit."""
        fits, too_long = 0, max(longest(self._rows), longest(self._valid))
        found = None
        while too_long - fits > 1:
            length = (fits + too_long) // 2
            try:
                found, fits = self._choose_length(length), length
            except ResourceError:
                too_long = length
        if found is None:
            return "nothing of this bundle; use a smaller model, or a device with more memory"
        peak = found.predicted_peak_bytes
        memory = "" if peak is None else f", about {bytes_text(peak)}"
        return f"rows of at most {fits:,} tokens ({found.plan}{memory})"

    def _choose_length(self, length: int) -> Choice:
        """With rows that are cut to that length."""
        cut, valid = ShortenedExamples(self._rows, length), ShortenedExamples(self._valid, length)
        return Fitting(self._bundle, cut, valid, self._request)._fastest().choice


def _peak(attempt: Fit | TooLargeError) -> int:
    """Bytes of what fits, or of the smallest that does not."""
    return attempt.peak if isinstance(attempt, TooLargeError) else attempt.choice.predicted_peak_bytes or 0


def trained_layers(manifest: BundleManifest, request: RunRequest, below: int) -> tuple[int, ...] | None:
    """The decoder layers that a run trains; none where it trains all that it can.

    Args:
        manifest: The bundle's.
        request: What the run asks for.
        below: Layers of the trunk.

    Raises:
        UsageError: There are no such layers, or the trunk computes some of them.
    """
    asked, count = request.layers, manifest.architecture.num_hidden_layers
    if asked is None:
        return None
    spans = [span.of(count) for span in asked.spans]
    if any(not span or span.stop > count for span in spans):
        raise UsageError(f"--layers {asked}: the bundle has layers 0 to {count - 1}; give some of these")
    layers = sorted(set(chain.from_iterable(spans)))
    if layers[0] < below:
        raise UsageError(
            f"--layers {asked}: the trunk computes layers 0 to {below - 1}, which have no adapter then; give some of "
            f"{below} to {count - 1}, or train without --trunk"
        )
    return None if layers == list(range(below, count)) else tuple(layers)


def trunk_use(bundle: Bundle, request: RunRequest, most_tokens: int) -> TrunkUse | None:
    """What the bundle's trunk does in a run; none where all layers are trained.

    Args:
        bundle: It was split, if the request has a trunk.
        request: What the run asks for.
        most_tokens: Of the longest row that will come.

    Raises:
        IncompatibleError: The bundle has no trunk, or a row does not fit it.
        VerificationError: The trunk's description is broken.
    """
    if request.trunk is None:
        return None
    info = read_trunk_info(bundle)
    if most_tokens > info.length:
        raise IncompatibleError(
            f"the longest row has {most_tokens} tokens, the bundle's trunk takes {info.length}; split the bundle again "
            f"with --length {most_tokens} or more, or leave longer rows out"
        )
    return TrunkUse(info.layers, request.trunk.vitisai_config)


def kept_states(
    manifest: BundleManifest, request: RunRequest, workload: Workload, first_trained: int
) -> KeptStates | None:
    """What a run keeps of what enters its lowest trained layer; none where there is nothing below it.

    Of rows that come once nothing is kept.

    Args:
        manifest: The bundle's.
        request: What the run asks for.
        workload: Its rows, and how often they come.
        first_trained: The lowest layer that is trained.
    """
    if not first_trained:
        return None
    lengths, counts = np.unique(workload.lengths_again(), return_counts=True)
    sizes = [record_bytes(int(length), manifest.architecture.hidden_size) for length in lengths]
    total = sum(int(count) * size for count, size in zip(counts, sizes, strict=True))
    most = min(request.lower_layers_cache_bytes, total)
    return KeptStates(most if most >= min(sizes, default=1) else 0, total, workload.different_rows())
