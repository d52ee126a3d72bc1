"""The page of a report: curves, settings and answers of runs side by side, as one HTML file that fetches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from jinja2 import Environment, StrictUndefined

import edgetune
from edgetune.errors import ResourceError
from edgetune.reporting.answers import LONGEST_TEXT, MOST_ANSWERS, Answers
from edgetune.reporting.history import MOST_POINTS
from edgetune.reporting.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, Plot, plot
from edgetune.reporting.runs import Run
from edgetune.text.byte_size import bytes_text
from edgetune.text.printable import printable

MOST_BYTES = 1_000_000
"""Of a page."""
MARK = b"<!-- edgetune report -->"
"""Within the first bytes of every page, so that a page is replaced by the next, and no other file is."""
_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_LONGEST_SETTING = 400
"""Characters of a setting that are shown."""
_MOST_SETTINGS = 200
"""Settings of a kind that are shown: an adapter may say any number."""
_FEWEST_POINTS = 16
"""Of a curve: where a page with so few is too large, it is not for its curves."""


@dataclass(frozen=True)
class Setting:
    """A line of the table of settings: what each run has."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether the runs do not have the same."""
        return len(set(self.values)) > 1


@dataclass(frozen=True)
class Settings:
    """Settings of one kind."""

    title: str
    lines: list[Setting]


def page_of(runs: Sequence[Run], answers: Sequence[Answers] = ()) -> bytes:
    """The page, in UTF-8.

    Args:
        runs: One or several, whose curves lie over each other.
        answers: The same prompts before and after.

    Raises:
        ResourceError: It would be larger than `MOST_BYTES`, however few points its curves have.
    """
    names = _names(runs)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = _shown
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    render = partial(
        template.render,
        mark=MARK.decode(),
        version=edgetune.__version__,
        title=_shown(f"Training of {', '.join(names)}"),
        names=names,
        stopped=[(name, run.stopped) for name, run in zip(names, runs, strict=True) if run.stopped],
        settings=[*_settings(runs)],
        answers=answers[:MOST_ANSWERS],
        answers_left_out=max(0, len(answers) - MOST_ANSWERS),
        longest=LONGEST_TEXT,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )
    points, page = MOST_POINTS, b""
    while points >= _FEWEST_POINTS:
        page = render(plots=[*_plots(runs, names, points)]).encode("utf-8", "backslashreplace")
        if len(page) <= MOST_BYTES:
            return page
        points //= 2
    raise ResourceError(
        f"the report would take {len(page):,} bytes, and {MOST_BYTES:,} are the most; give fewer adapters or answers"
    )


def summary_of(run: Run) -> dict[str, str]:
    """What a run came to, in words, by what it is; what it does not tell is left out."""
    history = run.history
    first, last = history.validation.first, history.validation.last
    has_first = bool(history.validation.points) and history.validation.points[0].x == 0
    told = {
        "ended": run.stopped or "as planned",
        "finished": date_words(run.finished),
        "steps": f"{history.steps:,}",
        "time": duration_words(history.seconds),
        "tokens": f"{history.tokens:,}",
        "speed": _said(history.tokens_per_second, "{:,.0f} tokens/s"),
        "loss of the first step": _said(_first(run, "loss"), "{:.4f}"),
        "loss of the last step": _said(history.last("loss"), "{:.4f}"),
        "validation loss before": _said(first, "{:.4f}") if has_first else "",
        "validation loss after": _said(last, "{:.4f}") if history.best else "",
        "lowest validation loss": f"{history.best[1]:.4f} after step {history.best[0]:,}" if history.best else "",
        "peak memory": bytes_words(history.last("peak_memory_bytes")),
    }
    return {name: value for name, value in told.items() if value}


def date_words(date: datetime | None) -> str:
    """A day and a time, in UTC; nothing where it is not known."""
    return "" if date is None else f"{date:%Y-%m-%d %H:%M} UTC"


def duration_words(seconds: float) -> str:
    """`h:mm:ss`; with tenths where it is less than a minute, `?` for what is no time."""
    if not 0 <= seconds < timedelta.max.total_seconds():
        return "?"
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def bytes_words(count: float | None) -> str:
    """A size for people; nothing where it is not known."""
    return "" if count is None else bytes_text(round(count))


def _first(run: Run, key: str) -> float | None:
    curve = run.history.curves.get(key)
    return None if curve is None else curve.first


def _said(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _names(runs: Sequence[Run]) -> list[str]:
    """A name for each run: the last part of its path, and all of the path where two have the same."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(run.name) > 1 else run.name for run in runs]


def _settings(runs: Sequence[Run]) -> Iterator[Settings]:
    kinds: dict[str, Callable[[Run], Mapping[str, str]]] = {
        "What came of it": summary_of,
        "What executed it": lambda run: run.executed,
        "What was trained": lambda run: run.adapter,
        "Options": lambda run: {name.replace("_", "-"): value for name, value in run.options.items()},
        "SHA-256": lambda run: run.hashes,
    }
    for title, take in kinds.items():
        facts = [take(run) for run in runs]
        known = list(dict.fromkeys(name for each in facts for name in each))[:_MOST_SETTINGS]
        if known:
            yield Settings(title, [Setting(name, [each.get(name, "") for each in facts]) for name in known])


def _plots(runs: Sequence[Run], names: Sequence[str], points: int) -> Iterator[Plot]:
    def lines(key: str, *, what: str = "", is_dashed: bool = False) -> Iterator[Line]:
        for colour, (run, name) in enumerate(zip(runs, names, strict=True)):
            if (curve := run.history.curves.get(key)) is not None:
                yield Line(_shown(f"{name}{what}"), colour, curve, is_dashed)

    number = "{:,.4g}".format
    named = [*enumerate(zip(runs, names, strict=True))]
    valid = [
        Line(_shown(f"{name}, validation"), colour, run.history.validation, is_dashed=True, is_marked=True)
        for colour, (run, name) in named
    ]
    by_time = [Line(_shown(name), colour, run.history.by_time) for colour, (run, name) in named]
    memory = [*lines("memory_bytes", what=", now"), *lines("peak_memory_bytes", what=", peak", is_dashed=True)]
    for title, x_label, y_label, of, words in (
        ("Loss", "step", "nats a trained token", [*lines("loss", what=", training"), *valid], number),
        ("Training loss by time", "seconds", "nats a trained token", by_time, number),
        ("Learning rate", "step", "of each step", [*lines("learning_rate")], number),
        ("Gradient norm", "step", "2-norm before clipping", [*lines("grad_norm")], number),
        ("Memory", "step", "resident", memory, bytes_words),
        ("Speed", "step", "tokens a second", [*lines("tokens_per_second")], "{:,.0f}".format),
    ):
        if (drawn := plot(title, x_label, y_label, of, words, most_points=points)) is not None:
            yield drawn


def _shown(text: str, longest: int = _LONGEST_SETTING) -> str:
    """Text of an adapter as a page shows it: cut, and with what turns directions or steers made visible."""
    return printable(text if len(text) <= longest else f"{text[:longest]}…")
