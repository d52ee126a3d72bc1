"""How far a step is from the exact one, and how large a model's numbers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.cache import Cache
from benchmarks.edgetune_worker import cosine, examples_of, fit, random_adapter, step_at
from benchmarks.experiments import Precision, Workload
from benchmarks.models import Model
from benchmarks.rows import real_rows
from edgetune.data.encode import Example, load_encoder
from edgetune.data.examples import load_examples
from edgetune.formats.adapter import PREFIX
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.model.lora import Parameters

_ROWS, _LENGTH = 4, 64
"""Of a step; the length is that of random rows."""


def measure_precision(experiment: Precision, cache: Cache) -> dict[str, float]:
    """Loss and LoRA gradients beside the exact ones, tensor by tensor."""
    model = experiment.model
    results, gradients = [], []
    for contestant in (experiment.contestant, experiment.exact):
        bundle = load_bundle(cache.bundle_for(contestant, model))
        adapter = _trained_adapter(cache.adapter(model)) if model.trained else random_adapter(bundle)
        fitted = fit(contestant, bundle, _rows(model, bundle), _ROWS, packing=True)
        result, found = step_at(adapter, fitted.choice, bundle, next(fitted.workload.steps()))
        results.append(result)
        gradients.append(found)
    (found_result, exact_result), (found, exact) = results, gradients
    cosines = [cosine(found[name], exact[name]) for name in exact]
    return {
        "loss": found_result.loss,
        "loss_difference": abs(found_result.loss / exact_result.loss - 1),
        "worst_cosine": min(cosines),
        "mean_cosine": float(np.mean(cosines)),
        "norm_ratio": found_result.grad_norm / exact_result.grad_norm,
    }


def measure_ranges(model: Model, checkpoint: Path, bundle: Bundle) -> dict[str, float]:
    """Of the checkpoint in PyTorch, float32: hidden states behind each layer, and inputs of the down projections."""
    import torch
    from transformers import Phi3ForCausalLM

    network = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    states: list[Any] = []
    inner: list[float] = []
    for layer in network.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: states.append(output[0].abs()))
        layer.mlp.down_proj.register_forward_hook(lambda _module, inputs, _: inner.append(inputs[0].abs().max().item()))
    with torch.no_grad():
        for row in _rows(model, bundle):
            network(input_ids=torch.tensor([row.input_ids]))
    return {
        "largest_state": max(each.max().item() for each in states),
        "median_state": float(np.median([each.median().item() for each in states])),
        "largest_inner": max(inner),
    }


def _rows(model: Model, bundle: Bundle) -> list[Example]:
    """The first rows that the real model is measured on; random ones for a random model."""
    if not model.trained:
        return examples_of(Workload(model, _ROWS, _LENGTH))
    encoder = load_encoder(bundle.path, bundle.manifest.tokenizer)
    found = load_examples(real_rows()[1], encoder, bundle.manifest.max_length, truncate=False)
    return list(found.examples[:_ROWS])


def _trained_adapter(folder: Path) -> Parameters:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): values.astype(np.float32) for name, values in tensors.items()}
