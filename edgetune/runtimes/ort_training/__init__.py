"""The ONNX Runtime Training API, in the side environment."""
