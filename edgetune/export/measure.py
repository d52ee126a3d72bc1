"""The answer loss of a GenAI graph, computed with stock onnxruntime from its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data.encode import IGNORED, Example
from edgetune.genai import MODEL
from edgetune.onnx_session import open_graph

if TYPE_CHECKING:
    import onnx
    import onnxruntime

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class Measured:
    """A GenAI model that is fed whole rows, with nothing in its key-value cache.

    Args:
        folder: Holds the weights, and the graph unless one is given.
        graph: Used in place of the folder's `model.onnx`; its weights are external data in `folder`.
    """

    def __init__(self, folder: Path, graph: onnx.ModelProto | None = None) -> None:
        self._session = open_graph(folder / MODEL if graph is None else graph.SerializeToString(), folder)

    def answer_loss(
        self,
        examples: Sequence[Example],
        *,
        values: Mapping[str, NDArray[np.float32]] | None = None,
        adapter: Path | None = None,
    ) -> float:
        """Mean cross-entropy over the trained tokens of all rows, in nats a token.

        Args:
            examples: The rows, at least one.
            values: The graph's LoRA inputs, by name.
            adapter: An `.onnx_adapter` that holds the LoRA inputs.
        """
        import onnxruntime as ort

        options, loaded = ort.RunOptions(), ort.LoraAdapter()
        if adapter is not None:
            loaded.Load(str(adapter))
            options.add_active_adapter(loaded)
        losses = [loss for example in examples for loss in self._token_losses(example, values or {}, options)]
        return float(np.mean(losses))

    def _token_losses(
        self, example: Example, values: Mapping[str, NDArray[np.float32]], options: onnxruntime.RunOptions
    ) -> Iterator[float]:
        """−log p of every trained token."""
        feeds = self._feeds(np.array([example.input_ids], np.int64)) | dict(values)
        logits = self._session.run(["logits"], feeds, options)[0][0]
        targets = np.array(example.labels[1:], np.int64)
        positions = np.flatnonzero(targets != IGNORED)
        scores = logits[positions].astype(np.float64)
        peak = scores.max(axis=-1)
        normaliser = peak + np.log(np.exp(scores - peak[:, None]).sum(axis=-1))
        yield from (normaliser - scores[np.arange(len(positions)), targets[positions]]).tolist()

    def _feeds(self, input_ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        length = input_ids.shape[1]
        feeds: dict[str, NDArray[Any]] = {}
        for spec in self._session.get_inputs():
            dtype = _DTYPES[spec.type]
            if spec.name == "input_ids":
                feeds[spec.name] = input_ids.astype(dtype)
            elif spec.name == "attention_mask":
                feeds[spec.name] = np.ones((1, length), dtype)
            elif spec.name == "position_ids":
                feeds[spec.name] = np.arange(length, dtype=dtype)[None]
            else:
                heads, size = spec.shape[1], spec.shape[3]
                feeds[spec.name] = np.zeros((1, heads, 0, size), dtype)
        return feeds
