"""The inference model: Olive's ModelBuilder pass turns the checkpoint into an ONNX Runtime GenAI folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from edgetune.config import Base, Quantiser
from edgetune.formats.genai import ACCURACY_LEVEL, CONFIG, MODEL, SIDE_FILES, WEIGHTS
from edgetune.host.olive_pass import run_olive_pass
from edgetune.model.blocks import BLOCK_SIZE


def build_genai_model(checkpoint: Path, output: Path, base: Base, quantiser: Quantiser) -> None:
    """Write the GenAI folder of a checkpoint.

    An int4 or int8 base has all linear layers and the head rounded symmetrically, in blocks of 32; an fp16 base has
    them in fp16, and casts them. Embedding and norms stay fp32. The weights lie in `model.onnx.data`.

    Args:
        checkpoint: A verified Phi-3 folder with safetensors and a tokenizer.
        output: Folder to write into; made when it is not there.
        base: How the frozen weights are stored.
        quantiser: How those of an int4 base are rounded; `gptq` rounds anew, afterwards.

    Raises:
        EdgetuneError: Olive failed; the message holds the end of what it printed.
    """
    # Whatever is stored in fewer bits than fp32 is built as int4; `lean_builder` makes int8 or fp16 of it.
    precision = "fp32" if base == "fp32" else "int4"
    config: dict[str, object] = {"precision": precision, "extra_options": {"hf_remote": False, "hf_token": "false"}}
    if precision == "int4":
        config |= {
            "int4_block_size": BLOCK_SIZE,
            "int4_is_symmetric": True,
            "int4_accuracy_level": ACCURACY_LEVEL,
            "int4_algo_config": "default",
        }
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".genai-", dir=output) as scratch:
        built = Path(scratch) / "model"
        run_olive_pass("ModelBuilder", config, checkpoint, built, base, quantiser)
        for name in (MODEL, WEIGHTS, *SIDE_FILES):
            if (built / name).exists():
                (built / name).replace(output / name)


def stop_at(folder: Path, token: int) -> bool:
    """Let the model stop at the token with which training ends an answer; checkpoints do not always list it.

    Args:
        folder: A GenAI folder.
        token: Id of the token.

    Returns:
        Whether it was missing in `eos_token_id`.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    ends = config["model"]["eos_token_id"]
    listed = ends if isinstance(ends, list) else [ends]
    if token in listed:
        return False
    config["model"]["eos_token_id"] = [*listed, token]
    (folder / CONFIG).write_text(json.dumps(config, indent=4), encoding="utf-8")
    return True
