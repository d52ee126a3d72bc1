"""Runs in the side environment: trains a bundle's artifacts through the ONNX Runtime Training API.

Usage: worker.py BUNDLE WEIGHT_DECAY MAX_GRAD_NORM THREADS

Answers messages of `wire` on standard input and output: `parameters` sets them, `step` takes its passes' batches and a
learning rate, `evaluate` a batch, `adapter` nothing. Imports nothing of edgetune, which is not installed there.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# What ONNX Runtime prints must not mix with the messages.
_replies = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import wire  # type: ignore[import-not-found]  # noqa: E402
from onnxruntime import SessionOptions  # noqa: E402
from onnxruntime.training.api import CheckpointState, Module, Optimizer  # noqa: E402

_INPUTS = ("input_ids", "labels", "attn_bias", "rope_cos", "rope_sin", "loss_scale")
_NO_CLIPPING = 3e38
_SAVED = "saved"


class Trainer:
    """Module, optimizer and state of one run."""

    def __init__(self, bundle: Path, weight_decay: float, max_grad_norm: float, threads: int) -> None:
        options = SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        for name in ("training_model.onnx", "eval_model.onnx"):
            # This release predates fixes around external data: refuse what leaves the folder before it is opened.
            _check_external_data(bundle / name)
        self._bundle, self._options = bundle, options
        self._hyperparameters = (weight_decay, max_grad_norm)
        self._open(bundle / "checkpoint")

    def _open(self, saved: Path) -> None:
        """Module and optimizer with the values that ONNX Runtime saved there."""
        bundle = self._bundle
        self._state = CheckpointState.load_checkpoint(saved)
        models = bundle / "training_model.onnx", bundle / "eval_model.onnx"
        self._module = Module(models[0], self._state, models[1], "cpu", self._options)
        with TemporaryDirectory() as scratch:
            optimizer = Path(scratch) / "optimizer_model.onnx"
            _configure_optimizer(bundle / "optimizer_model.onnx", optimizer, *self._hyperparameters)
            self._optimizer = Optimizer(optimizer, self._module)

    def parameters(self, header: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take over the LoRA parameters."""
        for name, parameter in self._state.parameters:
            parameter.data = arrays[name]
        return {}, {}

    def step(self, header: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """One optimizer step over its passes' batches; `shares` are theirs of the trained tokens."""
        self._module.train()
        loss = norm = 0.0
        for index, share in enumerate(header["shares"]):
            arrays[f"{index}/loss_scale"] = np.array([share], dtype=np.float32)
            _, mean, norm = self._module(*(arrays[f"{index}/{name}"] for name in _INPUTS))
            loss += share * float(mean[0])
        norm = float(norm)
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            self._optimizer.set_learning_rate(header["learning_rate"])
            self._optimizer.step()
        self._module.lazy_reset_grad()
        return {"loss": loss, "grad_norm": norm, "applied": applied}, {}

    def evaluate(self, header: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Mean loss of a batch."""
        self._module.eval()
        arrays["loss_scale"] = np.ones(1, dtype=np.float32)
        _, mean = self._module(*(arrays[name] for name in _INPUTS))
        return {"loss": float(mean[0])}, {}

    def adapter(self, header: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The LoRA parameters."""
        return {}, {name: np.array(parameter.data) for name, parameter in self._state.parameters}

    def state(self, header: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters, moments and steps done, as ONNX Runtime's own file (bytes,)."""
        with TemporaryDirectory() as scratch:
            saved = Path(scratch) / _SAVED
            CheckpointState.save_checkpoint(self._state, saved, include_optimizer_state=True)
            return {}, {_SAVED: np.fromfile(saved, np.uint8)}

    def restore(self, header: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Go on where `state` was."""
        with TemporaryDirectory() as scratch:
            saved = Path(scratch) / _SAVED
            saved.write_bytes(arrays[_SAVED].tobytes())
            self._open(saved)
        return {}, {}


def _check_external_data(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            target = path.parent / entry.value
            if entry.key == "location" and (target.parent != path.parent or target.is_symlink()):
                raise ValueError(f"{path}: external data {entry.value!r} leaves the bundle")


def _configure_optimizer(source: Path, target: Path, weight_decay: float, max_grad_norm: float) -> None:
    """Write both values over the artifact's: attributes of `AdamWOptimizer` and of `InplaceClipGradNorm`.

    `alpha` and `beta` of the former are AdamW's betas, which stay as they are.
    """
    model = onnx.load(source)
    values = {"weight_decay": weight_decay, "max_norm": max_grad_norm or _NO_CLIPPING}
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in values:
                attribute.f = values[attribute.name]
    onnx.save(model, target)


def main(bundle: str, weight_decay: str, max_grad_norm: str, threads: str) -> None:
    """Answer messages until the other side closes."""
    trainer = Trainer(Path(bundle), float(weight_decay), float(max_grad_norm), int(threads))
    wire.send(_replies, {}, {})
    while (message := wire.receive(sys.stdin.buffer)) is not None:
        header, arrays = message
        wire.send(_replies, *getattr(trainer, header["request"])(header, arrays))


if __name__ == "__main__":
    main(*sys.argv[1:])
