"""A training step is just an ONNX model: train a bundle with nothing but onnxruntime and numpy.

A native app does the same in its own language; docs/native.md says what each tensor is. Token ids and labels come from
`edgetune preview`, and what is written is an adapter that `edgetune eval` and `edgetune export` take:

    edgetune preview demo/offline/bundle --data examples/device_assistant/train.jsonl --json > rows.jsonl
    python examples/portable_loop.py demo/offline/bundle rows.jsonl my_adapter
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

STEPS, BATCH_SIZE, LEARNING_RATE = 200, 8, 3e-3

Arrays = dict[str, np.ndarray]


def run(session: ort.InferenceSession, inputs: Arrays) -> Arrays:
    """Run a graph; its outputs by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def one(value: float) -> np.ndarray:
    """A number as the graphs take it."""
    return np.array([value], np.float32)


def make_batch(rows: list[dict], manifest: dict) -> Arrays:
    """Pad rows and lay out what the step takes."""
    rope = manifest["architecture"]["rope"]
    shape = len(rows), max(len(row["input_ids"]) for row in rows)
    ids, labels = np.full(shape, manifest["tokenizer"]["pad_token_id"], np.int64), np.full(shape, -100, np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row["input_ids"])] = row["input_ids"]
        labels[index, : len(row["labels"]) - 1] = row["labels"][1:]  # the target of a position is the next token
    causal = np.triu(np.full((shape[1], shape[1]), -1e4, np.float32), 1)
    frequencies = rope["theta"] ** (-np.arange(0, rope["dim"], 2) / rope["dim"])
    angles = np.tile(np.outer(np.arange(shape[1]), frequencies), (shape[0], 1, 2)).astype(np.float32)
    return {
        "input_ids": ids,
        "labels": labels,
        "attn_bias": np.tile(causal, (shape[0], 1, 1, 1)),
        "rope_cos": np.cos(angles),
        "rope_sin": np.sin(angles),
    }


def first_parameters(lora: dict, generator: np.random.Generator) -> Arrays:
    """A random, B zero: the model starts as its base."""
    parameters = {}
    for slot in lora["slots"]:
        rank = lora.get("rank_pattern", {}).get(slot["name"].rpartition(".")[2], lora["rank"])
        a = generator.uniform(-1, 1, (rank, slot["in_features"])) / slot["in_features"] ** 0.5
        parameters[f"{slot['name']}.lora_A.weight"] = a.astype(np.float32)
        parameters[f"{slot['name']}.lora_B.weight"] = np.zeros((slot["out_features"], rank), np.float32)
    return parameters


def write_adapter(folder: Path, parameters: Arrays, lora: dict) -> None:
    """Write PEFT's format; safetensors is the length of a JSON header, the header, and the bytes."""
    header, data = {}, b""
    for name, value in parameters.items():
        place = [len(data), len(data) + value.nbytes]
        header[f"base_model.model.{name}"] = {"dtype": "F32", "shape": value.shape, "data_offsets": place}
        data += value.tobytes()
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    config = {
        "peft_type": "LORA",
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "target_modules": lora["target_modules"],
        "use_rslora": lora.get("rank_stabilised", False),
        "rank_pattern": lora.get("rank_pattern", {}),
        "alpha_pattern": lora.get("alpha_pattern", {}),
    }
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main(bundle: Path, rows_file: Path, output: Path) -> None:
    """Train and write the adapter."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    architecture = manifest["architecture"]
    if architecture["sliding_window"] or architecture["rope"]["short_factor"]:
        sys.exit(f"{bundle}: has a sliding window or longrope, which docs/native.md adds to this loop")
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    step, adamw = (ort.InferenceSession(bundle / f"{name}.onnx") for name in ("step", "adamw"))
    generator = np.random.default_rng(0)
    parameters = first_parameters(manifest["lora"], generator)
    moments = {name + moment: 0 * value for name, value in parameters.items() for moment in (".exp_avg", ".exp_avg_sq")}
    for number in range(1, STEPS + 1):
        batch = make_batch([rows[i] for i in generator.choice(len(rows), BATCH_SIZE)], manifest)
        gradients = run(step, {**batch, **parameters, "loss_scale": one(1)})
        loss = gradients.pop("loss")[0]
        falling = LEARNING_RATE * (1 - (number - 1) / STEPS)
        options = {"learning_rate": falling, "weight_decay": 0, "max_grad_norm": 1, "step": number}
        options = {name: one(value) for name, value in options.items()}
        updated = run(adamw, {**options, **parameters, **gradients, **moments})
        norm = updated["grad_norm"][0]
        if not np.isfinite([loss, norm]).all():
            sys.exit(f"step {number}: loss {loss}, gradient norm {norm}; lower the learning rate")
        parameters, moments = ({name: updated[f"{name}.next"] for name in state} for state in (parameters, moments))
        if number == 1 or number % 20 == 0:
            print(f"step {number:3d}  loss {loss:.4f}  gradient norm {norm:.3f}", flush=True)
    write_adapter(output, parameters, manifest["lora"])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: portable_loop.py BUNDLE ROWS OUTPUT; ROWS is what `edgetune preview BUNDLE --json` prints")
    main(*map(Path, sys.argv[1:]))
