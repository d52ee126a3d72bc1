"""What enters the lowest trained layer is computed once a row, and gives the losses that it gave."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.data.batcher import Batcher
from edgetune.data.batches import Batch, epoch_batches
from edgetune.data.stored_examples import longest
from edgetune.formats.bundle import Bundle
from edgetune.runtimes import find_runtime
from edgetune.runtimes.execution import KeptStates, LayeredPlan
from edgetune.runtimes.forward_only import ForwardOnlySession, QueryConfig
from edgetune.runtimes.layered import cached_states
from edgetune.runtimes.layered.cached_states import FILE, LowerStates, record_bytes
from edgetune.runtimes.layered.sublayer import SublayerRunner
from support.prepared_bundles import Prepared
from support.random_rows import prompted_rows
from support.tiny_step import OPTIMIZER, adapter_of, batch_of

WIDTH, RATE = 128, 1e-3
LENGTHS = [9, 30, 14, 21, 40, 6, 17, 33]
EVEN = [24] * len(LENGTHS)
"""Of one shape, where graphs are compiled for each."""
MOST = 1 << 20
STATES = KeptStates(MOST, MOST, rows=len(LENGTHS))
NOTHING_KEPT = replace(STATES, most_bytes=0)
UPPER = LayeredPlan(kept_layers=1, layers=range(1, 2))
EXACT = {
    "keep": UPPER,
    "recompute": replace(UPPER, kept_layers=0),
    "stream": replace(UPPER, kept_layers=0, resident=False),
    "lean": replace(UPPER, kept_layers=0, lean=True),
}
COARSE = [
    ("onnxruntime", replace(UPPER, precision="int8", exact_layers=1)),
    ("openvino", UPPER),
    ("openvino", replace(UPPER, precision="int8")),
]


def parameters_of(bundle: Bundle) -> dict[str, Any]:
    """Of the upper layer alone."""
    return {name: value for name, value in adapter_of(bundle).items() if name.startswith("model.layers.1.")}


def steps_of(bundle: Bundle, lengths: list[int], epochs: int, *, pass_rows: int = 4) -> Iterator[list[Batch]]:
    """Steps of two times two rows, packed, in another order every epoch."""
    rows = prompted_rows(lengths)
    batcher = Batcher(bundle.manifest, longest(rows), pass_rows, packing=True)
    drawn = epoch_batches(rows, 2, seed=3, shuffle=True)
    for _ in range(epochs * len(rows) // 4):
        yield batcher.step([next(drawn), next(drawn)])


@contextmanager
def opened(runtime: str, bundle: Bundle, plan: LayeredPlan) -> Iterator[Any]:
    with find_runtime(runtime).open_session(bundle, parameters_of(bundle), OPTIMIZER, plan) as session:
        yield session


def losses(
    runtime: str, bundle: Bundle, plan: LayeredPlan, lengths: list[int] = LENGTHS, *, pass_rows: int = 4
) -> list[float]:
    """Of the steps of three epochs, and of the first rows, which are measured after each."""
    found = []
    with opened(runtime, bundle, plan) as session:
        measured = next(steps_of(bundle, lengths, 1))[0]
        for batches in steps_of(bundle, lengths, 3, pass_rows=pass_rows):
            found += [session.step(batches, RATE).loss, session.evaluate(measured)]
    return found


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of the sublayers that run forward, as they run."""
    layers: list[int] = []
    plain = SublayerRunner.forward

    def counted(self: SublayerRunner, layer: int, *others: Any) -> None:
        layers.append(layer)
        plain(self, layer, *others)

    monkeypatch.setattr(SublayerRunner, "forward", counted)
    return layers


@pytest.fixture
def bundle(prepared: Prepared) -> Bundle:
    return prepared("multi-head", "int4")


@pytest.mark.own
@pytest.mark.parametrize("pass_rows", [4, 1], ids=["", "several passes"])
@pytest.mark.parametrize("plan", EXACT.values(), ids=EXACT)
def test_the_losses_are_those_without(bundle: Bundle, plan: LayeredPlan, pass_rows: int) -> None:
    expected = losses("onnxruntime", bundle, plan, pass_rows=pass_rows)
    found = losses("onnxruntime", bundle, replace(plan, states=STATES), pass_rows=pass_rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.own
@pytest.mark.parametrize(("runtime", "plan"), COARSE, ids=["ort int8", "bf16", "openvino int8"])
def test_coarse_products_round_what_is_kept_as_what_is_computed(
    bundle: Bundle, runtime: str, plan: LayeredPlan
) -> None:
    """What they round differs after 16 bits by less than they are off themselves."""
    found, computed, as_it_is = (
        losses(runtime, bundle, replace(plan, states=states), EVEN) for states in (STATES, NOTHING_KEPT, None)
    )
    exact = losses("onnxruntime", bundle, UPPER, EVEN)
    np.testing.assert_allclose(found, computed, rtol=1e-4)
    assert np.abs(np.subtract(found, as_it_is)).max() < np.abs(np.subtract(as_it_is, exact)).max()


def test_lower_layers_run_once_for_each_row(bundle: Bundle, layers_run: list[int]) -> None:
    with opened("onnxruntime", bundle, replace(UPPER, states=STATES)) as session:
        steps = steps_of(bundle, LENGTHS, 3)
        for batches in [next(steps), next(steps)]:
            session.step(batches, RATE)
        assert set(layers_run) == {0, 1}
        made = {layer for weights in session._weights for _, slice_ in weights._made for layer in "01"
                if slice_.parameter.startswith(f"model.layers.{layer}.")}  # fmt: skip
        assert made == {"1"}, "the weights of the lower layers are given back"
        layers_run.clear()
        for batches in steps:
            session.step(batches, RATE)
            session.evaluate(batches[0])
        assert set(layers_run) == {1}


@pytest.mark.own
def test_gains_and_pieces_change_nothing_below(with_dora: Prepared) -> None:
    bundle = with_dora("grouped-query", "int4")
    expected, found = (losses("onnxruntime", bundle, replace(UPPER, states=each)) for each in (None, STATES))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_estimated_gradients_run_lower_layers_once_a_batch(bundle: Bundle, layers_run: list[int]) -> None:
    plan = replace(UPPER, kept_layers=0, forward_only=True)
    queries, found = QueryConfig(queries=6, perturbation_size=1e-2, seed=0), []
    for states in (None, STATES):
        layers_run.clear()
        parameters, open_forward = parameters_of(bundle), find_runtime("onnxruntime").open_forward
        assert open_forward is not None
        with open_forward(bundle, parameters, replace(plan, states=states)) as forward:
            session = ForwardOnlySession(forward, parameters, OPTIMIZER, queries)
            found.append([session.step(batches, 1e-4).loss for batches in steps_of(bundle, LENGTHS, 2)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    assert layers_run.count(0) == 2 * 2, "two sublayers, two batches an epoch"


def states_of(use: KeptStates) -> LowerStates:
    return LowerStates(use, "made so", WIDTH)


class Layers:
    """Stands for the lower layers: numbers that tell a row's tokens, and of which the last is large."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def of(self, batch: Batch) -> Any:
        def compute(rows: Any) -> Any:
            self.rows += rows
            powers = np.exp2(np.arange(WIDTH) % 12).astype(np.float32)
            return (batch.input_ids[..., None] * powers + 0.3).astype(np.float32)

        return compute


def numbers(states: LowerStates, batch: Batch, layers: Layers) -> list[bytes]:
    """What enters the layer, row by row."""
    found = []
    for places, halves in states.take(batch, layers.of(batch)):
        assert len(places[0]) == len(halves.numbers)
        row = np.empty(halves.numbers.shape, np.float32)
        halves.take(row)
        found.append(row.tobytes())
    return found


@pytest.fixture
def use(tmp_path: Path) -> KeptStates:
    return replace(STATES, folder=tmp_path)


@pytest.fixture
def batch(bundle: Bundle) -> Batch:
    return batch_of(bundle, prompted_rows(LENGTHS[:4]))


@pytest.fixture
def written(use: KeptStates, batch: Batch, tmp_path: Path) -> list[bytes]:
    """What four rows gave that lie in the file now."""
    states = states_of(use)
    found = numbers(states, batch, Layers())
    states.close()
    size = sum(record_bytes(length, WIDTH) for length in LENGTHS[:4])
    assert (tmp_path / FILE).stat().st_size == 40 + size
    return found


def test_a_later_process_reads_what_was_written(use: KeptStates, batch: Batch, written: list[bytes]) -> None:
    layers = Layers()
    assert numbers(states_of(use), batch, layers) == written and layers.rows == []
    expected = layers.of(batch)(())
    for row, found in enumerate(written):
        exact = expected[batch.rows == row]
        error = np.abs(np.frombuffer(found, np.float32).reshape(exact.shape) - exact)
        assert (error <= np.abs(exact) * 2.0**-11).all()


def test_what_was_made_otherwise_is_not_read(use: KeptStates, batch: Batch, written: list[bytes]) -> None:
    layers = Layers()
    numbers(LowerStates(use, "made otherwise", WIDTH), batch, layers)
    assert layers.rows == [0, 1, 2, 3]


@pytest.mark.parametrize("cut", ["header", "head", "numbers", "behind"])
def test_an_unfinished_record_is_computed_again(
    use: KeptStates, batch: Batch, written: list[bytes], tmp_path: Path, cut: str
) -> None:
    path, last = tmp_path / FILE, record_bytes(LENGTHS[3], WIDTH)
    whole = path.read_bytes()
    left = {"header": 20, "head": len(whole) - last + 30, "numbers": len(whole) - 1, "behind": len(whole)}[cut]
    path.write_bytes(whole[:left] + (b"\0" * 500 if cut == "behind" else b""))
    layers = Layers()
    states = states_of(use)
    assert numbers(states, batch, layers) == written
    # The batch is computed as a whole, as it was at first.
    assert layers.rows == ([] if cut == "behind" else [0, 1, 2, 3])
    states.close()
    assert path.read_bytes() == whole


def test_every_bit_that_flips_is_found(use: KeptStates, batch: Batch, written: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / FILE
    whole = path.read_bytes()
    second = 40 + record_bytes(LENGTHS[0], WIDTH)
    for place in [3, 30, *range(second, second + 72, 5), second + 100, len(whole) - 1]:
        broken = bytearray(whole)
        broken[place] ^= 16
        path.write_bytes(broken)
        states, layers = states_of(use), Layers()
        assert numbers(states, batch, layers) == written
        assert layers.rows == [0, 1, 2, 3], f"byte {place}"
        assert numbers(states, batch, layers) == written and len(layers.rows) == 4, "it is there again"
        states.close()


def test_a_flip_while_the_run_goes_on_is_found(
    use: KeptStates, batch: Batch, written: list[bytes], tmp_path: Path
) -> None:
    states, layers = states_of(use), Layers()
    assert numbers(states, batch, layers) == written and layers.rows == []
    with (tmp_path / FILE).open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"x")
    assert numbers(states, batch, layers) == written and layers.rows == [0, 1, 2, 3]


def test_rows_that_came_first_stay(use: KeptStates, batch: Batch) -> None:
    half = replace(use, most_bytes=sum(record_bytes(length, WIDTH) for length in LENGTHS[:2]))
    states, layers = states_of(half), Layers()
    first = numbers(states, batch, layers)
    layers.rows.clear()
    assert numbers(states, batch, layers) == first
    assert layers.rows == [2, 3] and not states.complete and states.notices() == []


@pytest.mark.own
def test_with_room_for_half_of_the_rows_the_losses_are_the_same(bundle: Bundle, layers_run: list[int]) -> None:
    half = replace(STATES, most_bytes=sum(record_bytes(length, WIDTH) for length in LENGTHS) // 2)
    expected = losses("onnxruntime", bundle, replace(UPPER, states=STATES))
    layers_run.clear()
    found = losses("onnxruntime", bundle, replace(UPPER, states=half))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert layers_run.count(0) > 2 * 2


def test_rows_alike_are_kept_once(use: KeptStates, bundle: Bundle) -> None:
    (row,) = prompted_rows([12])
    states, layers = states_of(use), Layers()
    first, second = numbers(states, batch_of(bundle, [row, row]), layers)
    assert first == second and states._end == 40 + record_bytes(12, WIDTH)


def test_a_full_disk_is_said_once(
    use: KeptStates, batch: Batch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is there is read on."""
    states, layers = states_of(use), Layers()
    monkeypatch.setattr(cached_states, "free_bytes", lambda _: record_bytes(LENGTHS[0], WIDTH) + 1)
    first = numbers(states, batch, layers)
    (notice,) = states.notices()
    assert notice.startswith("what enters the lowest trained layer is kept of 1 rows and no more") and "left" in notice
    layers.rows.clear()
    assert numbers(states, batch, layers) == first and layers.rows == [1, 2, 3] and states.notices() == []


def test_a_disk_that_takes_no_more_is_said(use: KeptStates, batch: Batch, tmp_path: Path) -> None:
    """With a real limit of a file's size, in a child: the record that was begun is cut off."""
    limit = 40 + record_bytes(LENGTHS[0], WIDTH) + 100
    states, layers = states_of(use), Layers()
    with file_size_limit(limit):
        first = numbers(states, batch, layers)
    (notice,) = states.notices()
    assert os.strerror(errno.EFBIG) in notice
    assert (tmp_path / FILE).stat().st_size == 40 + record_bytes(LENGTHS[0], WIDTH)
    assert numbers(states, batch, layers) == first


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_that_cannot_be_written_keeps_nothing(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    states, layers = states_of(replace(STATES, folder=tmp_path / "file")), Layers()
    assert len(states.notices()) == 1
    assert numbers(states, batch, layers) == numbers(states, batch, layers) and len(layers.rows) == 8
