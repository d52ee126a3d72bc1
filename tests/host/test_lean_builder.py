"""The builder with lean_builder's methods against the builder as it is, and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import onnx
import pytest

from benchmarks.checkpoints import Size, make_checkpoint
from edgetune.config import Base
from edgetune.host import olive_pass
from support.tiny_phi3 import VARIANTS, genai_model

MEMORY = """
import resource, sys
from edgetune.host import olive_pass
import olive.passes.onnx.model_builder, onnxruntime_genai.models.builder, safetensors, transformers.models.phi3
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
olive_pass._serve(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
WIDE = Size(hidden=1024, intermediate=2048, layers=10, heads=16, vocabulary=4096)
"""113 million parameters, 452 MB in fp32."""


def canonical(path: Path) -> bytes:
    """A model with the attributes of each node in one order; the quantiser turns round those that hold graphs."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.attribute.sort(key=lambda attribute: attribute.name)
    return bytes(model.SerializeToString(deterministic=True))


@pytest.mark.parametrize("base", ["int4", "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_byte_is_the_builders(variant: str, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = genai_model(variant, base, "nearest")
    monkeypatch.setattr(olive_pass, "lean_builder", lambda *_: nullcontext())
    plain = genai_model.__wrapped__(variant, base, "nearest")  # past the cache
    assert plain != lean
    files = sorted(path.name for path in plain.iterdir())
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= set(files)
    for name in files:
        read = canonical if name == "model.onnx" else Path.read_bytes
        assert read(plain / name) == read(lean / name), name


def test_the_builder_is_itself_again_afterwards() -> None:
    from onnxruntime_genai.models import builder

    genai_model("partial", "int4")
    methods = (builder.Model.load_weights, builder.Model.make_initializer, builder.Model.to_int4)
    assert not [method for method in methods if "edgetune" in method.__module__]


@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX's")
@pytest.mark.parametrize("base", get_args(Base))
def test_memory_is_far_less_than_the_model_in_fp32(base: Base, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", WIDE)
    precision = "fp32" if base == "fp32" else "int4"
    config = {"precision": precision, "extra_options": {"hf_remote": False, "hf_token": "false"}}
    request = {"name": "ModelBuilder", "config": config, "source": str(tmp_path / "checkpoint")}
    request |= {"base": base, "quantiser": "least-squares"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, json.dumps(request | {"output": str(tmp_path / "model")})],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    # What is in blocks is held until it is written: 127 MB of int8, 71 MB of int4.
    assert int(done.stdout.splitlines()[-1]) * unit < (260e6 if base == "int8" else 200e6)
