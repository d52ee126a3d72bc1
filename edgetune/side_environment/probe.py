"""A worker that says whether the side environment works: imports what the other workers import, prints the version."""

from __future__ import annotations

import onnx  # noqa: F401
import onnxruntime
from onnxruntime.training import api, artifacts  # noqa: F401

print(f"onnxruntime-training-cpu {onnxruntime.__version__}")
