"""What a step on a tiny bundle takes: an adapter, a batch and an optimizer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch, make_batch
from edgetune.data.encode import Example
from edgetune.formats.bundle import Bundle
from edgetune.model.lora import initial_parameters
from edgetune.runtimes.contract import OptimizerConfig

LEARNING_RATE = 1e-3
OPTIMIZER = OptimizerConfig(weight_decay=0.5, max_grad_norm=0.3)


def adapter_of(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Parameters whose B is not zero, so that A has a gradient."""
    generator = np.random.default_rng(11)
    return {
        name: value if value.any() else (0.05 * generator.standard_normal(value.shape)).astype(np.float32)
        for name, value in initial_parameters(bundle.manifest.lora, seed=0).items()
    }


def batch_of(bundle: Bundle, rows: list[Example]) -> Batch:
    return make_batch(rows, bundle.manifest.architecture.rope, bundle.manifest.tokenizer.pad_token_id)
