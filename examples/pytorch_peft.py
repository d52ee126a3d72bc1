"""PyTorch + PEFT beside an adapter that edgetune trained: the same rows and settings, and how well it answers then.

    python -m examples.pytorch_peft CHECKPOINT BUNDLE ADAPTER --data train.jsonl --test test.jsonl --metric accuracy

Rank, alpha, learning rate, schedule, steps, the order of rows and the precision are read from ADAPTER. Rows become
the token ids and labels that they are to edgetune, cut where training would cut them. All else is PyTorch, transformers
and PEFT: the base is CHECKPOINT in float32, not the bundle's int4; A is drawn by PEFT, so that the two runs are no
twins. Prompts are made with transformers' tokenizer, answered greedily in float32, and measured by edgetune's metrics.

The last line is a JSON object: `scores`, `perplexity`, `train_seconds`, `answer_seconds`, `peak_memory_bytes`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Phi3ForCausalLM, PreTrainedTokenizerFast, get_scheduler

from edgetune.data.batches import epoch_batches
from edgetune.data.encode import IGNORED, Example, load_encoder
from edgetune.data.examples import load_examples
from edgetune.data.problems import Problems
from edgetune.data.rows import ChatRow, Message, read_rows
from edgetune.evaluation.answered_rows import write_answered_rows
from edgetune.evaluation.measurement import AnsweredRow
from edgetune.evaluation.metrics import METRICS
from edgetune.formats.bundle import load_bundle

_SCHEDULES = {"constant": "constant_with_warmup"}
"""Where transformers calls a schedule by another name."""
_ASKED_TOGETHER = 8
"""Prompts of a call of `generate`, padded on the left."""


def batch_of(rows: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Rows padded on the right: `input_ids`, `attention_mask` and `labels`, each (rows, longest)."""
    longest = max(len(row.input_ids) for row in rows)

    def padded(lists: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*numbers, *[filler] * (longest - len(numbers))] for numbers in lists])

    return {
        "input_ids": padded([row.input_ids for row in rows], 0),
        "attention_mask": padded([[1] * len(row.input_ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORED),
    }


def rows_of(file: Path, bundle: Path, longest: int | None = None) -> list[Example]:
    """Token ids and labels of the rows of a file, as edgetune trains them.

    Args:
        file: JSONL rows.
        bundle: What they are encoded for.
        longest: Tokens of a row, which is cut there; the bundle's maximum without it.
    """
    opened = load_bundle(bundle)
    encoder = load_encoder(opened.path, opened.manifest.tokenizer)
    return load_examples(file, encoder, longest or opened.manifest.max_length, truncate=True).examples


def model_of(checkpoint: Path, adapter: Path) -> PeftModel:
    """The base in float32 with a new adapter of another one's kind: its rank, alpha and targets."""
    base = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    settings = PeftConfig.from_pretrained(adapter)
    settings.inference_mode = False
    settings.base_model_name_or_path = str(checkpoint)
    return get_peft_model(base, settings)


def train(model: PeftModel, rows: Sequence[Example], provenance: Mapping[str, str]) -> None:
    """Train a new adapter as another one was.

    Args:
        model: What `model_of` gave.
        rows: What the other adapter was trained on.
        provenance: What edgetune wrote of the other one's run, with a batch for each step.
    """
    options, steps = json.loads(provenance["options"]), int(provenance["steps"])
    half = "bf16" in provenance["plan"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = options["learning_rate"], options["weight_decay"]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay, fused=True)
    name = _SCHEDULES.get(options["schedule"], options["schedule"])
    schedule = get_scheduler(name, optimizer, options["warmup_steps"], steps)
    batches = epoch_batches(rows, options["batch_size"], options["seed"], options["shuffle"])
    model.train()
    for step, batch in enumerate(islice(batches, steps), 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batch_of(batch), use_cache=False).loss
        loss.backward()
        if options["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(trained, options["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 1 or step % 10 == 0 or step == steps:
            print(f"step {step}/{steps}: loss {loss.item():.4f}", file=sys.stderr, flush=True)
    model.eval()


def losses(model: PeftModel, rows: Sequence[Example]) -> list[tuple[float, int]]:
    """Mean loss of each row's trained tokens, in nats, and how many these are."""
    found = []
    for row in rows:
        with torch.no_grad():
            loss = float(model(**batch_of([row])).loss)
        found.append((loss, sum(label != IGNORED for label in row.labels[1:])))
    return found


def answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[tuple[Message, ...]], most: int
) -> list[str]:
    """What the model says to each prompt, greedily, in at most so many tokens."""
    tokenizer.padding_side = "left"
    said: list[str] = []
    for start in range(0, len(prompts), _ASKED_TOGETHER):
        turns = [
            [{"role": message.role, "content": message.content} for message in prompt]
            for prompt in prompts[start : start + _ASKED_TOGETHER]
        ]
        asked = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        ids, mask = asked["input_ids"], asked["attention_mask"]
        with torch.no_grad():
            answered = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False)
        said += tokenizer.batch_decode(answered[:, ids.shape[1] :], skip_special_tokens=True)
    return said


def prompt_of(row: ChatRow) -> tuple[Message, ...]:
    """The turns before the row's answer, which is its last message."""
    return row.messages[:-1]


def main() -> None:
    """Train, answer, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the base, a Hugging Face folder")
    parser.add_argument("bundle", type=Path, help="what edgetune made of it")
    parser.add_argument("adapter", type=Path, help="what edgetune trained")
    parser.add_argument("--data", type=Path, required=True, help="the rows that it was trained on")
    parser.add_argument("--test", type=Path, required=True, help="the rows that are asked, or only measured")
    parser.add_argument("--metric", action="append", default=[], choices=METRICS, help="can be given again")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rows-output", type=Path, help="a file for the answered rows, as edgetune eval writes it")
    asked = parser.parse_args()

    provenance = json.loads((asked.adapter / "edgetune.json").read_text(encoding="ascii"))["provenance"]
    torch.manual_seed(json.loads(provenance["options"])["seed"])
    model, rows = model_of(asked.checkpoint, asked.adapter), rows_of(asked.data, asked.bundle)
    started = time.monotonic()
    train(model, rows, provenance)
    trained = time.monotonic()
    tested = losses(model, rows_of(asked.test, asked.bundle, model.config.max_position_embeddings))
    tokens = sum(count for _, count in tested)
    found: dict[str, Any] = {
        "perplexity": math.exp(sum(loss * count for loss, count in tested) / tokens),
        "train_seconds": trained - started,
    }
    if asked.metric:
        problems = Problems(asked.test)
        chats = [row for row in read_rows(asked.test, problems) if isinstance(row, ChatRow)]
        problems.raise_if_any()
        tokenizer = AutoTokenizer.from_pretrained(asked.checkpoint)
        said = answers(model, tokenizer, [prompt_of(row) for row in chats], asked.max_new_tokens)
        answered = [
            AnsweredRow(row.line, prompt_of(row), row.messages[-1].content, text, loss, count)
            for row, text, (loss, count) in zip(chats, said, tested, strict=True)
        ]
        if asked.rows_output:
            write_answered_rows(asked.rows_output, answered)
        found["scores"] = {name: METRICS[name].measure(answered).score for name in asked.metric}
    found["answer_seconds"] = time.monotonic() - trained
    found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
