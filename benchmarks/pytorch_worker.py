"""PyTorch + transformers + PEFT at its best on a CPU."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.experiments import PyTorch, Training
from benchmarks.models import Model
from benchmarks.rows import random_rows
from benchmarks.training_steps import LEARNING_RATE, MAX_GRAD_NORM, time_steps


def measure_pytorch(experiment: Training, contestant: PyTorch, checkpoint: Path) -> dict[str, float]:
    """Time training steps of a checkpoint with LoRA on all projections.

    Fused attention (sdpa), which knows without a mask that it is causal; no key/value cache; fused AdamW on the LoRA
    parameters alone; gradients are dropped, not zeroed. torch.compile takes a minute and gained nothing.
    """
    begin = perf_counter()
    import torch

    model = _model(contestant, experiment.workload.model, checkpoint)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids = torch.from_numpy(random_rows(experiment.workload))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return time_steps(experiment, step, perf_counter() - begin)


def _model(contestant: PyTorch, described: Model, checkpoint: Path) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3ForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[contestant.dtype]
    base = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa", use_cache=False)
    slots = LoraConfig(
        r=described.rank,
        lora_alpha=described.alpha,
        target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    )
    model = get_peft_model(base, slots, autocast_adapter_dtype=not contestant.bf16_adapter)
    if contestant.checkpointing:
        # The leaner of the two ways; it needs an input that has a gradient.
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model.train()
