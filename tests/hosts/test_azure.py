"""Job files are taken by azure-ai-ml, which has an environment of its own; wrong ones are not."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import AzureMlConfig, FoundryConfig, JobConfig
from edgetune.formats.bundle import load_bundle
from edgetune.jobs.azure_foundry import foundry_job
from edgetune.jobs.azure_ml import JOB, azure_ml_job
from edgetune.jobs.folder import write_job
from support.golden import BUNDLE, TRAIN, VALID
from support.repository import ROOT

PYTHON = Path(os.environ.get("EDGETUNE_AZURE_PYTHON", ROOT / ".venv-azure" / "bin" / "python"))


def checked(path: Path) -> dict[str, Any]:
    """What azure-ai-ml would send of a job file, or why it refuses it."""
    checker = ROOT / "tests" / "support" / "azure_checker.py"
    done = subprocess.run([PYTHON, checker, path], capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", ["command", "pipeline", "finetuning"])
def test_azures_library_takes_the_job(tmp_path: Path, kind: str) -> None:
    if kind == "finetuning":
        job = foundry_job(FoundryConfig(), with_valid=True)
    else:
        config = AzureMlConfig(gpus=2, sharding="zero3", batch_size=4, pipeline=kind == "pipeline")
        job = azure_ml_job(load_bundle(BUNDLE), config, with_valid=True)
    path = write_job(job, TRAIN, VALID, tmp_path / "job", JobConfig()).path / JOB
    assert "sent" in checked(path)
    broken = json.loads(path.read_text()) | {"nonsense": 1}
    path.write_text(json.dumps(broken))
    assert "refused" in checked(path)
