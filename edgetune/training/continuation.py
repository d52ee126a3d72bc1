"""Whether a run may go on where an earlier one stopped: what has to be the same, and what may have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from edgetune.config import TrainConfig
from edgetune.data.encode import Example
from edgetune.errors import IncompatibleError
from edgetune.machine.threads import threads_used
from edgetune.training.saved_run import RunIdentity, SavedState, digest_of
from edgetune.training.state import PlannedRun, RunState

_FREE = frozenset(
    {
        "device", "force", "init_adapter", "keep_state", "lower_layers_cache", "patience",
        "pause_above_temperature", "pause_below_battery", "pause_file", "resume", "save_steps", "steps",
        "epochs", "threads", "time_budget", "vitisai_config",
    }
)  # fmt: skip
"""Options that change no step that was done, or that are compared by what they lead to."""
_OF_RATE = frozenset({"learning_rate", "lora_plus_ratio", "max_grad_norm", "schedule", "warmup_steps", "weight_decay"})
"""Options that may change where a step was not finite: with the same ones it would not be again."""
_WHAT = {
    "bundle": "the bundle",
    "rows": "the training rows",
    "validation_rows": "the validation rows",
    "initial_adapter": "the adapter that it began with",
    "runtime": "the runtime",
    "plan": "the plan",
    "pass_rows": "the rows of a pass",
}
"""What messages call the fields of an identity that are compared."""
_NOTICED = {"runtime_version": "the runtime's version", "threads": "the number of threads"}
"""Fields that may differ, but then roundings do."""


def identity_of(run: PlannedRun, state: RunState, free_memory_bytes: int | None) -> RunIdentity:
    """What a run is.

    Args:
        run: The plan.
        state: Before the first step.
        free_memory_bytes: What was taken as free when it was planned.
    """
    execution, choice = run.execution, run.fit.choice
    return RunIdentity(
        bundle=run.bundle.manifest.manifest_sha256,
        rows=_digest(run.rows.train.examples),
        validation_rows=_digest(run.rows.valid) if run.rows.valid else "",
        options={name: value for name, value in asdict(run.recorded).items() if name not in _FREE},
        initial_adapter=digest_of(state.first.items()),
        runtime=execution.runtime,
        runtime_version=choice.runtime.version(),
        plan=execution.plan,
        pass_rows=execution.pass_rows,
        threads=threads_used(),
        free_memory_bytes=free_memory_bytes,
    )


def require_same(saved: SavedState, now: RunIdentity, total_steps: int, say: Callable[[str], None]) -> None:
    """Refuse to go on with another run.

    Args:
        saved: Where the earlier run was.
        now: What this one is.
        total_steps: How far it goes.
        say: Hears what differs without being refused.

    Raises:
        IncompatibleError: Naming all that differs.
    """
    done, before = saved.progress, saved.identity
    problems = [*_problems(before, now, rate_may_change=bool(done.stopped))]
    if total_steps < done.steps:
        problems.append(f"the run has done {done.steps} steps, and is now to end after {total_steps}")
    if problems:
        lines = "\n".join(problems)
        raise IncompatibleError(
            f"the run cannot go on, because of what changed since step {done.steps}:\n{lines}\n"
            "give the same again, or start over with --force"
        )
    for field, what in _NOTICED.items():
        was, is_now = getattr(before, field), getattr(now, field)
        if was != is_now:
            say(f"{what} was {was} and is {is_now}: the last digits of what is learnt may differ")
    if total_steps != saved.total_steps:
        say(f"the run goes to step {total_steps} instead of {saved.total_steps}, and its learning rate with it")


def _problems(before: RunIdentity, now: RunIdentity, *, rate_may_change: bool) -> Iterator[str]:
    for field, what in _WHAT.items():
        was, is_now = getattr(before, field), getattr(now, field)
        if was != is_now:
            yield f"{what}: {_shown(was)} then, {_shown(is_now)} now"
    free = _OF_RATE if rate_may_change else frozenset()
    for option in fields(TrainConfig):
        name = option.name
        if name in _FREE or name in free:
            continue
        # A state of before an option was there has its default.
        was, is_now = before.options.get(name, option.default), now.options.get(name, option.default)
        if was != is_now:
            yield f"--{name.replace('_', '-')}: {was} then, {is_now} now"


def _shown(value: Any) -> str:
    text = str(value) or "none"
    return f"{text[:16]}…" if len(text) == hashlib.sha256().digest_size * 2 else text


def _digest(examples: Iterable[Example]) -> str:
    """SHA-256 of what the model sees of the rows."""
    return digest_of(
        (name, np.asarray(numbers, "<i8"))
        for example in examples
        for name, numbers in (("input_ids", example.input_ids), ("labels", example.labels))
    )
