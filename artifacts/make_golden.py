"""Make `artifacts/golden`: a tiny bundle, rows to train it on, and what PyTorch + PEFT say must come out.

    python artifacts/make_golden.py              # bundle, initial adapter, expected.json, from the base that is there
    python artifacts/make_golden.py --new-base   # first train a new base as well

The base is a two-layer Phi-3 that has learnt to answer sentences about a house. It is kept, because floating-point
training ends in other bits on other processors; all that follows from it is the same everywhere.
The `.jsonl` files were written by hand. `expected.json` comes from transformers and PEFT alone, never from
edgetune's own graphs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from edgetune.config import PrepareConfig
from edgetune.data.encode import IGNORED, Example
from edgetune.formats.bundle import Bundle
from edgetune.preparation import prepare

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
BASE, BUNDLE, ADAPTER, EXPECTED = "edgetune-golden-base", "bundle", "initial_adapter", "expected.json"

PREPARE = PrepareConfig(rank=4, alpha=8.0, base="int4", max_length=64)
OPTIONS: dict[str, Any] = {
    "steps": 20,
    "batch_size": 3,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.005,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "shuffle": False,
}
"""Fields of `edgetune.config.TrainConfig`. 3 does not divide the number of rows: an epoch ends with a smaller batch."""
PROMPTS = ("Turn on the lamp in the kitchen.", "Turn off the fan in the cellar.", "Is the radio in the attic on?")
MAX_NEW_TOKENS = 24
CLEAR_MARGIN = 0.05
"""A greedy token must lead the next by this logit, so that no rounding of another processor turns it."""

LAST_TOKEN, END_OF_TURN = "<|endoftext|>", "<|end|>"
TEMPLATE = (
    "{% for turn in messages %}{{ '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ '<|end|>\\n' }}{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)
"""The form of Phi-3's: a tag for the role, the content, and a tag that ends the turn."""
PIECES, ROWS_OF_EMBEDDING = 480, 512
THINGS = ("lamp", "heater", "radio", "fan", "kettle", "oven", "pump", "siren", "printer", "camera")
ROOMS = ("kitchen", "hall", "cellar", "garage", "attic", "study", "bedroom", "garden")


def house_talk() -> list[list[dict[str, str]]]:
    """What the base learns: conversations about every thing in every room."""
    talks = []
    for thing in THINGS:
        for room in ROOMS:
            place = f"the {thing} in the {room}"
            for state in ("on", "off"):
                talks.append((f"Turn {state} {place}.", f"{place.capitalize()} is now {state}."))
                talks.append((f"Is {place} {state}?", f"Yes, {place} is {state}."))
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in talks]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of Phi-3's kind: BPE over words that begin with ▁, bytes for the rest, a token for every tag."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    octets = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=["<unk>", "<s>", "</s>", *octets], show_progress=False
    )
    texts = [turn["content"] for talk in house_talk() for turn in talk]
    bpe.train_from_iterator((word for text in texts for word in text.split()), trainer)
    record = json.loads(bpe.to_str())
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] not in octets]
    bpe = Tokenizer.from_str(json.dumps(record))
    tags = (LAST_TOKEN, "<|assistant|>", "<|system|>", END_OF_TURN, "<|user|>")
    bpe.add_special_tokens([AddedToken(tag, special=True, rstrip=True, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token=LAST_TOKEN,
        unk_token="<unk>",
        pad_token=LAST_TOKEN,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    """A Phi-3 with random weights, as small as ONNX Runtime GenAI and blocks of 32 allow."""
    last = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=ROWS_OF_EMBEDDING,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            original_max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=last,
            pad_token_id=last,
            attn_implementation="eager",
        )
    )
    model.generation_config.eos_token_id = [last, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    return model


def make_base(folder: Path, *, steps: int = 600, rows: int = 16) -> None:
    """Train the base and save it as a Hugging Face folder, in bfloat16 as Phi-3 itself."""
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    talks = [tokenizer.apply_chat_template(talk) for talk in house_talk()]
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch = [Example(0, ids, ids) for ids in draw.sample(talks, rows)]
        loss = mean_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"base: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_initial_adapter(golden: Path) -> None:
    """What PEFT saves of a fresh adapter; B is not zero, so that A has a gradient from the first step on."""
    torch.manual_seed(1)
    model = Phi3ForCausalLM.from_pretrained(golden / BASE, dtype=torch.float32)
    modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    config = LoraConfig(r=PREPARE.rank, lora_alpha=int(PREPARE.alpha), target_modules=modules, task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    config.base_model_name_or_path = BASE
    config.target_modules = sorted(modules)  # PEFT writes a set, in any order
    peft.save_pretrained(golden / ADAPTER, save_embedding_layers=False)  # "auto" asks the hub
    (golden / ADAPTER / "README.md").unlink()


def read_rows(path: Path, tokenizer: Any) -> list[Example]:
    """Token ids and labels of a file of rows, by transformers' own tokenizer and template."""
    examples = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(text)
        if "messages" in row:
            ids, labels = _chat(row["messages"], tokenizer)
        else:
            prompt, rest = row.get("prompt", ""), row.get("completion", row.get("text"))
            encoded = tokenizer(prompt + rest, return_offsets_mapping=True)
            ids = [*encoded["input_ids"], tokenizer.eos_token_id]
            labels = [
                token if start >= len(prompt) else IGNORED
                for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            ]
            labels.append(tokenizer.eos_token_id)
        examples.append(Example(number, ids, labels))
    return examples


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Trained is every answer from the end of its generation prompt to the tag that ends it."""
    ids = tokenizer.apply_chat_template(messages)
    labels = [IGNORED] * len(ids)
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
            if ids[: len(prompt)] != prompt:
                raise ValueError(f"the prompt of turn {index} is no beginning of the conversation")
            stop = ids.index(end_of_turn, len(prompt)) + 1
            labels[len(prompt) : stop] = ids[len(prompt) : stop]
    return ids, labels


def mean_loss(model: Any, examples: list[Example]) -> torch.Tensor:
    """Mean loss over the trained tokens of some rows, as transformers computes it."""
    loss: torch.Tensor = _oracle().loss(model, examples)
    return loss


def _oracle() -> Any:
    """The oracle of the tests: PyTorch + PEFT on the weights that the int4 blocks stand for."""
    if (tests := str(ROOT / "tests")) not in sys.path:
        sys.path.append(tests)
    return import_module("support.oracle")


def expectations(golden: Path, bundle: Bundle) -> dict[str, Any]:
    """What training, evaluating and answering must give, by PyTorch + PEFT."""
    oracle = _oracle()
    tokenizer = AutoTokenizer.from_pretrained(golden / BASE)
    tensors = load_file(golden / ADAPTER / "adapter_model.safetensors")
    parameters = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    model = oracle.peft_model(golden / BASE, bundle, parameters)
    train, valid = (read_rows(golden / f"{name}.jsonl", tokenizer) for name in ("train", "valid"))
    with torch.no_grad():
        first = mean_loss(model, valid).item()
    with torch.no_grad(), model.disable_adapter():
        base = mean_loss(model, valid).item()
    answers = [_answer(model, tokenizer, prompt) for prompt in PROMPTS]
    losses, norms = _train(oracle, model, train)
    with torch.no_grad():
        last = mean_loss(model, valid).item()
    return {
        "options": OPTIONS,
        "losses": losses,
        "grad_norms": norms,
        "validation_loss": {"base": base, "first": first, "last": last},
        "answers": answers,
        "rows": [
            {"file": path.name, "line": row.line, "input_ids": row.input_ids, "labels": row.labels}
            for path in sorted(golden.glob("*.jsonl"))
            for row in read_rows(path, tokenizer)
        ],
    }


def _train(oracle: Any, model: Any, rows: list[Example]) -> tuple[list[float], list[float]]:
    parameters = list(oracle.trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=OPTIONS["learning_rate"], weight_decay=OPTIONS["weight_decay"])
    size = OPTIONS["batch_size"]
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    losses, norms = [], []
    for step in range(OPTIONS["steps"]):
        loss = mean_loss(model, groups[step % len(groups)])
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, OPTIONS["max_grad_norm"])))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def _answer(model: Any, tokenizer: Any, prompt: str) -> dict[str, Any]:
    """The base's greedy answer, without the token that ends it."""
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ends = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN))
    answer: list[int] = []
    with torch.no_grad(), model.disable_adapter():
        while len(answer) < MAX_NEW_TOKENS:
            two = model(input_ids=torch.tensor([ids + answer])).logits[0, -1].topk(2)
            if float(two.values[0] - two.values[1]) < CLEAR_MARGIN:
                raise ValueError(f"the answer to {prompt!r} hangs on a rounding; choose another prompt")
            if (token := int(two.indices[0])) in ends:
                break
            answer.append(token)
    return {"prompt": prompt, "prompt_ids": ids, "answer_ids": answer, "text": tokenizer.decode(answer)}


def write_expected(path: Path, expected: dict[str, Any]) -> None:
    """One line an entry, so that a difference is easy to see."""
    entries = []
    for key, value in expected.items():
        parts = [json.dumps(item, ensure_ascii=False) for item in value] if isinstance(value, list) else []
        text = "[\n  " + ",\n  ".join(parts) + "\n ]" if parts else json.dumps(value, ensure_ascii=False)
        entries.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def make_golden(golden: Path, *, new_base: bool) -> None:
    """Make everything but the rows in `golden`."""
    torch.set_num_threads(1)  # two would add in another order from run to run, and gain nothing here
    if new_base:
        shutil.rmtree(golden / BASE, ignore_errors=True)
        make_base(golden / BASE)
    for name in (BUNDLE, ADAPTER):
        shutil.rmtree(golden / name, ignore_errors=True)
    bundle = prepare(str(golden / BASE), golden / BUNDLE, PREPARE, say=print)
    make_initial_adapter(golden)
    expected = expectations(golden, bundle)
    write_expected(golden / EXPECTED, expected)


def main() -> None:
    """Make the committed folder anew."""
    parser = argparse.ArgumentParser(description="make artifacts/golden anew")
    parser.add_argument("--new-base", action="store_true", help="train a new base first")
    arguments = parser.parse_args()
    make_golden(GOLDEN, new_base=arguments.new_base)


if __name__ == "__main__":
    main()
