"""Measuring a bundle, with or without an adapter, on rows: with its own loss graph and stock ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from edgetune.config import EvaluateConfig, check_config
from edgetune.data.batcher import MEASURED_ROWS, Batcher
from edgetune.data.encode import IGNORED, Example, load_encoder
from edgetune.data.examples import load_examples
from edgetune.data.folder import rows_file
from edgetune.data.stored_examples import longest
from edgetune.errors import EdgetuneError
from edgetune.formats.adapter import read_adapter, row_encoding
from edgetune.formats.bundle import Bundle, as_bundle
from edgetune.formats.manifest import RowEncoding
from edgetune.formats.row_norms import read_row_norms
from edgetune.machine.threads import computing_with
from edgetune.model.lora import Parameters, initial_parameters
from edgetune.runtimes.onnx_session import open_graph
from edgetune.text.pulse import Pulse, silent


@dataclass(frozen=True)
class Evaluation:
    """How well the trained tokens of some rows are predicted."""

    rows: int
    """Rows that were measured."""
    left_out: int
    """Rows longer than the bundle's maximum; with `truncate`, those whose answers begin after it."""
    trained_tokens: int
    """Tokens that count: the assistant's answers, the completion, or the whole text."""
    loss: float
    """Mean cross entropy over them, in nats."""
    perplexity: float
    """exp(loss)."""
    token_accuracy: float
    """Share of them that are the most probable token at their place."""
    exact_match: float
    """Share of rows of which all are: greedy decoding gives exactly their answers."""


def evaluate(
    bundle: Bundle | str | PathLike[str],
    data: str | PathLike[str],
    config: EvaluateConfig = EvaluateConfig(),
    *,
    adapter: str | PathLike[str] | None = None,
    say: Callable[[str], None] = silent,
) -> Evaluation:
    """Measure how well a bundle, with or without an adapter, gives the answers of a file.

    Args:
        bundle: What `prepare` made: its path, or what `load_bundle` gave.
        data: JSONL rows; `-` is standard input. Of a folder, its `test.jsonl`, or else its `valid.jsonl`.
        config: How to measure. Rows are encoded as the adapter's contract says as well.
        adapter: The adapter that shall answer; without it the base alone.
        say: Called with one line of text from time to time, and for each thing that is to be said of the rows.

    Returns:
        Loss, in nats a trained token, perplexity and accuracies of the rows that were measured.

    Raises:
        UsageError: A value of the configuration that cannot be meant, a path is not there, or so many threads cannot
            compute here.
        DataError: Rows that cannot be measured.
        IncompatibleError: The adapter does not fit the bundle.
        VerificationError: A file of the bundle or adapter was changed.
        EdgetuneError: The loss is not finite.
    """
    check_config(config)
    data, adapter = rows_file(Path(data), "test", "valid"), None if adapter is None else Path(adapter)
    encoding = RowEncoding(raw_prompts=config.raw_prompts, content_as_text=config.content_as_text)
    with computing_with(config.threads):
        opened = as_bundle(bundle)
        manifest = opened.manifest
        if adapter is not None:
            encoding |= row_encoding(adapter)
        encoder = load_encoder(opened.path, manifest.tokenizer, encoding)
        examples = load_examples(data, encoder, manifest.max_length, truncate=config.truncate)
        for line in examples.notices:
            say(line)
        parameters = None
        if adapter is not None:
            parameters = read_adapter(adapter, manifest.lora, manifest.base, manifest.tokenizer, read_row_norms(opened))
        return measure(opened, examples.examples, parameters, left_out=examples.too_long, say=say)


def measure(
    bundle: Bundle,
    examples: Sequence[Example],
    parameters: Parameters | None,
    *,
    left_out: int = 0,
    say: Callable[[str], None] = silent,
) -> Evaluation:
    """Measure a bundle on rows that are loaded already.

    Args:
        bundle: An open bundle; its graph `loss` gives the mean loss of a batch and the most probable tokens.
        examples: The rows, at least one.
        parameters: The adapter; None measures the base alone.
        left_out: Rows that are not among `examples`; only passed on.
        say: Called with one line of text from time to time.
    """
    manifest = bundle.manifest
    session = open_graph(bundle.file("loss"))
    # A fresh B is zero: then the slots add nothing, whatever A is.
    adapter = initial_parameters(manifest.lora, 0, read_row_norms(bundle)) if parameters is None else parameters
    trained = right = exact = 0
    total = 0.0
    pulse = Pulse(say, f"measured {{}} of {len(examples):,} rows")
    for batch in Batcher(manifest, longest(examples), MEASURED_ROWS, packing=True).measure(examples):
        loss, predictions = session.run(["loss", "predictions"], {**batch.tensors(), **adapter})
        counted = batch.labels != IGNORED
        hit = predictions == batch.labels
        total += float(loss[0]) * batch.trained_tokens
        trained += batch.trained_tokens
        right += int((hit & counted).sum())
        exact += len(batch.examples) - len(np.unique(batch.rows[counted & ~hit]))
        pulse.add(len(batch.examples))
    mean = total / trained
    if not np.isfinite(mean):
        raise EdgetuneError(f"the loss is {mean}: the adapter or the base holds numbers that no training would leave")
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.float64(mean)))
    return Evaluation(len(examples), left_out, trained, mean, perplexity, right / trained, exact / len(examples))
