"""The profile of a device that nobody sells, right in every line."""

from __future__ import annotations

PROFILE = """\
name = "my-board"
title = "My board"
class = "npu"
vendor = "Somebody"

[hardware]
architecture = "aarch64"
systems = ["linux"]
cores = { value = 4, source = "data sheet" }
memory = { value = "2GB", source = "data sheet" }

[runtime]
names = ["qnn", "onnxruntime"]
provider = "QNNExecutionProvider"
options = { backend_type = "htp" }
precisions = ["fp16"]
source = "manual"

[placement]
whole-step = "accelerator"
layered = "cpu"
split-trunk = "no"
forward-only = "cpu"
inference = "accelerator"
source = "manual"

[buckets]
shapes = [[1, 64], [1, 128]]
source = "chosen"

[[limits.notes]]
text = "static shapes only"
source = "manual"

[install]
step = "pip install it"
source = "manual"
"""
