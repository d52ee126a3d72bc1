"""Runs in the side environment: loads training artifacts and takes steps through the ONNX Runtime Training API.

Usage: artifact_worker.py FOLDER INPUTS.npz STEPS; writes FOLDER/result.npz: `loss` and `norm` of every step, the
`evaluated` loss before the first, and the parameters after the last. Every output but the first two is a norm.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from onnxruntime.training.api import CheckpointState, Module, Optimizer

folder, steps = Path(sys.argv[1]), int(sys.argv[3])
state = CheckpointState.load_checkpoint(folder / "checkpoint")
module = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
optimizer = Optimizer(folder / "optimizer_model.onnx", module)
with np.load(sys.argv[2]) as given:
    inputs = [given[name] for name in module.input_names()]
module.eval()
evaluated = module(*inputs)[1]
module.train()
losses, norms = [], []
for _ in range(steps):
    _, loss, norm = module(*inputs)
    losses.append(float(loss[0]))
    norms.append(float(norm))
    optimizer.set_learning_rate(0.01)
    optimizer.step()
    module.lazy_reset_grad()
results = {"loss": losses, "norm": norms, "evaluated": evaluated}
results |= {name: np.array(parameter.data) for name, parameter in state.parameters}
np.savez(folder / "result.npz", **results)
