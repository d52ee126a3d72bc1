"""The graphs of the layered form on stock ONNX Runtime."""
