"""Make a small base model of the Phi-3 architecture from text that lies on every machine with Python.

The text is the documentation strings of the standard library, read with `ast` and never imported. The result is an
ordinary Hugging Face folder: a model that knows the chat format and some words of English, and nothing else.

    python examples/make_base.py base
"""

from __future__ import annotations

import argparse
import ast
import math
import random
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
PADDED_VOCABULARY = 4128
"""Rows of the embedding: as in Phi-3 itself there are a few more than tokens."""
MAX_POSITIONS = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
QUESTIONS = ("What is {}?", "What does {} do?", "Tell me about {}.", "How does {} work?")


def documented(library: Path) -> Iterator[tuple[str, str]]:
    """Every name of the standard library that is documented in ASCII, with its documentation; no text twice."""
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] in ("site-packages", "dist-packages") or "test" in parts or "tests" in parts:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # some files are broken on purpose: they are what lib2to3 and others are tested with
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node)
            if text and text.isascii() and len(text) >= 20 and text not in seen:
                seen.add(text)
                yield getattr(node, "name", ".".join(parts)), text


def documents(library: Path, seed: int) -> list[str]:
    """The text to learn: each documentation whole, and its first paragraph as the answer to a question.

    A question names a few words of its answer, so that the model learns to look at what it is asked.
    """
    draw = random.Random(seed)
    texts = []
    for name, text in documented(library):
        texts.append(text)
        answer = re.sub(r"\s+", " ", text.split("\n\n")[0])
        words = re.findall(r"[A-Za-z]{4,}", answer) or [name]
        subject = " ".join(draw.sample(words, min(len(words), draw.randint(2, 5)))).lower()
        question = draw.choice(QUESTIONS).format(subject)
        texts.append(f"<|user|>\n{question}<|end|>\n<|assistant|>\n{answer}<|end|>\n")
    draw.shuffle(texts)
    return texts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Phi-3's special tokens and the form of its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    """A Phi-3 of 5.5 million parameters with random weights.

    The sizes suit what comes later: heads whose rotary half-width is a multiple of 8 (ONNX Runtime GenAI), and
    widths that blocks of 32 divide (int4).
    """
    end = tokenizer.eos_token_id
    config = Phi3Config(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        original_max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.06,  # 1 / sqrt(hidden size); with Phi-3's own 0.02 so narrow a model hardly learns
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    # Plain attention: at this length it is faster on a CPU than the fused kernel.
    model = Phi3ForCausalLM._from_config(config, attn_implementation="eager")
    model.generation_config.eos_token_id = [end, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.generation_config.pad_token_id = end
    return model


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loss_of(model: Phi3ForCausalLM, batch: torch.Tensor, *, half: bool) -> torch.Tensor:
    """Mean loss of a batch, its matrix products in bfloat16 if `half`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        return model(input_ids=batch, labels=batch).loss


def half_is_faster(model: Phi3ForCausalLM, batch: torch.Tensor) -> bool:
    """Whether this processor is faster in bfloat16: twice with AMX, but many times slower without any support."""
    seconds = {}
    for half in (False, True):
        loss_of(model, batch[:2], half=half).backward()
        started = time.monotonic()
        loss_of(model, batch, half=half).backward()
        seconds[half] = time.monotonic() - started
    model.zero_grad()
    return seconds[True] < seconds[False]


def train(model: Phi3ForCausalLM, stream: torch.Tensor, *, steps: int, batch_size: int, length: int) -> float:
    """Train on random windows of `stream`.

    Args:
        model: Trained in place.
        stream: Token ids of all documents, one after the other, int64 [tokens].
        steps: Optimizer steps.
        batch_size: Windows a step.
        length: Tokens a window.

    Returns:
        Mean loss of the last 20 steps, in nats a token.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), fused=True)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, 20))
    draw = torch.Generator().manual_seed(0)
    offsets = torch.arange(length)
    losses: list[float] = []
    model.train()
    half = half_is_faster(model, stream[: batch_size * length].view(batch_size, length))
    print(f"training in {'bfloat16' if half else 'float32'}", flush=True)
    started = time.monotonic()
    for step in range(1, steps + 1):
        starts = torch.randint(len(stream) - length, (batch_size, 1), generator=draw)
        batch = stream[starts + offsets]
        loss = loss_of(model, batch, half=half)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1 or step % 20 == 0:
            seconds = time.monotonic() - started
            speed = step * batch_size * length / seconds
            print(f"step {step:4d}/{steps}  loss {losses[-1]:.3f}  {speed:,.0f} tokens/s  {seconds:.0f} s", flush=True)
    return sum(losses[-20:]) / len(losses[-20:])


def main() -> None:
    """Build the folder."""
    parser = argparse.ArgumentParser(description="make a small Phi-3 base model from the standard library's own text")
    parser.add_argument("output", type=Path, help="the Hugging Face folder to write")
    parser.add_argument("--steps", type=int, default=350, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens a window (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} already exists; choose another folder or remove it")

    torch.manual_seed(arguments.seed)
    texts = documents(Path(sysconfig.get_path("stdlib")), arguments.seed)
    tokenizer = train_tokenizer(texts)
    end = tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in [*ids, end]])
    model = build_model(tokenizer)
    print(f"{len(texts):,} documents, {len(stream):,} tokens, {model.num_parameters():,} parameters", flush=True)
    loss = train(model, stream, steps=arguments.steps, batch_size=arguments.batch_size, length=arguments.length)
    partial = arguments.output.with_name(f".{arguments.output.name}.partial")
    tokenizer.save_pretrained(partial, save_jinja_files=False)
    model.save_pretrained(partial)
    partial.rename(arguments.output)
    print(f"{arguments.output}: a base model with a loss of {loss:.2f} nats a token")


if __name__ == "__main__":
    main()
