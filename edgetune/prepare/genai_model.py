"""The inference model: Olive's ModelBuilder pass turns the checkpoint into an ONNX Runtime GenAI folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgetune.config import Base
from edgetune.genai import ACCURACY_LEVEL, BLOCK_SIZE, MODEL, SIDE_FILES, WEIGHTS
from edgetune.olive_pass import run_olive_pass


def build_genai_model(checkpoint: Path, output: Path, base: Base) -> None:
    """Write the GenAI folder of a checkpoint.

    An int4 base has all linear layers and the head rounded to nearest, symmetrically, in blocks of 32; embedding and
    norms stay fp32. The weights lie in `model.onnx.data`.

    Args:
        checkpoint: A verified Phi-3 folder with safetensors and a tokenizer.
        output: Folder to write into; made when it is not there.
        base: How the frozen weights are stored.

    Raises:
        EdgetuneError: Olive failed; the message holds the end of what it printed.
    """
    config: dict[str, object] = {"precision": base, "extra_options": {"hf_remote": False, "hf_token": "false"}}
    if base == "int4":
        config |= {
            "int4_block_size": BLOCK_SIZE,
            "int4_is_symmetric": True,
            "int4_accuracy_level": ACCURACY_LEVEL,
            "int4_algo_config": "default",
        }
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".genai-", dir=output) as scratch:
        built = Path(scratch) / "model"
        run_olive_pass("ModelBuilder", config, checkpoint, built)
        for name in (MODEL, WEIGHTS, *SIDE_FILES):
            if (built / name).exists():
                (built / name).replace(output / name)
