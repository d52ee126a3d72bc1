"""The answer loss of a GenAI graph, computed with stock onnxruntime from its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batcher import MEASURED_ROWS
from edgetune.data.encode import IGNORED, Example
from edgetune.data.packing import Capacity
from edgetune.formats.genai import MODEL
from edgetune.model.rope import Rope
from edgetune.runtimes.onnx_session import open_graph
from edgetune.text.pulse import Pulse

if TYPE_CHECKING:
    import onnxruntime

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
_SCORES = 64
"""Trained positions whose scores exist in float64 at the same time."""
_PADDING = 0
"""Token behind the shorter rows of a batch: attention is causal, so that no row sees what follows it."""


class Measured:
    """A GenAI model that is fed whole rows, with nothing in its key-value cache.

    Args:
        folder: Holds the weights, and the graph unless one is given.
        rope: The model's rotary embedding; without it, rows go through the model one by one.
        graph: Used in place of the folder's `model.onnx`; its weights are external data in `folder`.
    """

    def __init__(self, folder: Path, rope: Rope | None, graph: bytes | None = None) -> None:
        self._session = open_graph(folder / MODEL if graph is None else graph, folder)
        self._rope = rope

    def answer_loss(
        self,
        examples: Sequence[Example],
        pulse: Pulse,
        *,
        values: Mapping[str, NDArray[np.float32]] | None = None,
        adapter: Path | None = None,
    ) -> float:
        """Mean cross-entropy over the trained tokens of all rows, in nats a token.

        Args:
            examples: The rows, at least one.
            pulse: Counts the rows.
            values: The graph's LoRA inputs, by name.
            adapter: An `.onnx_adapter` that holds the LoRA inputs.
        """
        import onnxruntime as ort

        options, loaded = ort.RunOptions(), ort.LoraAdapter()
        if adapter is not None:
            loaded.Load(str(adapter))
            options.add_active_adapter(loaded)
        total, tokens = 0.0, 0
        for batch in batches(examples, self._rope):
            for losses in self._token_losses(batch, values or {}, options):
                total += float(losses.sum())
                tokens += len(losses)
            pulse.add(len(batch))
        return total / tokens

    def _token_losses(
        self, batch: Sequence[Example], values: Mapping[str, NDArray[np.float32]], options: onnxruntime.RunOptions
    ) -> Iterator[NDArray[np.float64]]:
        """−log p of every trained token, a part of a row at a time."""
        input_ids = np.full((len(batch), max(len(row.input_ids) for row in batch)), _PADDING, np.int64)
        for ids, row in zip(input_ids, batch, strict=True):
            ids[: len(row.input_ids)] = row.input_ids
        feeds = self._feeds(input_ids) | dict(values)
        (logits,) = self._session.run(["logits"], feeds, options)
        for scores, row in zip(logits, batch, strict=True):
            targets = np.array(row.labels[1:], np.int64)
            trained = np.flatnonzero(targets != IGNORED)
            for start in range(0, len(trained), _SCORES):
                positions = trained[start : start + _SCORES]
                yield _cross_entropy(scores[positions].astype(np.float64), targets[positions])

    def _feeds(self, input_ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        rows, length = input_ids.shape
        feeds: dict[str, NDArray[Any]] = {}
        for spec in self._session.get_inputs():
            dtype = _DTYPES[spec.type]
            if spec.name == "input_ids":
                feeds[spec.name] = input_ids.astype(dtype)
            elif spec.name == "attention_mask":
                feeds[spec.name] = np.ones((rows, length), dtype)
            elif spec.name == "position_ids":
                feeds[spec.name] = np.tile(np.arange(length, dtype=dtype), (rows, 1))
            else:
                heads, size = spec.shape[1], spec.shape[3]
                feeds[spec.name] = np.zeros((rows, heads, 0, size), dtype)
        return feeds


def batches(examples: Sequence[Example], rope: Rope | None) -> Iterator[list[Example]]:
    """Rows that go through the model together, the longest first, so that little is padded.

    A batch takes no more memory than `MEASURED_ROWS` of the longest rows. The graph keeps rows apart in no other way
    than a sequence for each. With longrope, its length decides which factors the whole batch has: rows with the short
    and rows with the long ones are apart.

    Args:
        examples: The rows, at least one.
        rope: The model's rotary embedding; without it, every row is alone.
    """
    if rope is None:
        yield from ([row] for row in examples)
        return
    left = sorted(examples, key=lambda row: -len(row.input_ids))
    longest = len(left[0].input_ids)
    capacity = Capacity(MEASURED_ROWS, longest, longest)
    limit = rope.original_max_position_embeddings if rope.long_factor is not None else 0
    while left:
        length = len(left[0].input_ids)
        # Rows are in the order of their length: those with the other factors come last.
        alike = sum((len(row.input_ids) > limit) == (length > limit) for row in left)
        count = min(alike, capacity.sequences(length))
        yield left[:count]
        del left[:count]


def _cross_entropy(scores: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """−log p of the targets (N,) by their scores (N, vocabulary)."""
    peak = scores.max(axis=-1)
    normaliser = peak + np.log(np.exp(scores - peak[:, None]).sum(axis=-1))
    losses: NDArray[np.float64] = normaliser - scores[np.arange(len(targets)), targets]
    return losses
