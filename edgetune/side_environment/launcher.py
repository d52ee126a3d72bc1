"""Runs a worker in the side environment: `launcher.py SCRIPT ARGUMENT…`. Imports nothing of edgetune."""

from __future__ import annotations

import runpy
import sys
from types import ModuleType

# `import onnxruntime.training` pulls in these two. They import torch, serve its former trainer only, and are not used.
for _name in ("onnxruntime.training.amp", "onnxruntime.training.optim"):
    sys.modules[_name] = ModuleType(_name)

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
