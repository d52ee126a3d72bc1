"""edgetune: take a Phi-3 model to an edge device and let it learn there."""

import os

# ONNX Runtime reads this when it is imported, and reports its use to its maker unless it is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
