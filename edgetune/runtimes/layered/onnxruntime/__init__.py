"""TODO edgetune/runtimes/layered/onnxruntime."""
