"""The token ids that every contestant trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments import Workload
from examples.demo import OFFLINE
from examples.running import ROOT

_FIRST_PLAIN_TOKEN = 3
"""The ids before it are special tokens."""


def random_rows(workload: Workload) -> NDArray[np.int64]:
    """Token ids (rows, length), the same in every process."""
    vocabulary = workload.model.size.vocabulary
    return np.random.default_rng(0).integers(_FIRST_PLAIN_TOKEN, vocabulary, (workload.rows, workload.length))


def real_rows() -> tuple[Path, Path]:
    """Files of rows to train and to measure the real model on: sentences with intent and slots, else the demo's rows.

    The former lie beside the checkout and are no part of the project.
    """
    folder = ROOT.parent / "shared" / "real" / "snips"
    if folder.is_dir():
        return folder / "train.jsonl", folder / "valid.jsonl"
    return OFFLINE.train, OFFLINE.valid
