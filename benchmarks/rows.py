"""The token ids that every contestant trains on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments import Workload

_FIRST_PLAIN_TOKEN = 3
"""The ids before it are special tokens."""


def random_rows(workload: Workload) -> NDArray[np.int64]:
    """Token ids (rows, length), the same in every process."""
    vocabulary = workload.model.size.vocabulary
    return np.random.default_rng(0).integers(_FIRST_PLAIN_TOKEN, vocabulary, (workload.rows, workload.length))
