"""Adapters with a record of a run that nobody did: what it says is chosen by the test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.formats.adapter import MANIFEST, RECORD, write_adapter
from edgetune.formats.manifest import AdapterManifest, BaseModel
from edgetune.formats.manifest_json import write_manifest
from edgetune.model.lora import initial_parameters
from support.described_folders import BASE, LORA, TOKENIZER

OPTIONS = {"method": "backpropagation", "learning_rate": 2e-4, "batch_size": 4, "shuffle": True, "steps": None}
PROVENANCE = {
    "edgetune": "0.1.0",
    "runtime": "onnxruntime",
    "runtime_version": "onnxruntime 1.31.1",
    "plan": "fp32, weights resident",
    "threads": "2",
    "machine": "Kettle Board 3, aarch64, linux",
    "bundle": "12" * 32,
    "options": json.dumps(OPTIONS),
    "rows": "72",
    "finished": "2026-03-04T05:06:07+00:00",
}


def lines_of_run(steps: int = 40, loss: float = 6.0, every: int = 10) -> list[dict[str, Any]]:
    """A record whose loss falls, measured before the first step and after some."""
    lines = []
    for step in range(1, steps + 1):
        falling = loss * math.exp(-2 * step / steps)
        line: dict[str, Any] = {
            "step": step,
            "loss": falling,
            "learning_rate": 2e-4 * (1 - step / steps),
            "grad_norm": 1 + falling,
            "tokens": 100,
            "tokens_per_second": 400.0,
            "peak_memory_bytes": 300_000_000 + step,
            "seconds": step * 0.25,
            "memory_bytes": 200_000_000 + step,
        }
        if step == 1:
            line["initial_validation_loss"] = loss + 1
        if step % every == 0:
            line["validation_loss"] = falling + 0.5
        lines.append(line)
    return lines


def write_run(
    folder: Path,
    lines: Sequence[Mapping[str, Any]] | bytes,
    provenance: Mapping[str, str] = PROVENANCE,
    base: BaseModel = BASE,
) -> Path:
    """Write an adapter whose record has these lines, or these bytes."""
    folder.mkdir(parents=True)
    record = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / RECORD).write_bytes(record)
    parameters = initial_parameters(LORA, seed=0)
    write_adapter(
        folder, base=base, tokenizer=TOKENIZER, lora=LORA, parameters=parameters, provenance=provenance
    )
    return folder


def seal_again(folder: Path, manifest: AdapterManifest, **changes: Any) -> None:
    """Write another contract into an adapter: one that is valid, whoever wrote it."""
    (folder / MANIFEST).write_bytes(write_manifest(replace(manifest, **changes)))
