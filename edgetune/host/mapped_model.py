"""transformers' model of a checkpoint without its weights in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def mapped_model(folder: Path) -> Any:
    """transformers' model over the checkpoint's own tensors: read where they lie in the files, when they are used.

    What is no tensor of the checkpoint, such as the frequencies of the rotary embedding, has a shape and no numbers.

    Args:
        folder: A Hugging Face folder with safetensors; code that it names is not run.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as listed:
            names = list(listed.keys())
        for name in names:
            with safe_open(path, "pt") as mapped:  # a mapping of its own, which goes when this tensor goes
                tensors[name] = mapped.get_tensor(name)
    model.load_state_dict(tensors, assign=True, strict=False)  # a tied head has no tensor of its own
    model.tie_weights()
    return model.eval()
