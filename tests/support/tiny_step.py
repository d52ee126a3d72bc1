"""What a step on a tiny bundle takes: an adapter, a batch and an optimizer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch, make_batch
from edgetune.data.encode import Example
from edgetune.formats.bundle import Bundle
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.lora import MAGNITUDE, initial_parameters
from edgetune.runtimes.contract import OptimizerConfig

LEARNING_RATE = 1e-3
OPTIMIZER = OptimizerConfig(weight_decay=0.5, max_grad_norm=0.3)


def adapter_of(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Parameters whose B is not zero, so that A has a gradient, and whose magnitudes are no row norms."""
    generator = np.random.default_rng(11)
    adapter = {
        name: value if value.any() else (0.05 * generator.standard_normal(value.shape)).astype(np.float32)
        for name, value in initial_parameters(bundle.manifest.lora, 0, read_row_norms(bundle)).items()
    }
    for name, value in adapter.items():
        if name.endswith(MAGNITUDE):
            value *= generator.uniform(0.8, 1.2, value.shape)
    return adapter


def batch_of(bundle: Bundle, rows: list[Example]) -> Batch:
    return make_batch(rows, bundle.manifest.architecture.rope, bundle.manifest.tokenizer.pad_token_id)
