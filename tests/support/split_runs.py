"""What runs over a bundle of two layers take, and its lower layers before they are quantised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgetune.config import SplitConfig, TrainConfig
from edgetune.data.encode import Example, load_encoder
from edgetune.data.examples import load_examples
from edgetune.formats.bundle import Bundle
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.onnx_session import open_graph
from edgetune.split import split
from edgetune.split.graph import build_trunk

Floats = NDArray[np.float32]
WHOLE = LayeredPlan(kept_layers=2)
ROWS = [
    {"prompt": f"turn the lamp in the {room} {state}", "completion": f" the lamp is {state} now"}
    for room in ("kitchen", "hall", "office", "cellar")
    for state in ("on", "off")
]


def options_of(**options: Any) -> TrainConfig:
    return replace(TrainConfig(), runtime="onnxruntime", learning_rate=1e-2, **options)


def write_split_rows(folder: Path) -> Path:
    """`ROWS` as a file."""
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def encoded_rows(bundle: Bundle, data: Path) -> Sequence[Example]:
    """The rows of a file as the bundle's tokenizer has them."""
    encoder = load_encoder(bundle.path, bundle.manifest.tokenizer)
    return load_examples(data, encoder, bundle.manifest.max_length, truncate=False).examples


def split_in_the_middle(whole: Bundle, data: Path, output: Path) -> Bundle:
    """A bundle whose lower half is a trunk."""
    return split(whole, data, output, SplitConfig(length=48))


class FloatLayers:
    """The trunk before it is quantised."""

    placement = None

    def __init__(self, bundle: Bundle, layers: int) -> None:
        self._session = open_graph(ir.to_proto(build_trunk(bundle, layers).model).SerializeToString())

    def forward(self, hidden: Floats, rope_cos: Floats, rope_sin: Floats) -> Floats:
        place = np.arange(len(hidden))
        bias = np.where(place <= place[:, None], 0, -1e4).astype(np.float32)
        inputs = {"hidden": hidden, "attn_bias": bias[None], "rope_cos": rope_cos, "rope_sin": rope_sin}
        (states,) = self._session.run(None, {name: array[None] for name, array in inputs.items()})
        return np.asarray(states[0], np.float32)
