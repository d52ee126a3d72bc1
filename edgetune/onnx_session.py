"""How edgetune opens graphs on stock ONNX Runtime: quietly, without telemetry, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime

_ERRORS_ONLY = 3


def open_graph(model: Path | bytes, weights_folder: Path | None = None) -> onnxruntime.InferenceSession:
    """Load a graph.

    Args:
        model: The file, or the graph itself.
        weights_folder: Where the external data of a graph lies that is not beside it.
    """
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if weights_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights_folder.absolute())
        )
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
