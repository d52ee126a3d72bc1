"""Learning rates against transformers' schedulers, and the count of steps."""

from __future__ import annotations

import pytest

from edgetune.config import Schedule, TrainConfig
from edgetune.errors import UsageError
from edgetune.planning.schedule import learning_rate, schedule_steps
from support.run_requests import request_of

NAMES: dict[Schedule, str] = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (1, 8), (5, 20), (19, 20)])
def test_rates_are_those_of_transformers(schedule: Schedule, warmup: int, total: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(NAMES[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert learning_rate(schedule, 3e-4, step, total, warmup) == pytest.approx(
            scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18
        )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("rows", "config", "batches", "epoch", "total"),
    [
        (10, TrainConfig(batch_size=4, epochs=3), 3, 3, 9),
        (10, TrainConfig(batch_size=4, gradient_accumulation_steps=2, epochs=3), 3, 2, 6),
        (10, TrainConfig(batch_size=4, gradient_accumulation_steps=2, epochs=0.5), 3, 2, 1),
        (10, TrainConfig(batch_size=2, epochs=1.1), 5, 5, 6),
        (1, TrainConfig(batch_size=8, gradient_accumulation_steps=8, steps=5), 1, 1, 5),
    ],
)
def test_steps_of_a_run(rows: int, config: TrainConfig, batches: int, epoch: int, total: int) -> None:
    schedule = schedule_steps(rows, request_of(config))
    assert (schedule.batches_per_epoch, schedule.steps_per_epoch, schedule.total_steps) == (batches, epoch, total)
    assert sum(schedule.batches(step) for step in range(epoch)) == batches


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(1, 4), (140, 4), (264, 4), (268, 3), (396, 3), (400, 2), (796, 2), (800, 1), (100_000, 1)],
)
def test_few_rows_are_gone_through_more_often_by_themselves(rows: int, epochs: int) -> None:
    found, asked = (
        schedule_steps(rows, request_of(config)) for config in (TrainConfig(), TrainConfig(epochs=epochs))
    )
    assert found == asked


@pytest.mark.parametrize(
    ("written", "epoch", "total"),
    [
        ("0.07", 100, 7),
        ("0.29", 100, 29),
        ("1.1", 10, 11),
        ("2.3", 10, 23),
        ("0.14", 50, 7),
        ("0.071", 100, 8),
        ("1e-9", 100, 1),
        ("0.1", 10**9, 10**8),
    ],
)
def test_part_of_an_epoch_has_the_steps_of_the_number_that_was_written(written: str, epoch: int, total: int) -> None:
    assert schedule_steps(epoch, request_of(TrainConfig(batch_size=1, epochs=float(written)))).total_steps == total


def test_every_hundredth_of_an_epoch_of_a_hundred_steps_is_a_step() -> None:
    hundredths = range(1, 1001)
    asked = [request_of(TrainConfig(batch_size=1, epochs=float(f"{n / 100:.2f}"))) for n in hundredths]
    found = [schedule_steps(100, request) for request in asked]
    assert [schedule.total_steps for schedule in found] == list(hundredths)


def test_validation_is_due_at_the_end_and_after_each_of_several_epochs() -> None:
    def due(config: TrainConfig) -> list[int]:
        schedule = schedule_steps(6, request_of(config))
        due = [step for step in range(1, schedule.total_steps + 1) if schedule.validates_after(step)]
        assert schedule.validations() == 1 + len(due)
        return due

    assert due(TrainConfig(batch_size=2, epochs=3)) == [3, 6, 9]
    assert due(TrainConfig(batch_size=2, epochs=2.5)) == [3, 6, 8]
    assert due(TrainConfig(batch_size=2, epochs=1.5)) == [5]
    assert due(TrainConfig(batch_size=2, steps=2)) == [2]


def test_warmup_must_end() -> None:
    assert schedule_steps(4, request_of(TrainConfig(steps=5, warmup_steps=4))).total_steps == 5
    with pytest.raises(UsageError, match="warmup_steps is 5, but the run has 5 steps"):
        schedule_steps(4, request_of(TrainConfig(steps=5, warmup_steps=5)))
