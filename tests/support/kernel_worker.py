"""Runs in the side environment: every model of a folder on its own inputs, by ONNX Runtime Training's kernels.

Usage: kernel_worker.py FOLDER; reads NAME.onnx and NAME.npz, writes NAME.out.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
options.log_severity_level = 3
for model in sorted(Path(sys.argv[1]).glob("*.onnx")):
    session = ort.InferenceSession(str(model), options)
    with np.load(model.with_suffix(".npz")) as inputs:
        results = session.run(None, dict(inputs))
    names = [output.name for output in session.get_outputs()]
    np.savez(model.with_suffix(".out.npz"), **dict(zip(names, results, strict=True)))
