"""PyTorch + transformers + PEFT at its best on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import cos, pi
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from benchmarks.experiments import Job, PyTorch, Training
from benchmarks.models import Model
from benchmarks.rows import job_rows, random_rows
from benchmarks.training_steps import LEARNING_RATE, MAX_GRAD_NORM, time_steps
from edgetune.data.batches import epoch_batches
from edgetune.data.encode import IGNORED, Example, load_encoder
from edgetune.data.examples import load_examples
from edgetune.formats.bundle import Bundle

_BATCH_SIZE, _EPOCHS = 4, 4
"""Of the job, as edgetune has them by default for so many rows."""


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


def measure_pytorch_job(
    experiment: Job, contestant: PyTorch, checkpoint: Path, bundle: Bundle
) -> dict[str, float]:
    """The job: the lowest validation loss, which is measured after each epoch, and the time of the steps up to it.

    The rate falls along half a cosine, and rows come in the order in which edgetune draws them.

    Args:
        experiment: Says the highest rate.
        contestant: Says the dtype.
        checkpoint: The model.
        bundle: Its tokenizer and template encode the rows.
    """
    import torch

    with TemporaryDirectory() as scratch:
        train, valid = (_encoded(path, bundle) for path in job_rows(Path(scratch)))
    model = _model(contestant, experiment.model, checkpoint)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
    epoch = -(-len(train) // _BATCH_SIZE)
    steps, peak = _EPOCHS * epoch, experiment.learning_rate or LEARNING_RATE

    def step(number: int, rows: Sequence[Example]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = peak * 0.5 * (1 + cos(pi * number / steps))
        _loss(model, rows).backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    first, seconds, lowest = _measured(model, valid), 0.0, (float("inf"), 0.0)
    for number, rows in enumerate(islice(epoch_batches(train, _BATCH_SIZE, seed=0, shuffle=True), steps)):
        begin = perf_counter()
        step(number, rows)
        seconds += perf_counter() - begin
        if (number + 1) % epoch == 0:
            lowest = min(lowest, (_measured(model, valid), seconds))
    return {"first_validation_loss": first, "validation_loss": lowest[0], "seconds": lowest[1]}


def _encoded(path: Path, bundle: Bundle) -> list[Example]:
    encoder = load_encoder(bundle.path, bundle.manifest.tokenizer)
    return list(load_examples(path, encoder, bundle.manifest.max_length, truncate=False).examples)


def _loss(model: Any, rows: Sequence[Example]) -> Any:
    """Mean over the trained tokens of the rows, which are padded to the longest."""
    import torch

    longest = max(len(row.input_ids) for row in rows)
    ids, labels, mask = (torch.full((len(rows), longest), value) for value in (0, IGNORED, 0))
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        ids[place, :length], labels[place, :length] = torch.tensor(row.input_ids), torch.tensor(row.labels)
        mask[place, :length] = 1
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def _measured(model: Any, rows: Sequence[Example]) -> float:
    """Mean loss over the trained tokens of all rows."""
    import torch

    total, tokens = 0.0, sum(row.trained_tokens for row in rows)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), _BATCH_SIZE):
            part = rows[start : start + _BATCH_SIZE]
            total += float(_loss(model, part)) * sum(row.trained_tokens for row in part)
    model.train()
    return total / tokens


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
