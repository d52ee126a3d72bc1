"""A model answers the prompts of some rows, and its answers are measured: the task itself, not the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from edgetune.config import DEFAULT_METRICS, AnswersConfig, MetricName, SearchConfig, check_config
from edgetune.data.encode import Encoder, Example, load_encoder
from edgetune.data.problems import Problems
from edgetune.data.rows import ChatRow, CompletionRow, Message, Row, TextRow, read_rows
from edgetune.data.source import Source, kept, name_of
from edgetune.errors import DataError, IncompatibleError, UsageError
from edgetune.evaluation.answered_rows import read_answered_rows, write_answered_rows
from edgetune.evaluation.comparison import Difference, compare
from edgetune.evaluation.measurement import AnsweredRow, Measurement
from edgetune.evaluation.metrics import METRICS, problem_of, require_packages
from edgetune.formats.bundle import Bundle
from edgetune.formats.genai import Answering, GenaiModel, open_model
from edgetune.formats.manifest import RowEncoding
from edgetune.formats.storage import refuse_existing
from edgetune.generation.loaded import LoadedModel
from edgetune.generation.measure import Measured
from edgetune.machine.threads import computing_with, thread_count
from edgetune.text.pulse import Pulse, silent


@dataclass(frozen=True)
class AnswersEvaluation:
    """How good a model's answers to some rows are."""

    rows: int
    """Rows that were asked."""
    left_out: int
    """Rows that leave the model's context no place for an answer."""
    scores: dict[MetricName, float]
    """What each metric says of all rows."""
    differences: dict[MetricName, Difference] = field(default_factory=dict)
    """How they differ from the other model's; empty where none is compared."""


def evaluate_answers(
    model: Bundle | str | PathLike[str],
    data: str | PathLike[str],
    config: AnswersConfig = AnswersConfig(),
    *,
    adapter: str | None = None,
    say: Callable[[str], None] = silent,
) -> AnswersEvaluation:
    """Let a model answer the prompt of each row, and measure its answers against the rows' own.

    Of a conversation the last answer is the reference, and all before it the prompt.

    Args:
        model: A folder that `export` wrote, or a bundle, which answers as the base.
        data: JSONL rows with prompts; `-` is standard input.
        config: How to answer, what to measure, what to write, and what to compare with.
        adapter: Name of the adapter that answers, of several in the folder; `base` for none of them.
        say: Called with one line of text from time to time.

    Returns:
        The scores, and how they differ from another model's where there is one.

    Raises:
        UsageError: A value of the configuration that cannot be meant, a path or adapter that is not there, or a file in
            the place of `rows_output`.
        DataError: Rows that cannot be asked or measured, or another model's that are not the same ones.
        IncompatibleError: A format or version that this edgetune does not read, or a broken template.
        VerificationError: A file of the model was changed.
        MissingDependencyError: What a metric needs is not installed.
        EdgetuneError: ONNX Runtime GenAI failed.
    """
    check_config(config)
    names = config.metric or DEFAULT_METRICS
    require_packages(names)
    if config.rows_output is not None:
        refuse_existing(config.rows_output)
    with computing_with(config.threads), kept(Path(data)) as source:
        asked = _Asked(open_model(model), adapter, config)
        rows, left_out = asked.read(source, names)
        others = None
        if config.compare is not None and config.compare.is_file():
            # Before the model is asked, which takes longer.
            others = _same_rows(rows, read_answered_rows(config.compare), config.compare)
            _require_what_is_measured(others, names, config.compare)
        elif config.compare is not None:
            opened = _Asked(open_model(config.compare), None, config)
            read, _ = opened.read(source, names)
            _same_rows(rows, read, config.compare)
            others = _same_rows(rows, opened.answer(read, names, say), config.compare)
        rows = asked.answer(rows, names, say)
    measured = {name: METRICS[name].measure(rows) for name in names}
    if config.rows_output is not None:
        write_answered_rows(config.rows_output, _with_scores(rows, measured))
    differences = {} if others is None else _differences(measured, others)
    scores = {name: measurement.score for name, measurement in measured.items()}
    return AnswersEvaluation(len(rows), left_out, scores, differences)


class _Asked:
    """A model, and how rows ask it.

    Args:
        model: The verified folder.
        adapter: Name of the one that answers.
        config: How rows are encoded, and answers found.
    """

    def __init__(self, model: GenaiModel, adapter: str | None, config: AnswersConfig) -> None:
        self._model = model
        self._answering: Answering = model.answering(adapter)
        encoding = RowEncoding(raw_prompts=config.raw_prompts, content_as_text=config.content_as_text)
        self._encoder = load_encoder(model.path, model.manifest.tokenizer, self._answering.encoding | encoding)
        self._search: SearchConfig = config
        self._encoded: dict[int, tuple[list[int], Example]] = {}

    def read(self, source: Source, names: Sequence[MetricName]) -> tuple[list[AnsweredRow], int]:
        """The rows that can be asked, and how many leave no place for an answer.

        Raises:
            DataError: Naming every row that cannot be asked or measured, or saying that all are too long.
        """
        problems = Problems(source)
        rows, left_out = [], 0
        for row in read_rows(source, problems):
            try:
                asked = _asked(row)
                input_ids, example = _encoded(self._encoder, asked, row)
            except DataError as error:
                for reason in error.problems:
                    problems.add(row.line, reason)
                continue
            except IncompatibleError as error:
                raise IncompatibleError(f"{name_of(source)}:{row.line}: {error}") from error
            if problem := problem_of(asked.reference, names):
                problems.add(row.line, problem)
            elif max(len(input_ids) + 1, len(example.input_ids)) > self._model.context_length:
                left_out += 1
            else:
                self._encoded[row.line] = input_ids, example
                rows.append(asked)
        problems.raise_if_any()
        if not rows:
            most = self._model.context_length
            raise DataError([f"{name_of(source)}: all {left_out:,} rows are longer than the model's {most:,} tokens"])
        return rows, left_out

    def answer(
        self, rows: Sequence[AnsweredRow], names: Sequence[MetricName], say: Callable[[str], None]
    ) -> list[AnsweredRow]:
        """The same rows with the model's answers and losses, as far as metrics need them."""
        needed = {METRICS[name].needs for name in names}
        answered = list(rows)
        if "answers" in needed:
            answered = self._with_answers(answered, Pulse(say, f"answered {{}} of {len(rows):,} rows"))
        if "losses" in needed:
            answered = self._with_losses(answered, Pulse(say, f"measured {{}} of {len(rows):,} rows"))
        return answered

    def _with_answers(self, rows: Sequence[AnsweredRow], pulse: Pulse) -> list[AnsweredRow]:
        loaded = LoadedModel(self._model, thread_count())
        answered = []
        for row in rows:
            ids = list(loaded.stream(self._encoded[row.line][0], self._search, self._answering))
            answered.append(replace(row, answer=self._encoder.decode(ids)))
            pulse.add(1)
        return answered

    def _with_losses(self, rows: Sequence[AnsweredRow], pulse: Pulse) -> list[AnsweredRow]:
        graph = Measured(self._model.path, None)
        measured = []
        for row in rows:
            example = self._encoded[row.line][1]
            loss = graph.answer_loss([example], pulse, adapter=self._answering.adapter)
            measured.append(replace(row, loss=loss, tokens=example.trained_tokens))
        return measured


def _asked(row: Row) -> AnsweredRow:
    """The prompt and the reference of a row.

    Raises:
        DataError: It has none.
    """
    match row:
        case ChatRow(line, messages):
            last = max(index for index, message in enumerate(messages) if message.role == "assistant")
            if last == 0:
                raise DataError(["nothing stands before the answer, so there is nothing to ask"])
            return AnsweredRow(line, messages[:last], messages[last].content)
        case CompletionRow(line, prompt, completion):
            return AnsweredRow(line, prompt, completion)
        case TextRow():
            raise DataError(['is a text row, which asks nothing; expected "messages", or "prompt" and "completion"'])


def _encoded(encoder: Encoder, asked: AnsweredRow, row: Row) -> tuple[list[int], Example]:
    """Token ids of the prompt, and the whole row as `edgetune eval` measures it."""
    example = encoder.encode(row)
    if isinstance(asked.prompt, tuple):
        return encoder.encode_prompt(asked.prompt), example
    if encoder.asks_raw:
        return encoder.encode_raw_prompt(asked.prompt), example
    return encoder.encode_prompt([Message("user", asked.prompt)]), example


def _same_rows(rows: Sequence[AnsweredRow], others: Sequence[AnsweredRow], place: Path) -> list[AnsweredRow]:
    """Another model's rows in the order of these.

    Raises:
        DataError: It has not answered the same ones.
    """
    left: defaultdict[tuple[object, str], list[AnsweredRow]] = defaultdict(list)
    for row in others:
        left[row.prompt, row.reference].append(row)
    found = [left[row.prompt, row.reference].pop(0) for row in rows if left[row.prompt, row.reference]]
    if len(found) < len(rows) or len(others) > len(rows):
        raise DataError(
            [
                f"{place}: has {len(others):,} rows, of which {len(found):,} are among the {len(rows):,} of --data; "
                "models are compared on the same rows"
            ]
        )
    return found


def _require_what_is_measured(rows: Sequence[AnsweredRow], names: Sequence[MetricName], place: Path) -> None:
    """Refuse a file whose rows lack what a metric looks at.

    Raises:
        UsageError: That is so.
    """
    for name in names:
        needs = METRICS[name].needs
        if any((row.answer if needs == "answers" else row.loss) is None for row in rows):
            raise UsageError(f"{place} has no {needs}, which {name} needs; write it again with --metric {name}")


def _differences(
    measured: dict[MetricName, Measurement], others: Sequence[AnsweredRow]
) -> dict[MetricName, Difference]:
    differences = {}
    for name, ours in measured.items():
        metric = METRICS[name]
        theirs = metric.measure(others)
        differences[name] = compare(
            ours, theirs, higher_is_better=metric.higher_is_better, rows_add_up=metric.rows_add_up
        )
    return differences


def _with_scores(rows: Sequence[AnsweredRow], measured: dict[MetricName, Measurement]) -> list[AnsweredRow]:
    return [
        replace(row, scores={name: float(measurement.rows[index]) for name, measurement in measured.items()})
        for index, row in enumerate(rows)
    ]
