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
_JOB_ROWS = 140
"""As many as a person writes or corrects by hand."""


def random_rows(workload: Workload) -> NDArray[np.int64]:
    """Token ids (rows, length), the same in every process."""
    vocabulary = workload.model.size.vocabulary
    return np.random.default_rng(0).integers(_FIRST_PLAIN_TOKEN, vocabulary, (workload.rows, workload.length))


def job_rows(folder: Path) -> tuple[Path, Path]:
    """Files of the job's rows, to train and to measure on: the first of the real ones.

    Args:
        folder: Where the file to train on is written.
    """
    train, valid = real_rows()
    few = folder / "job.jsonl"
    few.write_text("".join(train.read_text(encoding="utf-8").splitlines(keepends=True)[:_JOB_ROWS]), encoding="utf-8")
    return few, valid


def real_rows() -> tuple[Path, Path]:
    """Files of rows to train and to measure the real model on: sentences with intent and slots, else the demo's rows.

    The former lie beside the checkout and are no part of the project.
    """
    folder = ROOT.parent / "shared" / "real" / "snips"
    if folder.is_dir():
        return folder / "train.jsonl", folder / "valid.jsonl"
    return OFFLINE.train, OFFLINE.valid
